// What views are made of.

import { download } from "./api.js";
import { PHASES, bytes, h, number, percent, phaseWord, put, say, set, toast } from "./dom.js";

/** A box with a heading. */
export const card = (title, props, ...children) =>
  h("section", { class: "card", ...props }, title && h("h2", {}, title), children);

/** Where something stands, by colour and by word. */
export function badge(phase, word = phaseWord(phase)) {
  return h("span", { class: "badge", "data-phase": phase }, word);
}

/** Whether a node is there. */
export function presence(online) {
  const word = online === null ? "never said" : online ? "online" : "offline";
  return h("span", { class: "presence", "data-online": String(online) }, word);
}

/** A number with its name, which may lead somewhere. */
export function tile(name, href) {
  const value = h("span", { class: "tile-value" }, "–");
  const note = h("span", { class: "tile-note" });
  const inside = [h("span", { class: "tile-name" }, name), value, note];
  const element = href ? h("a", { class: "tile", href }, inside) : h("div", { class: "tile" }, inside);
  return {
    element,
    set(text, more = "", kind = "") {
      say(value, text);
      say(note, more);
      set(element, "data-kind", kind || null);
    },
  };
}

/** Parts of a whole side by side: `[phase, count]` each. */
export function bar(parts, whole, label) {
  const shown = parts.filter(([, many]) => many > 0);
  const text = shown.map(([phase, many]) => `${number(many)} ${phaseWord(phase)}`).join(", ");
  const element = h("div", { class: "bar-stack", role: "img", "aria-label": `${label}: ${text || "nothing"}`, title: text });
  for (const [phase, many] of shown) {
    const part = h("span", { "data-phase": phase });
    part.style.flexGrow = String(Math.max(many, whole / 250));
    element.append(part);
  }
  const left = whole - shown.reduce((sum, [, many]) => sum + many, 0);
  if (left > 0) {
    const rest = h("span", { class: "bar-rest" });
    rest.style.flexGrow = String(left);
    element.append(rest);
  }
  return element;
}

/** The phases of an object that has a number for each, in their order. */
export const phaseParts = (phases) => PHASES.map((phase) => [phase, phases[phase] ?? 0]);

/** What the colours of phases mean. */
export function legend(parts) {
  const items = parts.filter(([, many]) => many > 0).map(([phase, many]) =>
    h("li", {}, h("span", { class: "dot", "data-phase": phase, "aria-hidden": "true" }), `${phaseWord(phase)} `, h("b", {}, number(many))));
  return h("ul", { class: "legend" }, items);
}

/** How far something is. */
export function progress(done, total, label) {
  const share = total > 0 ? Math.min(1, done / total) : 0;
  const inside = h("span", {});
  inside.style.width = `${share * 100}%`;
  return h("div", { class: "progress" },
    h("div", {
      class: "progress-bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100,
      "aria-valuenow": Math.round(share * 100),
    }, inside),
    h("span", { class: "muted" }, `${bytes(done)} of ${bytes(total)}, ${percent(done, total)}`));
}

/** A command to type, and a button to take it along. */
export function command(text) {
  const copy = h("button", {
    type: "button", class: "quiet small", "aria-label": `Copy ${text}`,
    async onclick() {
      try {
        await navigator.clipboard.writeText(text);
        toast("Copied");
      } catch {
        getSelection().selectAllChildren(code);
        toast("Selected: copy it with your keyboard");
      }
    },
  }, "Copy");
  const code = h("code", {}, text);
  return h("div", { class: "command" }, code, copy);
}

/** Nothing is here yet: what to do about it. */
export function empty(title, text, ...more) {
  return h("div", { class: "empty" }, h("h2", {}, title), text && h("p", {}, text), more);
}

/** Something is being fetched. Shown only if that takes a while. */
export function loading(lines = 3) {
  return h("div", { class: "loading", role: "status", "aria-label": "Loading" }, Array.from({ length: lines }, () => h("span", {})));
}

/** Something could not be had. */
export function trouble(error, again) {
  return h("div", { class: "empty trouble", role: "alert" }, h("h2", {}, error.status === 403 ? "Not for you" : error.status === 404 ? "Not here" : "That did not work"),
    h("p", {}, error.message), error.hint && h("p", { class: "muted" }, error.hint),
    again && h("button", { type: "button", onclick: again }, "Try again"));
}

/** A digest, short; whole when asked for. */
export const digest = (text) => (text ? h("code", { class: "digest", title: text }, text.slice(0, 12)) : h("span", { class: "muted" }, "–"));

/** A button that saves a package. */
export function saver(entry) {
  if (!entry.digest) return null;
  const name = entry.name.split("/").at(-1);
  return h("button", {
    type: "button", class: "quiet small", "aria-label": `Download ${entry.name}`,
    onclick: () => download(entry.digest, name).catch((error) => toast(error.message, "bad")),
  }, "Download");
}

/** A table: `columns` are `{ name, class, cell(row) }`. */
export function table(label, columns, rows) {
  const cells = (row) => columns.map((column) => h("td", { class: column.class, "data-name": column.name }, column.cell(row)));
  return h("div", { class: "table-wrap", tabindex: 0, role: "region", "aria-label": label },
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map((column) => h("th", { scope: "col", class: column.class }, column.name || h("span", { class: "hidden" }, column.label))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, cells(row))))));
}

/** Asks before something happens that cannot be taken back. */
export function ask(title, text, yes) {
  return new Promise((done) => {
    const dialog = h("dialog", { class: "ask", "aria-labelledby": "ask-title" },
      h("form", { method: "dialog" },
        h("h2", { id: "ask-title" }, title), h("p", {}, text),
        h("div", { class: "actions" },
          h("button", { value: "no", class: "quiet" }, "Cancel"),
          h("button", { value: "yes", class: "danger" }, yes))));
    dialog.addEventListener("close", () => {
      dialog.remove();
      done(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/**
 * A list of any length, of which only what can be seen is on the page. `columns` are `{ key, name, class, sort, cell() }`, where
 * `cell()` makes `{ element, set(row) }`, which is used again for other rows.
 */
export class LongList {
  constructor({ label, columns, link, onsort }) {
    Object.assign(this, { columns, link, rows: [], pool: [], at: 0 });
    this.body = h("div", { class: "long-body", role: "rowgroup" });
    this.heads = columns.map((column) => {
      const head = h("div", { role: "columnheader", class: `cell ${column.class ?? ""}` },
        column.sort === undefined ? column.name : h("button", { type: "button", onclick: () => onsort(column.key) }, column.name));
      return head;
    });
    this.table = h("div", { class: "long-table", role: "table", "aria-label": label },
      h("div", { role: "rowgroup", class: "long-head" }, h("div", { role: "row", class: "long-row", "aria-rowindex": 1 }, this.heads)),
      this.body);
    this.element = h("div", { class: "long", tabindex: 0, role: "region", "aria-label": `${label}, scrolling` }, this.table);
    this.element.addEventListener("scroll", () => this.soon(), { passive: true });
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.observer = new ResizeObserver(() => this.soon());
    this.observer.observe(this.element);
  }

  gone() {
    this.observer.disconnect();
  }

  sorted(key, down) {
    this.columns.forEach((column, at) => {
      if (column.sort !== undefined) set(this.heads[at], "aria-sort", column.key === key ? (down ? "descending" : "ascending") : "none");
    });
  }

  show(rows) {
    this.rows = rows;
    set(this.table, "aria-rowcount", String(rows.length + 1));
    this.draw();
  }

  soon() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    const height = parseFloat(getComputedStyle(this.element).getPropertyValue("--row")) || 40;
    this.height = height;
    const all = `${this.rows.length * height}px`;
    if (this.body.style.height !== all) this.body.style.height = all;
    const top = Math.max(0, this.element.scrollTop - height);
    const first = Math.max(0, Math.floor(top / height) - 6);
    const last = Math.min(this.rows.length, Math.ceil((top + this.element.clientHeight) / height) + 8);
    // Row n always is in the same element for as long as it is seen, so that what has the focus keeps it.
    const many = Math.max(last - first, 0);
    while (this.pool.length < many) this.pool.push(this.make());
    while (this.pool.length > many + 24) this.pool.pop().element.remove();
    const size = this.pool.length;
    const used = new Set();
    for (let at = first; at < last; at += 1) {
      const slot = at % size;
      used.add(slot);
      this.pool[slot].set(this.rows[at], at, height);
    }
    this.pool.forEach((row, slot) => {
      if (!used.has(slot) && !row.element.hidden) row.element.hidden = true;
    });
  }

  make() {
    const cells = this.columns.map((column) => ({ column, ...column.cell() }));
    const element = h("div", { role: "row", class: "long-row" },
      cells.map(({ column, element }) => h("div", { role: "cell", class: `cell ${column.class ?? ""}` }, element)));
    this.body.append(element);
    let shown;
    let place;
    return {
      element,
      set: (row, at, height) => {
        if (element.hidden) element.hidden = false;
        const top = `translateY(${at * height}px)`;
        if (place !== top) {
          place = top;
          element.style.transform = top;
          set(element, "aria-rowindex", String(at + 2));
        }
        if (shown === row) return;
        shown = row;
        for (const cell of cells) cell.set(row);
      },
    };
  }

  /** Up and down the rows by keyboard. */
  key(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey || this.rows.length === 0) return;
    event.preventDefault();
    const row = event.target.closest("[aria-rowindex]");
    const from = row && this.body.contains(row) ? Number(row.getAttribute("aria-rowindex")) - 2 : step > 0 ? -1 : 0;
    const to = Math.min(Math.max(from + step, 0), this.rows.length - 1);
    const top = to * this.height;
    const room = this.element.clientHeight - 2 * this.height;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top > this.element.scrollTop + room) this.element.scrollTop = top - room;
    this.draw();
    this.body.querySelector(`[aria-rowindex="${to + 2}"]:not([hidden]) a`)?.focus({ preventScroll: true });
  }
}

/** A cell of a long list that is one text. */
export const textCell = (text, props) => () => {
  const element = h("span", props);
  return {
    element,
    set(row) {
      const value = text(row);
      say(element, value);
      set(element, "title", value.length > 16 ? value : null);
    },
  };
};

export { put };

// All nodes: found, narrowed and sorted here, ten thousand of them as fast as ten.

import { BUSY, PHASES, ago, count, h, number, phaseWord, put, release, say, set } from "./dom.js";
import { HELD, fleet } from "./fleet.js";
import { LongList, command, empty, loading, textCell } from "./parts.js";

/** How often rows change places at most, in milliseconds: what moves all the time cannot be read. */
const SETTLE = 700;

const ORDER = { node: 0, phase: 1, release: 1, channel: 1, machine: 1, changed: 1 };

export function nodes(view, _, parameters) {
  const wanted = {
    q: parameters.get("q") ?? "", phase: parameters.get("phase") ?? "", channel: parameters.get("channel") ?? "", release: parameters.get("release") ?? "",
    reason: parameters.get("reason") ?? "", online: parameters.get("online") ?? "", behind: parameters.get("behind") ?? "", sort: parameters.get("sort") ?? "node",
  };
  const search = h("input", { type: "search", id: "search", placeholder: "Search name, board, label, error…", "aria-label": "Search nodes", autocomplete: "off", spellcheck: "false", value: wanted.q, oninput: (event) => change({ q: event.target.value }) });
  const phase = select("Phase", "phase", [["", "Any phase"], ["busy", "updating"], ["failed,rolled_back", "failed or rolled back"], ...PHASES.map((one) => [one, phaseWord(one)])]);
  const channel = select("Channel", "channel", [["", "Any channel"]]);
  const online = select("Presence", "online", [["", "Online or not"], ["true", "online"], ["false", "offline"]]);
  const behind = select("Currency", "behind", [["", "Current or not"], ["true", "behind its channel"], ["false", "up to date"]]);
  const chips = h("div", { class: "chips" });
  const tally = h("p", { class: "muted tally", role: "status" });
  const list = new LongList({
    label: "Nodes",
    onsort: (key) => change({ sort: wanted.sort === key ? `-${key}` : key }),
    columns: [
      { key: "node", name: "Node", class: "c-node", sort: true, cell: nameCell },
      { key: "phase", name: "Phase", class: "c-phase", sort: true, cell: phaseCell },
      { key: "release", name: "Release", class: "c-release", sort: true, cell: textCell((row) => release(row.version, row.sequence)) },
      { key: "channel", name: "Channel", class: "c-channel", sort: true, cell: textCell((row) => row.channel ?? "–") },
      { key: "machine", name: "Board", class: "c-machine", sort: true, cell: textCell((row) => row.machine ?? row.platform ?? "–") },
      { key: "changed", name: "Changed", class: "c-changed", sort: true, cell: agoCell },
    ],
  });
  const nothing = h("div", { class: "card" });
  const place = h("div", { class: "list-place" }, loading(10));
  put(view, h("div", { class: "head" }, h("h1", {}, "Nodes"), tally),
    h("div", { class: "filters", role: "search" }, search, phase, channel, online, behind), chips, place);

  let timer;
  let drawn = 0;

  function select(label, key, options) {
    const element = h("select", { "aria-label": label, onchange: (event) => change({ [key]: event.target.value }) }, options.map(([value, name]) => h("option", { value }, name)));
    element.value = wanted[key];
    return element;
  }

  function change(what) {
    Object.assign(wanted, what);
    const all = Object.entries(wanted).filter(([key, value]) => value && !(key === "sort" && value === "node"));
    history.replaceState(null, "", `#/nodes${all.length ? `?${new URLSearchParams(all)}` : ""}`);
    if (fleet.total > HELD && "q" in what) {
      clearTimeout(timer);
      timer = setTimeout(() => fleet.readNodes({ q: wanted.q }).catch((error) => fleet.failed(error)), 250);
    }
    list.element.scrollTop = 0;
    draw();
  }

  function draw() {
    clearTimeout(timer);
    timer = undefined;
    drawn = performance.now();
    if (!fleet.nodes) return;
    const found = narrowed(fleet.nodes.values(), wanted);
    const all = fleet.nodes.size;
    if (all === 0 && fleet.complete) {
      put(nothing, empty("No node yet", "A node shows here as soon as it says what it is.", command("mpypi-agent run --channel dev --node device-1"), h("p", { class: "muted" }, "or fifty of them at once: ", h("code", {}, "make fleet NODES=50"))));
      return put(place, nothing);
    }
    if (found.length === 0 && fleet.complete) {
      put(nothing, empty("No such node", "Nothing matches all of that.", h("button", { type: "button", onclick: clear }, "Show all")));
      put(place, nothing);
    } else {
      if (place.firstChild !== list.element) put(place, list.element);
      const down = wanted.sort.startsWith("-");
      list.sorted(down ? wanted.sort.slice(1) : wanted.sort, down);
      list.show(found);
    }
    const more = fleet.complete ? "" : `, ${number(fleet.total - all)} to come`;
    const shown = fleet.total > HELD ? `the first ${number(all)} of ${number(fleet.total)}; search finds the others` : found.length === all ? count(all, "node") : `${number(found.length)} of ${count(all, "node")}`;
    say(tally, shown + more);
    put(chips, ["release", "reason"].map((key) => wanted[key] && h("button", { type: "button", class: "chip", "aria-label": `No longer only ${key} ${wanted[key]}`, onclick: () => change({ [key]: "" }) }, `${key} ${wanted[key]} ×`)));
    const names = [...new Set([...(fleet.channels ?? []).map((one) => one.channel), wanted.channel].filter(Boolean))];
    if (channel.options.length !== names.length + 1) {
      put(channel, h("option", { value: "" }, "Any channel"), names.map((name) => h("option", { value: name }, name)));
      channel.value = wanted.channel;
    }
  }

  function clear() {
    Object.assign(wanted, { q: "", phase: "", channel: "", release: "", reason: "", online: "", behind: "" });
    for (const element of [search, phase, channel, online, behind]) element.value = "";
    change({ q: "" });
  }

  draw();
  fleet.wantNodes();
  const listen = (changed) => {
    if (!changed.has("nodes") && !changed.has("channels")) return;
    // Rows that are seen change at once; what is found and in which order, a little later.
    list.rows.forEach((row, at) => {
      const now = fleet.nodes?.get(row.node);
      if (now && now !== row) list.rows[at] = now;
    });
    list.draw();
    const wait = SETTLE - (performance.now() - drawn);
    if (wait <= 0) draw();
    else timer ??= setTimeout(draw, wait);
  };
  listen.gone = () => {
    clearTimeout(timer);
    list.gone();
  };
  listen.search = search;
  return listen;
}

function nameCell() {
  const link = h("a", {});
  const away = h("span", { class: "away" });
  const element = h("span", { class: "name" }, link, away);
  return {
    element,
    set(row) {
      element.classList.toggle("is-away", row.online === false);
      say(away, row.online === false ? "offline" : "");
      say(link, row.node);
      set(link, "href", `#/nodes/${encodeURIComponent(row.node)}`);
    },
  };
}

function phaseCell() {
  const badge = h("span", { class: "badge" });
  const more = h("span", { class: "phase-more" });
  const bar = h("span", { class: "phase-bar" }, h("span", {}));
  return {
    element: h("span", { class: "phase-cell" }, badge, bar, more),
    set(row) {
      set(badge, "data-phase", row.phase);
      say(badge, phaseWord(row.phase));
      const isLoading = row.phase === "downloading" && row.total > 0;
      bar.hidden = !isLoading;
      if (isLoading) bar.firstChild.style.width = `${Math.min(100, (100 * row.done) / row.total)}%`;
      const text = row.error ?? (row.held ? `holds back ${row.held}` : "");
      say(more, row.reason && row.reason !== "other" ? row.reason : text);
      set(more, "title", text || null);
    },
  };
}

function agoCell() {
  const time = h("time", { "data-ago": true });
  return {
    element: time,
    set(row) {
      if (row.changed) time.dateTime = row.changed;
      else time.removeAttribute("datetime");
      say(time, ago(row.changed));
    },
  };
}

/** The rows that are wanted, in the order that is wanted. */
export function narrowed(all, wanted) {
  const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
  const phases = wanted.phase === "busy" ? BUSY : wanted.phase ? wanted.phase.split(",") : null;
  const newest = new Map((fleet.channels ?? []).map((one) => [one.channel, one.sequence]));
  const found = [];
  for (const row of all) {
    if (phases && !phases.includes(row.phase)) continue;
    if (wanted.channel && row.channel !== wanted.channel) continue;
    if (wanted.online && String(row.online === true) !== wanted.online) continue;
    if (wanted.reason && row.reason !== wanted.reason) continue;
    if (wanted.release && String(row.sequence) !== wanted.release && row.version !== wanted.release) continue;
    if (wanted.behind && String(isBehind(row, newest.get(row.channel))) !== wanted.behind) continue;
    if (words.length) {
      const text = haystack(row);
      if (!words.every((word) => text.includes(word))) continue;
    }
    found.push(row);
  }
  return found.sort(order(wanted.sort));
}

/** Whether its channel has something newer than what it runs. */
function isBehind(row, newest) {
  if (!newest) return false;
  return row.sequence !== newest || !["idle", "confirming"].includes(row.phase);
}

const texts = new WeakMap();

function haystack(row) {
  let text = texts.get(row);
  if (text === undefined) {
    const labels = Object.entries(row.labels ?? {}).map(([key, value]) => `${key}=${value}`);
    text = [row.node, row.machine, row.platform, row.firmware, row.version, row.agent, row.error, ...labels].filter(Boolean).join("\n").toLowerCase();
    texts.set(row, text);
  }
  return text;
}

const NATURAL = new Intl.Collator("en", { numeric: true });
/** A name's digits, each number as long as the others: the order that people expect, without comparing as they would. */
const names = new Map();

function key(name) {
  let made = names.get(name);
  if (made === undefined) {
    made = name.toLowerCase().replace(/\d+/g, (digits) => digits.padStart(12, "0"));
    names.set(name, made);
  }
  return made;
}

function order(sort) {
  const down = sort.startsWith("-");
  const by = down ? sort.slice(1) : sort;
  const byName = (one, other) => (key(one.node) < key(other.node) ? -1 : key(one.node) > key(other.node) ? 1 : 0);
  const value = {
    phase: (row) => PHASES.indexOf(row.phase), release: (row) => row.sequence ?? -1, channel: (row) => row.channel ?? "",
    machine: (row) => row.machine ?? row.platform ?? "", changed: (row) => -(Date.parse(row.changed ?? "") || 0),
  }[by];
  if (!value || !(by in ORDER)) return down ? (one, other) => -byName(one, other) : byName;
  return (one, other) => {
    const [a, b] = [value(one), value(other)];
    const first = typeof a === "string" ? NATURAL.compare(a, b) : a - b;
    return (down ? -first : first) || byName(one, other);
  };
}

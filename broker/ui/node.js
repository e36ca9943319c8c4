// One node: what it is, what it does now, what became of each update, and what it says.

import { get, post } from "./api.js";
import { bytes, clock, duration, h, phaseWord, put, release, toast, when } from "./dom.js";
import { fleet } from "./fleet.js";
import { ask, badge, card, loading, presence, progress, trouble } from "./parts.js";

const ACTIONS = [
  { action: "check", word: "Check now", done: "Told to look at its channel again", title: "Look at the channel again now, and try again what failed" },
  { action: "install", word: "Install", done: "Told to install what waits", title: "Install now what waits for an order, or for its turn" },
  { action: "rollback", word: "Roll back", done: "Told to go back", title: "Go back to the release before, if this one is not confirmed yet", sure: "It goes back to the release that it had before, if the present one is not confirmed yet." },
  { action: "restart", word: "Restart", done: "Told to restart", title: "Start again", sure: "Whatever it does now is interrupted." },
];

export function node(view, [name]) {
  const head = h("div", { class: "head" }, h("h1", {}, h("a", { href: "#/nodes", class: "up" }, "Nodes"), name));
  const now = h("div", {});
  const buttons = h("div", { class: "actions" });
  const facts = h("dl", { class: "facts" });
  const updates = h("div", {});
  const lines = h("div", { class: "log", role: "log", tabindex: 0, "aria-label": `Log of ${name}`, "aria-live": "off" });
  const raw = h("div", { class: "stack" });
  const body = h("div", { class: "stack" },
    h("section", { class: "card" }, now, buttons),
    h("div", { class: "columns" },
      h("div", { class: "stack" }, card("Updates", {}, updates), card("Log", {}, lines)),
      h("div", { class: "stack" }, card("About", {}, facts), raw)));
  const place = h("div", {}, loading(8));
  put(view, head, place);
  const abort = new AbortController();
  let row;
  let timer;

  async function read() {
    timer = undefined;
    try {
      const detail = await get(`api/nodes/${encodeURIComponent(name)}`, abort.signal);
      if (abort.signal.aborted) return;
      fleet.log = { node: name, lines: detail.log ?? [] };
      row = detail;
      if (place.firstChild !== body) put(place, body);
      drawNow();
      drawRest(detail);
      drawLog(true);
    } catch (error) {
      if (error.name !== "AbortError") put(place, trouble(error, read));
    }
  }

  function drawNow() {
    const isBusy = row.phase === "downloading" && row.total > 0;
    put(now, h("div", { class: "now" },
      badge(row.phase), presence(row.online),
      h("span", { class: "big" }, release(row.version, row.sequence)),
      row.channel && h("a", { class: "chip", href: `#/channels/${encodeURIComponent(row.channel)}` }, row.channel),
      h("span", { class: "muted" }, row.attempt > 1 ? `attempt ${row.attempt}, ` : "", row.changed ? ["changed ", when(row.changed)] : "")),
      isBusy && progress(row.done, row.total, "Download"),
      row.error && h("p", { class: "reason" }, row.error),
      row.held && h("p", { class: "held" }, `Holds back release ${row.held}: its rollout says that it is not its turn, or not yet.`));
    if (fleet.me && !fleet.me.may.order) put(buttons);
    else if (!buttons.firstChild) put(buttons, ACTIONS.map(button));
  }

  function button({ action, word, done, title, sure }) {
    return h("button", {
      type: "button", title, 
      async onclick() {
        if (sure && !(await ask(`${word} ${name}?`, sure, word))) return;
        try {
          const { online } = await post(`api/nodes/${encodeURIComponent(name)}/cmd`, { action });
          toast(online === false ? `${done}: it is offline now` : done);
        } catch (error) {
          toast(error.hint ? `${error.message}: ${error.hint}` : error.message, "bad");
        }
      },
    }, word);
  }

  function drawRest(detail) {
    const labels = Object.entries(detail.labels ?? {});
    const fact = (name, value) => value && h("div", {}, h("dt", {}, name), h("dd", {}, value));
    put(facts,
      fact("Board", detail.machine), fact("Platform", detail.platform), fact("Firmware", detail.firmware), fact("Agent", detail.agent ?? (detail.info ? "Mpy-BLOX" : null)), fact("Takes wheels for", detail.runtime),
      fact("Free", detail.free === null ? null : bytes(detail.free)), fact("Newest for it", detail.latest && release(detail.latest.version, detail.latest.sequence)),
      labels.length > 0 && fact("Labels", labels.map(([key, value]) => h("a", { class: "chip", href: `#/nodes?q=${encodeURIComponent(`${key}=${value}`)}` }, `${key}=${value}`))));
    // Before its first release there is none to speak of.
    const all = (detail.history ?? []).filter((one) => one.sequence !== null || one.version !== null).reverse();
    put(updates, all.length ? h("ol", { class: "updates" }, all.map(update)) : h("p", { class: "muted" }, "No update since the broker started."));
    const json = (title, value) => value && h("details", { class: "card" }, h("summary", {}, title), h("pre", { tabindex: 0 }, JSON.stringify(value, null, 2)));
    const opened = [...raw.children].map((one) => one.open);
    put(raw, json("info, as it says it", detail.info), json("state, as it says it", detail.state));
    [...raw.children].forEach((one, at) => (one.open = opened[at] ?? false));
  }

  function drawLog(always) {
    const isAtEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 24;
    const all = fleet.log?.lines ?? [];
    put(lines, all.length ? all.map(({ at, text }) => h("div", {}, h("time", { datetime: at, title: at }, clock(at)), h("span", {}, text)))
      : h("p", { class: "muted" }, "It has not said anything since the broker started."));
    if (always || isAtEnd) lines.scrollTop = lines.scrollHeight;
  }

  fleet.stream?.follow(name);
  read();
  const listen = (changed) => {
    if (changed.has("resync")) return read();
    if (changed.has("log") && fleet.log?.node === name) drawLog(false);
    if (!changed.has(`node ${name}`) || !row) return;
    const newer = fleet.passing.find((one) => one.node === name) ?? fleet.nodes?.get(name);
    if (newer) {
      row = { ...row, ...newer };
      drawNow();
    }
    // Its history is the broker's to tell.
    timer ??= setTimeout(read, 400);
  };
  listen.gone = () => {
    abort.abort();
    clearTimeout(timer);
    fleet.log = null;
    fleet.stream?.follow(null);
  };
  return listen;
}

/** One update, from its first step to its end. */
function update(one) {
  const steps = one.steps ?? [];
  const began = Date.parse(one.began);
  const ended = one.ended ? Date.parse(one.ended) : Date.now();
  const whole = Math.max(1, ended - began);
  const spans = steps.map(({ phase, at }, n) => {
    const from = Date.parse(at);
    const to = n + 1 < steps.length ? Date.parse(steps[n + 1].at) : ended;
    return { phase, took: Math.max(0, to - from) };
  }).filter(({ phase }) => !["idle", "failed", "rolled_back"].includes(phase));
  const text = spans.map(({ phase, took }) => `${phaseWord(phase)} ${duration(took)}`).join(", ");
  const track = h("div", { class: "track", role: "img", "aria-label": text || "no steps", title: text });
  for (const { phase, took } of spans) {
    const part = h("span", { "data-phase": phase });
    part.style.flexGrow = String(Math.max(took, whole / 60));
    track.append(part);
  }
  return h("li", { "data-phase": one.phase },
    h("div", { class: "update-head" }, h("b", {}, release(one.version, one.sequence)), badge(one.ended ? one.phase : steps.at(-1)?.phase ?? one.phase, one.ended && one.phase === "idle" ? "installed" : undefined),
      h("span", { class: "muted" }, one.attempt > 1 && `${one.attempt} attempts, `, one.total > 0 && `${bytes(one.total)}, `, one.ended ? duration(whole) : "under way"), when(one.began)),
    spans.length > 0 && track,
    one.error && h("p", { class: "reason" }, one.error));
}

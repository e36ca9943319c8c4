// Elements and texts. Whatever a device or a release says of itself becomes a text node or an attribute's value here, never markup:
// nothing on this page is ever parsed as HTML.

/** An element: `props` are attributes, or listeners where they start with `on`; strings among the children are texts. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG. */
export function s(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) add(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

/** Replaces what is in an element. */
export function put(element, ...children) {
  element.replaceChildren();
  add(element, children);
  return element;
}

/** Sets a text only if it is another one. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets an attribute only if it has another value. */
export function set(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

const NUMBER = new Intl.NumberFormat("en");
const SIZES = ["B", "KiB", "MiB", "GiB"];

export const number = (value) => (value === null || value === undefined ? "–" : NUMBER.format(value));

/** `3 nodes`, `1 node`. */
export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  let at = 0;
  while (value >= 1024 && at + 1 < SIZES.length) {
    value /= 1024;
    at += 1;
  }
  return `${at === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${SIZES[at]}`;
}

/** Part of a whole. What is not all is never told as 100 %, what is not nothing never as 0 %. */
export function percent(part, whole) {
  if (!whole) return "–";
  const share = (part / whole) * 100;
  if (share > 0 && share < 1) return "<1 %";
  if (share > 99 && share < 100) return ">99 %";
  return `${Math.round(share)} %`;
}

/** `2.5 s`, `3 min`. */
export function duration(ms) {
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < 10_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 120_000) return `${Math.round(ms / 1000)} s`;
  if (ms < 7_200_000) return `${Math.round(ms / 60_000)} min`;
  if (ms < 172_800_000) return `${Math.round(ms / 3_600_000)} h`;
  return `${Math.round(ms / 86_400_000)} d`;
}

/** A time of today. */
export const clock = (time) => new Date(time).toLocaleTimeString([], { hourCycle: "h23" });

/** How long ago that was. */
export function ago(time, now = Date.now()) {
  if (!time) return "–";
  const past = now - Date.parse(time);
  if (Number.isNaN(past)) return "–";
  if (past < 0) return `in ${duration(-past)}`;
  return past < 2000 ? "now" : `${duration(past).replace(/^(\d+)\.\d+ s$/, "$1 s")} ago`;
}

/** A time that says how long ago it was, and keeps saying so. */
export function when(time) {
  if (!time) return h("span", { class: "muted" }, "–");
  return h("time", { datetime: time, title: new Date(time).toLocaleString(), "data-ago": true }, ago(time));
}

setInterval(() => {
  const now = Date.now();
  for (const element of document.querySelectorAll("time[data-ago]")) say(element, ago(element.dateTime, now));
}, 5000);

/** A release as people know it. */
export const release = (version, sequence) => {
  if (version === null || version === undefined) return sequence ? `release ${sequence}` : "–";
  return sequence === null || sequence === undefined ? version : `${version} (${sequence})`;
};

export const PHASES = [
  "idle", "downloading", "verifying", "installing", "restarting", "confirming", "failed", "rolled_back", "unknown",
];
export const BUSY = ["downloading", "verifying", "installing", "restarting", "confirming"];
const WORDS = { rolled_back: "rolled back", unknown: "not heard" };
export const phaseWord = (phase) => WORDS[phase] ?? phase;

const path = (d) => ["path", { d }];
const ICONS = {
  overview: [path("M4 13h6V4H4zM14 20h6v-9h-6zM4 20h6v-3H4zM14 7h6V4h-6z")],
  channels: [path("M12 3 4 7l8 4 8-4zM4 12l8 4 8-4M4 17l8 4 8-4")],
  nodes: [path("M8 8h8v8H8zM10 4v4M14 4v4M10 16v4M14 16v4M4 10h4M4 14h4M16 10h4M16 14h4")],
  rollouts: [path("M4 19h4v-4h4v-4h4V7h4M15 4l5 3-3 5")],
  packages: [path("M12 3 4.500 7v10L12 21l7.500-4V7zM4.500 7l7.500 4 7.500-4M12 11v10")],
  light: [["circle", { cx: 12, cy: 12, r: 4 }], path("M12 3v2M12 19v2M3 12h2M19 12h2M5.600 5.600 7 7M17 17l1.400 1.400M5.600 18.400 7 17M17 7l1.400-1.400")],
  dark: [path("M20 14.500A8.500 8.500 0 0 1 9.500 4a8.500 8.500 0 1 0 10.500 10.500z")],
  auto: [["circle", { cx: 12, cy: 12, r: 8 }], path("M12 4v16M12 8l4-2M12 12l7.500-3M12 16l7.500-3M12 20l5-3")],
};

/** A picture that says nothing a word beside it does not. */
export function icon(name) {
  const shapes = ICONS[name].map(([tag, props]) => s(tag, props));
  return s("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" }, shapes);
}

let fading;

/** Says something in passing. */
export function toast(text, kind = "good") {
  const element = document.getElementById("toast");
  element.dataset.kind = kind;
  element.textContent = text;
  element.classList.add("is-shown");
  clearTimeout(fading);
  fading = setTimeout(() => element.classList.remove("is-shown"), kind === "bad" ? 8000 : 4000);
}

// The fleet over time: what is at each moment, one part above the other.

import { clock, h, number, phaseWord, put, s } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 220;

/**
 * `samples` are `{ at, parts: [[key, count]] }`, oldest first, each as it was until the next; `keys` are in their order from the
 * bottom, with `{ key, name, phase }`, where the phase gives the colour, or `hue` does.
 */
export function timeline(samples, keys, now) {
  const element = h("figure", { class: "timeline" });
  const times = samples.map((sample) => Date.parse(sample.at));
  const first = times[0];
  const last = Math.max(now, times.at(-1), first + 60_000);
  const most = Math.max(1, ...samples.map((sample) => sample.parts.reduce((sum, [, many]) => sum + many, 0)));
  const x = (time) => ((time - first) / (last - first)) * WIDTH;
  const y = (many) => HEIGHT - (many / most) * HEIGHT;
  const below = samples.map(() => 0);
  const areas = keys.map(({ key, phase, hue }) => {
    let top = "";
    const bottom = [];
    samples.forEach((sample, at) => {
      const many = sample.parts.find(([other]) => other === key)?.[1] ?? 0;
      const [from, to] = [x(times[at]), x(times[at + 1] ?? last)];
      const [low, high] = [y(below[at]), y(below[at] + many)];
      top += `L${from.toFixed(1)} ${high.toFixed(1)}H${to.toFixed(1)}`;
      bottom.push(`L${to.toFixed(1)} ${low.toFixed(1)}H${from.toFixed(1)}`);
      below[at] += many;
    });
    const d = `M${x(first)} ${HEIGHT}${top}${bottom.reverse().join("")}Z`;
    return s("path", { d, "data-phase": phase, "data-hue": hue });
  });
  const cursor = s("line", { class: "cursor", y1: 0, y2: HEIGHT, x1: -1, x2: -1, "vector-effect": "non-scaling-stroke" });
  const chart = s("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `The fleet from ${clock(first)} to ${clock(last)}; now: ${describe(samples.at(-1), keys)}`,
  }, [0.25, 0.5, 0.75].map((part) => s("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT * part, y2: HEIGHT * part, "vector-effect": "non-scaling-stroke" })), areas, cursor);
  const tip = h("div", { class: "tip", "aria-hidden": "true" });
  const stage = h("div", { class: "stage" }, h("span", { class: "axis-top" }, number(most)), chart, tip);
  stage.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const time = first + share * (last - first);
    let at = times.findLastIndex((other) => other <= time);
    if (at < 0) at = 0;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, String(share * WIDTH));
    put(tip, h("b", {}, clock(time)), keys.map(({ key, name, phase, hue }) => {
      const many = samples[at].parts.find(([other]) => other === key)?.[1] ?? 0;
      return many > 0 && h("span", {}, h("span", { class: "dot", "data-phase": phase, "data-hue": hue }), `${name} ${number(many)}`);
    }));
    tip.style.left = `${share * 100}%`;
    tip.dataset.side = share > 0.6 ? "left" : "right";
    stage.classList.add("is-read");
  });
  stage.addEventListener("pointerleave", () => stage.classList.remove("is-read"));
  element.append(stage, h("div", { class: "axis" }, [0, 0.25, 0.5, 0.75].map((part) => h("span", {}, clock(first + part * (last - first)).slice(0, last - first > 600_000 ? 5 : 8))), h("span", {}, "now")));
  return element;
}

function describe(sample, keys) {
  const parts = keys.map(({ key, name }) => [name, sample.parts.find(([other]) => other === key)?.[1] ?? 0]);
  return parts.filter(([, many]) => many > 0).map(([name, many]) => `${number(many)} ${name}`).join(", ") || "nothing";
}

export const phaseKeys = (phases) => phases.map((phase) => ({ key: phase, name: phaseWord(phase), phase }));

// Rollouts: how far they are, how it goes, and the button that stops them.

import { post } from "./api.js";
import { count, duration, h, number, put, release, toast } from "./dom.js";
import { fleet } from "./fleet.js";
import { ask, bar, command, empty, loading } from "./parts.js";

const WORDS = { "rolling-back": "rolling back", "rolled-back": "rolled back" };
const KINDS = { running: "busy", paused: "warn", "rolling-back": "bad", done: "good", "rolled-back": "bad", superseded: "" };
/** Which count is shown in the colour of which phase, and how it is called. */
const COUNTS = [
  ["succeeded", "idle", "succeeded"], ["pending", "downloading", "under way"], ["waiting", "confirming", "wait for an order"],
  ["failed", "failed", "failed"], ["rolled_back", "rolled_back", "rolled back"], ["silent", "unknown", "fell silent"],
];

export function rollouts(view) {
  const place = h("div", { class: "stack" }, loading());
  put(view, h("h1", {}, "Rollouts"), place);
  function draw() {
    if (!fleet.rollouts) return;
    put(place, fleet.rollouts.length ? fleet.rollouts.map((one) => rolloutCard(one)) : empty("No rollout yet",
      "A release can go to few devices first, and to more as long as it goes well. It pauses by itself when too many fail.",
      command("mpypi rollout channels/dev --steps 1%,10%,50%,100% --wait 10m --max-failures 2%")));
  }
  draw();
  return (changed) => (changed.has("rollouts") || changed.has("me")) && draw();
}

/** One rollout. */
export function rolloutCard(one, heading = "h2") {
  const { counts } = one;
  const parts = COUNTS.map(([key, phase]) => [phase, counts?.[key] ?? 0]);
  const told = COUNTS.filter(([key]) => counts?.[key] > 0);
  const isOver = ["done", "rolled-back", "superseded"].includes(one.status);
  return h("section", { class: "card rollout", "data-status": one.status },
    h("div", { class: "card-head" },
      h(heading, {}, h("a", { class: "chip", href: `#/channels/${encodeURIComponent(one.channel)}` }, one.channel), release(one.version, one.sequence)),
      h("span", { class: "status", "data-kind": KINDS[one.status] ?? "" }, WORDS[one.status] ?? one.status)),
    one.reason && h("p", { class: "reason" }, one.reason),
    h("ol", { class: "steps", "aria-label": "Steps" }, one.steps.map((step, at) => {
      const state = at < one.step || one.status === "done" ? "past" : at === one.step && !isOver ? "now" : at === one.step ? "last" : "next";
      return h("li", { "data-state": state, "aria-current": state === "now" ? "step" : null }, `${step} %`);
    })),
    counts && [
      bar(parts, Math.max(1, counts.nodes), "Of those whose turn it is"),
      h("ul", { class: "legend" }, told.map(([key, phase, name]) => h("li", {}, h("span", { class: "dot", "data-phase": phase }), `${name} `, h("b", {}, number(counts[key])))),
        h("li", { class: "muted" }, `of ${count(counts.nodes, "node")} whose turn it is`)),
    ],
    h("dl", { class: "facts inline" },
      fact("Between steps", duration(one.wait * 1000)), fact("Pauses above", `${one.max_failures} % failed`), one.min_success && fact("Goes on from", `${one.min_success} % succeeded`),
      fact("On failure", one.on_failure === "roll-back" ? "puts the release before back" : "pauses"),
      one.only && fact("Only", h("code", {}, one.only)), one.window && fact("Window", one.window), one.jitter ? fact("Jitter", duration(one.jitter * 1000)) : null,
      one.base && fact("Others keep", `release ${one.base}`)),
    !isOver && actions(one));
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function actions(one) {
  if (fleet.me && !fleet.me.may.order) return null;
  const order = (name, word) => h("button", {
    type: "button", class: name === "abort" ? "danger-quiet" : name === "pause" ? "strong" : "",
    async onclick(event) {
      if (name === "abort" && !(await ask(`Abort the rollout on ${one.channel}?`, "The release before is put back, also on devices that have this one.", "Abort"))) return;
      const button = event.target;
      button.disabled = true;
      try {
        await post(`api/channels/${encodeURIComponent(one.channel)}/rollout`, { order: name });
        toast(`${word}: asked for`);
      } catch (error) {
        toast(error.hint ? `${error.message}: ${error.hint}` : error.message, "bad");
        button.disabled = false;
      }
    },
  }, word);
  return h("div", { class: "actions" },
    one.steered && one.status === "running" && order("pause", "Pause"),
    one.steered && one.status === "paused" && order("resume", "Resume"),
    one.steered && ["running", "paused"].includes(one.status) && order("abort", "Abort"),
    !one.steered && h("p", { class: "muted" }, "Nobody steers it now: ", one.status === "paused"
      ? [h("code", {}, `mpypi rollout resume ${one.channel}`), " goes on with it, ", h("code", {}, `mpypi rollout abort ${one.channel}`), " puts the release before back."]
      : ["run ", h("code", {}, "mpypi rollout"), " again, and it goes on."]));
}

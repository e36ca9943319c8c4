// The fleet at a glance.

import { phaseKeys, timeline } from "./chart.js";
import { PHASES, count, h, number, percent, put, release, say, when } from "./dom.js";
import { busy, fleet } from "./fleet.js";
import { badge, bar, card, command, empty, legend, loading, phaseParts, tile, trouble } from "./parts.js";
import { rolloutCard } from "./rollouts.js";

/** Releases that are told apart in the chart; the others are one. */
const HUES = 6;

export function overview(view) {
  const tiles = {
    nodes: tile("Nodes", "#/nodes"),
    current: tile("Up to date", "#/nodes?behind=false"),
    busy: tile("Updating", "#/nodes?phase=busy"),
    failed: tile("Failed", "#/nodes?phase=failed,rolled_back"),
  };
  const chart = h("div", { class: "chart-place" }, loading(4));
  const key = h("div", {});
  let by = "phases";
  const choice = h("div", { class: "choice", role: "group", "aria-label": "Colours show" }, ["phases", "releases"].map((name) =>
    h("button", {
      type: "button", "aria-pressed": String(name === by),
      onclick(event) {
        by = name;
        for (const button of choice.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
        drawChart();
      },
    }, name === "phases" ? "Phases" : "Releases")));
  const releases = h("div", { class: "rows" });
  const failures = h("div", { class: "rows" });
  const passing = h("ol", { class: "passing" });
  const rolling = h("div", { class: "stack" });
  const failuresCard = card("Why it failed", { hidden: true }, failures);
  const body = h("div", { class: "stack" },
    h("div", { class: "tiles" }, Object.values(tiles).map((one) => one.element)),
    rolling,
    h("section", { class: "card" }, h("div", { class: "card-head" }, h("h2", {}, "Fleet over time"), choice), chart, key),
    h("div", { class: "columns" },
      h("div", { class: "stack" }, card("Releases", {}, releases), failuresCard),
      card("Passing by", {}, passing)));
  const place = h("div", {}, loading(6));
  put(view, h("h1", {}, "Overview"), place);

  function draw() {
    const now = fleet.overview;
    if (now instanceof Error) return put(place, trouble(now));
    if (!now) return;
    if (now.nodes === 0 && fleet.channels?.length === 0) return put(place, welcome());
    if (place.firstChild !== body) put(place, body);
    const failed = now.phases.failed + now.phases.rolled_back;
    tiles.nodes.set(number(now.nodes), now.offline ? `${number(now.online)} online, ${number(now.offline)} not` : `${number(now.online)} online`);
    const current = upToDate(now);
    tiles.current.set(percent(current, now.nodes), current < now.nodes ? `${number(now.nodes - current)} not` : "", current === now.nodes ? "good" : "");
    tiles.busy.set(number(busy(now.phases)), busy(now.phases) ? "right now" : "", busy(now.phases) ? "busy" : "");
    tiles.failed.set(number(failed), failed ? percent(failed, now.nodes) : "", failed ? "bad" : "");
    put(releases, now.releases.length ? now.releases.map((one) => releaseRow(one, now.nodes)) : empty("No node yet", "Start one, and it shows here by itself.", command("mpypi-agent run --channel dev")));
    failuresCard.hidden = now.failures.length === 0;
    put(failures, now.failures.map((one) => h("a", { class: "row-link", href: `#/nodes?reason=${encodeURIComponent(one.reason)}` },
      h("span", { class: "mono" }, one.reason), h("b", {}, number(one.nodes)))));
    drawChart();
    // For whoever measures how fast this is.
    if (!performance.getEntriesByName("mpypi-overview").length) performance.mark("mpypi-overview");
  }

  function drawChart() {
    const samples = fleet.samples;
    if (!samples.length) return;
    if (by === "phases") {
      const seen = PHASES.filter((phase) => samples.some((sample) => sample.phases[phase] > 0));
      const parts = samples.map(({ at, phases }) => ({ at, parts: phaseParts(phases) }));
      put(chart, timeline(parts, phaseKeys(seen), Date.now()));
      put(key, legend(phaseParts(fleet.overview.phases ?? {})));
    } else {
      const name = (one) => (one.channel ? `${one.channel} ${release(one.version, one.sequence)}` : "nothing, or other releases");
      const names = [];
      for (const sample of samples.toReversed()) for (const one of sample.releases) if (!names.includes(name(one))) names.push(name(one));
      const told = names.slice(0, HUES);
      const rest = names.length > HUES ? "others" : null;
      const keys = [...told, ...(rest ? [rest] : [])].map((name, hue) => ({ key: name, name, hue: String(hue) }));
      const parts = samples.map(({ at, releases }) => {
        const many = new Map();
        for (const one of releases) {
          const at = told.includes(name(one)) ? name(one) : rest;
          many.set(at, (many.get(at) ?? 0) + one.nodes);
        }
        return { at, parts: [...many] };
      });
      put(chart, timeline(parts, keys, Date.now()));
      const now = new Map(parts.at(-1).parts);
      put(key, h("ul", { class: "legend" }, keys.map(({ key, hue }) => now.get(key) > 0 && h("li", {}, h("span", { class: "dot", "data-hue": hue }), `${key} `, h("b", {}, number(now.get(key)))))));
    }
  }

  function drawPassing() {
    put(passing, fleet.passing.length
      ? fleet.passing.map((row) => h("li", {}, h("a", { href: `#/nodes/${encodeURIComponent(row.node)}` }, row.node), badge(row.phase), h("span", { class: "muted" }, release(row.version, row.sequence)), when(row.changed)))
      : h("li", { class: "muted" }, "Nothing has changed since you came."));
  }

  function drawRollouts() {
    const running = (fleet.rollouts ?? []).filter((one) => ["running", "paused", "rolling-back"].includes(one.status));
    put(rolling, running.map((one) => rolloutCard(one, "h2")));
  }

  draw();
  drawPassing();
  drawRollouts();
  return (changed) => {
    if (changed.has("overview") || changed.has("channels")) draw();
    if (changed.has("passing")) drawPassing();
    if (changed.has("rollouts")) drawRollouts();
  };
}

/** How many nodes run what their channel has now. */
function upToDate({ releases }) {
  const newest = new Map((fleet.channels ?? []).map((one) => [one.channel, one.sequence]));
  const are = releases.filter((one) => one.sequence !== null && newest.get(one.channel) === one.sequence);
  return are.reduce((sum, { phases }) => sum + (phases.idle ?? 0) + (phases.confirming ?? 0), 0);
}

function releaseRow(one, nodes) {
  const title = one.channel ? release(one.version, one.sequence) : one.version === "other" ? "other releases" : "nothing installed";
  const filter = one.channel && one.sequence ? `?channel=${encodeURIComponent(one.channel)}&release=${one.sequence}` : "";
  return h("a", { class: "release-row", href: `#/nodes${filter}` },
    h("span", { class: "release-name" }, one.channel && h("span", { class: "chip" }, one.channel), title),
    bar(phaseParts(one.phases ?? {}), nodes, title),
    h("span", { class: "release-count" }, number(one.nodes)));
}

/** What somebody sees who has just started. */
function welcome() {
  return h("div", { class: "card welcome" },
    h("h2", {}, "An empty index, ready for its first release"),
    h("p", {}, "A channel is a folder: publish one, and devices that follow it fetch what changed, verify it and apply it."),
    h("ol", { class: "steps-list" },
      h("li", {}, h("h3", {}, "Publish a folder"), command("mpypi publish channels/dev"), h("p", { class: "muted" }, "In a clone of mpypi, the example that comes with it: ", h("code", {}, "make publish CHANNEL=dev"))),
      h("li", {}, h("h3", {}, "Start a device"), command("mpypi-agent run --channel dev --node device-1"), h("p", { class: "muted" }, "A simulated one; on a board with MicroPython, ", h("code", {}, `mpypi.run(server="mqtt://${location.hostname}", channel="dev")`))),
      h("li", {}, h("h3", {}, "Watch it here"), h("p", { class: "muted" }, "This page is live: no need to load it again."))));
}

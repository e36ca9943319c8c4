// Channels: what is in them, what changed, and who signed it.

import { get } from "./api.js";
import { bytes, count, h, number, put, release, when } from "./dom.js";
import { fleet } from "./fleet.js";
import { card, command, digest, empty, loading, saver, table, trouble } from "./parts.js";

export function channels(view) {
  const place = h("div", {}, loading());
  put(view, h("h1", {}, "Channels"), place);
  function draw() {
    const all = fleet.channels;
    if (!all) return;
    if (!all.length) {
      return put(place, h("div", { class: "card" }, empty("No channel yet", "A channel is a folder. It is there as soon as something is published to it.",
        command("mpypi publish channels/dev"), h("p", { class: "muted" }, "or, in a clone of mpypi, ", h("code", {}, "make publish CHANNEL=dev")))));
    }
    put(place, h("div", { class: "cards" }, all.map((one) => h("a", { class: "card channel", href: at(one.channel) },
      h("div", { class: "card-head" }, h("h2", {}, one.channel), signed(one)),
      h("p", { class: "big" }, release(one.version, one.sequence)),
      h("p", { class: "muted" }, count(one.packages, "package"), ", ", bytes(one.size), one.created && [", ", when(one.created)]),
      h("p", { class: "muted" }, count(one.nodes, "node"), one.nodes === 1 ? " follows it" : " follow it")))));
  }
  draw();
  return (changed) => changed.has("channels") && draw();
}

const at = (channel, sequence) => `#/channels/${encodeURIComponent(channel)}${sequence === undefined || sequence === null ? "" : `/${sequence}`}`;

function signed(one) {
  if (one.signed_by) return h("span", { class: "status", "data-kind": "good" }, `signed by ${one.signed_by}`);
  return h("span", { class: "status" }, one.keys?.length ? "not signed yet" : "not signed");
}

/** One channel, or one of the releases that it had. */
export function channel(view, [name, sequence]) {
  const head = h("div", { class: "head" }, h("h1", {}, h("a", { href: "#/channels", class: "up" }, "Channels"), name));
  const place = h("div", { class: "stack" }, loading(6));
  put(view, head, place);
  const abort = new AbortController();
  let shown;

  async function draw() {
    const path = `api/channels/${encodeURIComponent(name)}`;
    try {
      const [{ releases }, one] = await Promise.all([
        get(`${path}/releases`, abort.signal),
        get(sequence ? `${path}/releases/${encodeURIComponent(sequence)}` : path, abort.signal),
      ]);
      const from = before(releases, one);
      const diff = one.sequence === null ? null : await get(`${path}/diff?from=${from}&to=${one.sequence}`, abort.signal).catch((error) => {
        if (error.name === "AbortError") throw error;
        return null;
      });
      if (abort.signal.aborted) return;
      shown = one.digest;
      put(place, summary(one, releases), diff && changes(diff), contents(one), history(name, releases, one));
    } catch (error) {
      if (error.name !== "AbortError") put(place, trouble(error, draw));
    }
  }
  draw();
  const listen = (changed) => {
    const now = fleet.channels?.find((one) => one.channel === name);
    if (changed.has("channels") && !sequence && now && now.digest !== shown) draw();
  };
  listen.gone = () => abort.abort();
  return listen;
}

/** What a release came after, as far as the history knows; 0 for nothing. */
function before(releases, one) {
  const earlier = releases.filter((other) => other.sequence !== null && other.sequence !== one.sequence && (other.epoch ?? 0) <= (one.epoch ?? 0));
  const chain = earlier.find((other) => other.digest && other.digest === one.previous);
  return (chain ?? earlier.find((other) => other.sequence < one.sequence))?.sequence ?? 0;
}

const fact = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function summary(one, releases) {
  const present = releases.find((other) => other.present) ?? releases[0];
  const isPresent = !present || present.sequence === one.sequence;
  return h("section", { class: "card" },
    h("div", { class: "card-head" }, h("h2", { class: "big" }, release(one.version, one.sequence)), signed(one)),
    !isPresent && h("p", {}, "This is what the channel had. Now it has ", h("a", { href: at(one.channel) }, release(present.version, present.sequence)), "."),
    h("dl", { class: "facts" },
      fact("Packages", number(one.packages), ", ", bytes(one.size)), fact("Made", when(one.created)), fact("Believed until", one.expires ? new Date(one.expires).toLocaleDateString() : h("span", { class: "muted" }, "for ever")),
      one.nodes !== undefined && fact("Followed by", h("a", { href: `#/nodes?channel=${encodeURIComponent(one.channel)}` }, count(one.nodes, "node"))),
      fact("May sign", one.keys?.length ? one.keys.join(", ") : one.keys ? "anybody: the channel has no keys" : one.signed_by ?? "–"),
      fact("Digest", digest(one.digest)), one.revoked?.length > 0 && fact("Revoked", one.revoked.join(", ")),
      one.rollout && fact("Rollout", h("a", { href: "#/rollouts" }, `${one.rollout.percent} % of the nodes`))));
}

function changes(diff) {
  const rows = [
    ...diff.added.map((entry) => ["added", "+", entry, null]),
    ...diff.changed.map((one) => ["changed", "~", one.to, one.from]),
    ...diff.removed.map((entry) => ["removed", "−", entry, null]),
  ];
  const title = diff.from ? `Since release ${diff.from}` : "New, all of it";
  if (!rows.length) return card(title, { class: "card diff" }, h("p", { class: "muted" }, "The same packages: nothing to fetch."));
  return card(title, { class: "card diff" },
    h("p", { class: "muted" }, `${bytes(diff.bytes)} to fetch for who had it; ${count(diff.unchanged, "package")} as before.`),
    h("ul", { class: "diff-list" }, rows.slice(0, 500).map(([kind, sign, entry, from]) => h("li", { "data-kind": kind },
      h("span", { class: "sign", role: "img", "aria-label": kind }, sign), h("span", { class: "mono grow" }, entry.name),
      h("span", { class: "muted" }, from?.version && from.version !== entry.version ? `${from.version} → ${entry.version}` : entry.version ?? ""),
      h("span", { class: "muted num" }, from ? `${bytes(from.size)} → ${bytes(entry.size)}` : bytes(entry.size))))),
    rows.length > 500 && h("p", { class: "muted" }, `and ${number(rows.length - 500)} more`));
}

function contents(one) {
  const entries = one.entries ?? [];
  if (!entries.length) return card("Contents", {}, h("p", { class: "muted" }, "Nothing: devices that follow it remove what they got from it."));
  return card("Contents", {}, table("Contents", [
    { name: "Kind", cell: (entry) => h("span", { class: "kind", "data-kind": entry.kind }, entry.kind) },
    { name: "Name", class: "grow mono", cell: (entry) => [entry.name, entry.optional && h("span", { class: "chip" }, "optional")] },
    { name: "Version", cell: (entry) => entry.version ?? "" },
    { name: "For", cell: (entry) => entry.target ?? entry.tag ?? "" },
    { name: "Size", class: "num", cell: (entry) => bytes(entry.size) },
    { name: "Digest", cell: (entry) => digest(entry.digest) },
    { name: "", label: "Download", cell: saver },
  ], entries));
}

function history(name, releases, one) {
  return card("Releases", {}, table("Releases", [
    { name: "Release", class: "grow", cell: (other) => h("a", { href: at(name, other.present ? null : other.sequence), "aria-current": other.sequence === one.sequence ? "true" : null }, release(other.version, other.sequence)) },
    { name: "Made", cell: (other) => when(other.created) },
    { name: "Packages", class: "num", cell: (other) => number(other.packages) },
    { name: "Size", class: "num", cell: (other) => bytes(other.size) },
    { name: "Signed by", cell: (other) => other.signed_by ?? h("span", { class: "muted" }, "nobody") },
    { name: "Digest", cell: (other) => digest(other.digest) },
  ], releases));
}

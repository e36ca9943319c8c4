// Every package that a channel has now.

import { get, query } from "./api.js";
import { bytes, count, h, put, say } from "./dom.js";
import { fleet } from "./fleet.js";
import { command, digest, empty, loading, saver, table, trouble } from "./parts.js";

const PAGE = 200;

export function packages(view, _, parameters) {
  const wanted = { q: parameters.get("q") ?? "", kind: parameters.get("kind") ?? "" };
  const tally = h("p", { class: "muted tally", role: "status" });
  const search = h("input", { type: "search", id: "search", placeholder: "Search packages…", "aria-label": "Search packages", autocomplete: "off", spellcheck: "false", value: wanted.q, oninput: (event) => change({ q: event.target.value }) });
  const kind = h("select", { "aria-label": "Kind", onchange: (event) => change({ kind: event.target.value }) },
    [["", "Any kind"], ["wheel", "wheels"], ["src", "files"], ["firmware", "firmware"]].map(([value, name]) => h("option", { value }, name)));
  kind.value = wanted.kind;
  const place = h("div", { class: "card" }, loading());
  put(view, h("div", { class: "head" }, h("h1", {}, "Packages"), tally), h("div", { class: "filters", role: "search" }, search, kind), place);
  let abort = new AbortController();
  let timer;
  let shown = PAGE;

  function change(what) {
    Object.assign(wanted, what);
    shown = PAGE;
    const all = Object.entries(wanted).filter(([, value]) => value);
    history.replaceState(null, "", `#/packages${all.length ? `?${new URLSearchParams(all)}` : ""}`);
    clearTimeout(timer);
    timer = setTimeout(draw, 150);
  }

  async function draw() {
    abort.abort();
    abort = new AbortController();
    try {
      const { total, packages } = await get(query("api/packages", { ...wanted, limit: shown }), abort.signal);
      say(tally, count(total, "package"));
      if (!total) {
        return put(place, wanted.q || wanted.kind ? empty("No such package", "No channel has one like that.")
          : empty("No package yet", "Files, wheels and firmware show here as soon as a channel has them.", command("mpypi publish channels/dev")));
      }
      put(place, table("Packages", [
        { name: "Kind", cell: (entry) => h("span", { class: "kind", "data-kind": entry.kind }, entry.kind) },
        { name: "Name", class: "grow mono", cell: (entry) => entry.name },
        { name: "Version", cell: (entry) => entry.version ?? "" },
        { name: "For", cell: (entry) => entry.target ?? entry.tag ?? "" },
        { name: "Size", class: "num", cell: (entry) => bytes(entry.size) },
        { name: "Channels", cell: (entry) => entry.channels.map((name) => h("a", { class: "chip", href: `#/channels/${encodeURIComponent(name)}` }, name)) },
        { name: "Digest", cell: (entry) => digest(entry.digest) },
        { name: "", label: "Download", cell: saver },
      ], packages), packages.length < total && h("button", {
        type: "button", onclick: () => {
          shown = Math.min(shown + PAGE, 1000);
          draw();
        },
      }, "Show more"));
    } catch (error) {
      if (error.name !== "AbortError") put(place, trouble(error, draw));
    }
  }
  draw();
  let known = fleet.channels;
  const listen = (changed) => {
    if (!changed.has("channels") || known === fleet.channels) return;
    known = fleet.channels;
    clearTimeout(timer);
    timer = setTimeout(draw, 500);
  };
  listen.gone = () => {
    abort.abort();
    clearTimeout(timer);
  };
  listen.search = search;
  return listen;
}

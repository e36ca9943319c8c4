// The page: which view is shown, who is logged in, light or dark, and how the line to the broker is.

import { get, isLoggedIn, logIn, logOut } from "./api.js";
import { channel, channels } from "./channels.js";
import { h, icon, put, say, set } from "./dom.js";
import { fleet } from "./fleet.js";
import { node } from "./node.js";
import { nodes } from "./nodes.js";
import { overview } from "./overview.js";
import { packages } from "./packages.js";
import { trouble } from "./parts.js";
import { rollouts } from "./rollouts.js";

const SECTIONS = [["overview", "Overview", "#/"], ["channels", "Channels", "#/channels"], ["nodes", "Nodes", "#/nodes"], ["rollouts", "Rollouts", "#/rollouts"], ["packages", "Packages", "#/packages"]];
/** By how many levels follow the section's name. */
const VIEWS = { overview: [overview], channels: [channels, channel, channel], nodes: [nodes, node], rollouts: [rollouts], packages: [packages] };

const view = document.getElementById("view");
const live = document.getElementById("live");
const links = SECTIONS.map(([name, title, href]) => h("a", { href, "data-name": name }, icon(name), h("span", {}, title)));
put(document.getElementById("nav"), links);

let shown = null;
let isOut = true;

function show() {
  if (isOut) return;
  shown?.gone?.();
  const [path, search] = location.hash.replace(/^#\/?/, "").split("?");
  const [section, ...rest] = path.split("/").filter(Boolean).map(decoded);
  const name = section ?? "overview";
  const make = VIEWS[name]?.[rest.length];
  links.forEach((link) => set(link, "aria-current", link.dataset.name === name ? "page" : null));
  document.title = [...rest, SECTIONS.find(([one]) => one === name)?.[1], "mpypi"].filter(Boolean).join(" · ");
  shown = null;
  if (make) shown = make(view, rest, new URLSearchParams(search ?? ""));
  else put(view, h("h1", {}, "Not here"), trouble({ status: 404, message: "There is nothing at this address." }));
  view.dataset.view = name + (rest.length ? "-one" : "");
  scrollTo(0, 0);
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

addEventListener("hashchange", () => {
  show();
  // Who walks by keyboard goes on from the new view.
  view.focus({ preventScroll: true });
});

fleet.listen((changed) => {
  if (changed.has("line")) drawLine();
  shown?.(changed);
});

function drawLine() {
  const words = { live: "live", lost: "reconnecting", connecting: "connecting" };
  set(live, "data-line", fleet.line);
  set(live, "title", fleet.problem ?? null);
  say(live, words[fleet.line] ?? fleet.line);
}

// Light, dark, or as the system has it.
const theme = document.getElementById("theme");
const THEMES = ["auto", "light", "dark"];

function drawTheme() {
  const now = document.documentElement.dataset.theme ?? "auto";
  put(theme, icon(now));
  set(theme, "aria-label", `Colours: ${now === "auto" ? "as the system has them" : now}. Change`);
  set(theme, "title", `Colours: ${now}`);
}

theme.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("mpypi-theme", next);
  drawTheme();
});

addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, textarea, dialog");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey || !shown?.search) return;
  event.preventDefault();
  shown.search.focus();
});

// Who is this?
const logout = document.getElementById("logout");
logout.addEventListener("click", () => {
  logOut();
  fleet.stop();
  fleet.clear();
  login();
});

function login(problem) {
  isOut = true;
  shown?.gone?.();
  shown = null;
  fleet.stop();
  logout.hidden = true;
  document.body.classList.add("is-out");
  const name = h("input", { id: "login-name", autocomplete: "username", autocapitalize: "none", spellcheck: "false" });
  const secret = h("input", { id: "login-secret", type: "password", autocomplete: "current-password", required: true });
  put(view, h("form", {
    class: "card login",
    onsubmit(event) {
      event.preventDefault();
      logIn(name.value.trim(), secret.value);
      start();
    },
  }, h("h1", {}, "Log in"), h("p", { class: "muted" }, "This broker has users. A token alone is enough; it stays in this tab."),
    problem && h("p", { class: "reason", role: "alert" }, problem),
    h("label", { for: "login-name" }, "Name"), name, h("label", { for: "login-secret" }, "Password or token"), secret,
    h("button", { class: "strong" }, "Log in"),
    h("p", { class: "muted" }, "A new token: ", h("code", {}, "mpypi-broker user add me --role viewer --token"))));
  name.focus();
}

async function start() {
  try {
    fleet.me = await get("api/me");
  } catch (error) {
    if (error.status !== 401) {
      put(view, trouble(error, start));
      return;
    }
    const wrong = isLoggedIn() ? error.message : undefined;
    logOut();
    return login(wrong);
  }
  isOut = false;
  document.body.classList.remove("is-out");
  logout.hidden = !isLoggedIn();
  set(logout, "title", fleet.me.name ? `You are ${fleet.me.name}, ${fleet.me.role}` : null);
  fleet.onlogin = () => {
    logOut();
    login("You are logged out: your login is no longer good.");
  };
  fleet.start();
  show();
}

drawTheme();
start();

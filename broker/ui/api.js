// The broker's API: questions, orders, and the stream of what changes.

const KEY = "mpypi-login";
/** No byte for so long, in milliseconds: the broker says something every 15 s. */
const SILENCE = 40_000;
/** The first and the longest pause before connecting again, in milliseconds. */
const PAUSES = [500, 15_000];

/** The broker said no. */
export class Refused extends Error {
  constructor(status, detail, hint) {
    super(detail);
    this.status = status;
    this.hint = hint;
  }
}

let login = sessionStorage.getItem(KEY);

/** Whether somebody has logged in here. */
export const isLoggedIn = () => login !== null;

/** Logs in with a token, or a name and a password; what is shown stays in this tab. */
export function logIn(name, secret) {
  const basic = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
  login = name ? `Basic ${basic(`${name}:${secret}`)}` : `Bearer ${secret}`;
  sessionStorage.setItem(KEY, login);
}

export function logOut() {
  login = null;
  sessionStorage.removeItem(KEY);
}

// The browser is not to ask for a password by itself, nor to remember one: this page has a form for it.
const headers = (more) => (login ? { Authorization: login, ...more } : more);

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "omit", cache: "no-cache", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the broker does not answer", "is it running?");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Refused(response.status, problem.detail ?? response.statusText, problem.hint);
}

/** What is at a path of the API. */
export const get = async (path, signal) => (await ask(path, { signal })).json();

/** Orders something. */
export const post = async (path, body) =>
  (await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) })).json();

/** A path with parameters that are not empty. */
export function query(path, parameters) {
  const all = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return all.length ? `${path}?${new URLSearchParams(all)}` : path;
}

/** Saves a package as a file. A link could not say who asks. */
export async function download(digest, name) {
  const blob = await (await ask(`packages/${digest}`)).blob();
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/**
 * Follows what changes, for ever: calls `take` with all events that came at once, and `live` with how the line is. After a break
 * it goes on where it was; if the broker no longer knows what changed since, an event `resync` says so.
 */
export class Stream {
  constructor(take, live) {
    this.take = take;
    this.live = live;
    this.node = null;
    this.last = null;
    this.pause = PAUSES[0];
    this.stopped = false;
    this.run();
  }

  /** Whose log to follow, too. */
  follow(node) {
    if (this.node === node) return;
    this.node = node;
    this.pause = 0;
    this.abort?.abort();
  }

  stop() {
    this.stopped = true;
    this.abort?.abort();
  }

  async run() {
    while (!this.stopped) {
      this.abort = new AbortController();
      try {
        await this.read(this.abort);
        this.live("lost");
      } catch (error) {
        if (error.status === 401) return this.live("login");
        if (!this.stopped && this.pause > 0) this.live("lost", error);
      }
      if (this.stopped) return;
      // Not all at once, when a broker comes back.
      await new Promise((done) => setTimeout(done, this.pause * (0.5 + Math.random() / 2)));
      this.pause = Math.min(Math.max(this.pause * 2, PAUSES[0]), PAUSES[1]);
    }
  }

  async read(abort) {
    const more = this.last === null ? {} : { "Last-Event-ID": this.last };
    const path = query("api/events", { node: this.node });
    const response = await ask(path, { headers: { Accept: "text/event-stream", ...more }, signal: abort.signal });
    this.pause = PAUSES[0];
    this.live("live");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let watch;
    try {
      for (;;) {
        clearTimeout(watch);
        watch = setTimeout(() => abort.abort(), SILENCE);
        const { value, done } = await reader.read();
        if (done) return;
        rest += value;
        const end = rest.lastIndexOf("\n\n");
        if (end < 0) continue;
        const events = rest.slice(0, end).split("\n\n").map(parse).filter(Boolean);
        rest = rest.slice(end + 2);
        const last = events.findLast((event) => event.id);
        if (last) this.last = last.id;
        if (events.length) this.take(events);
      }
    } finally {
      clearTimeout(watch);
    }
  }
}

/** One event of the stream, as the HTML standard (9.2.6) has it, of a broker that ends lines with a line feed. */
export function parse(text) {
  const event = { kind: "message", id: null, data: "" };
  let lines = 0;
  for (const line of text.split("\n")) {
    const at = line.indexOf(":");
    if (at === 0 || line === "") continue;
    const [field, value] = at < 0 ? [line, ""] : [line.slice(0, at), line.slice(at + 1).replace(/^ /, "")];
    if (field === "event") event.kind = value;
    else if (field === "id") event.id = value;
    else if (field === "data") {
      event.data += lines ? `\n${value}` : value;
      lines += 1;
    }
  }
  if (!lines) return event.id ? event : null;
  event.data = JSON.parse(event.data);
  return event;
}

// What this page knows of the fleet: read once, and kept by what the broker says changes. Views ask here, and are told at most
// once a frame that something is different.

import { Stream, get, query } from "./api.js";
import { BUSY } from "./dom.js";

/** Rows of one question. */
const PAGE = 1000;
/** Nodes that this page holds; of a larger fleet it shows what the broker finds. */
export const HELD = 20_000;
/** Changes that are remembered, to be seen passing. */
const PASSING = 12;
/** Lines of a log that are kept. */
const LINES = 500;
/** Samples of the past that are kept. */
const SAMPLES = 2048;

class Fleet {
  constructor() {
    this.clear();
    this.listeners = new Set();
    this.changed = new Set();
  }

  clear() {
    this.me = null;
    this.overview = null;
    this.samples = [];
    this.channels = null;
    this.rollouts = null;
    /** By name, once somebody wants them. */
    this.nodes = null;
    this.total = 0;
    this.complete = false;
    this.passing = [];
    this.log = null;
    this.line = "connecting";
    this.events = 0;
  }

  /** Calls `listener` with a set of what changed: `overview`, `nodes`, `channels`, `rollouts`, `log`, `line`, `resync`. */
  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  tell(...what) {
    const first = this.changed.size === 0;
    for (const one of what) this.changed.add(one);
    if (!first) return;
    // A page that nobody looks at gets no frames.
    if (document.hidden) setTimeout(() => this.flush(), 250);
    else requestAnimationFrame(() => this.flush());
  }

  flush() {
    const changed = this.changed;
    this.changed = new Set();
    for (const listener of [...this.listeners]) listener(changed);
  }

  start() {
    this.stream?.stop();
    this.greeted = false;
    this.stream = new Stream((events) => this.take(events), (line, error) => this.say(line, error));
  }

  stop() {
    this.stream?.stop();
  }

  say(line, error) {
    if (line === "login") return this.onlogin?.();
    this.line = line;
    this.problem = error?.message;
    this.tell("line");
  }

  take(events) {
    for (const { kind, data } of events) {
      this.events += 1;
      switch (kind) {
        case "hello":
          if (!this.greeted) this.refetch();
          this.greeted = true;
          break;
        case "resync":
          this.refetch();
          break;
        case "node":
          this.node(data);
          break;
        case "node-gone":
          if (this.nodes?.delete(data.node)) this.tell("nodes", "rows");
          this.pending?.set(data.node, null);
          break;
        case "channel":
          this.channels = replaced(this.channels, data);
          this.tell("channels");
          break;
        case "rollout":
          this.rollouts = replaced(this.rollouts, data);
          this.tell("rollouts");
          break;
        case "rollout-gone":
          this.rollouts = this.rollouts?.filter((one) => one.channel !== data.channel) ?? null;
          this.tell("rollouts");
          break;
        case "overview":
          this.overview = data;
          this.sample(data);
          this.tell("overview");
          break;
        case "log":
          if (this.log?.node === data.node) {
            this.log.lines.push(data);
            this.log.lines.splice(0, this.log.lines.length - LINES);
            this.tell("log");
          }
          break;
      }
    }
  }

  node(row) {
    const before = this.nodes?.get(row.node);
    this.pending?.set(row.node, row);
    if (this.nodes && (before || this.nodes.size < HELD || this.fits)) {
      this.nodes.set(row.node, row);
      this.tell("nodes", before ? "row" : "rows");
    }
    if (!before || before.phase !== row.phase || before.sequence !== row.sequence) {
      this.passing = [row, ...this.passing.filter((other) => other.node !== row.node)].slice(0, PASSING);
    }
    this.tell(`node ${row.node}`, "passing");
  }

  /** The past goes on with what comes now; the broker's own samples are as far apart. */
  sample(overview) {
    const { at, nodes, online, phases, releases } = overview;
    const last = this.samples.at(-1);
    const sample = { at, nodes, online, phases, releases };
    if (last && this.samples.length > 1 && Date.parse(at) - Date.parse(this.samples.at(-2).at) < 1000 * this.every) {
      this.samples[this.samples.length - 1] = sample;
    } else {
      this.samples.push(sample);
      this.samples.splice(0, this.samples.length - SAMPLES);
    }
  }

  async refetch() {
    this.tell("resync");
    const jobs = [this.readOverview(), this.readChannels(), this.readRollouts()];
    if (this.nodes) jobs.push(this.readNodes(this.asked));
    await Promise.all(jobs.map((job) => job.catch((error) => this.failed(error))));
  }

  failed(error) {
    if (error.status === 401) return this.onlogin?.();
    // Not for this role: the view says so.
    if (error.status !== 403) this.say("lost", error);
  }

  async readOverview() {
    try {
      this.overview = await get("api/overview");
      this.tell("overview");
      const { every, samples } = await get("api/overview/history");
      this.every = every;
      this.samples = samples;
      this.tell("overview");
    } catch (error) {
      this.overview ??= error;
      this.tell("overview");
      throw error;
    }
  }

  async readChannels() {
    this.channels = sorted((await get("api/channels")).channels);
    this.tell("channels");
  }

  async readRollouts() {
    try {
      this.rollouts = sorted((await get("api/rollouts")).rollouts);
    } catch (error) {
      this.rollouts ??= [];
      throw error;
    } finally {
      this.tell("rollouts");
    }
  }

  /** Wants all nodes, or what the broker finds for `asked` if there are too many. */
  async wantNodes() {
    if (this.nodes) return;
    await this.readNodes({}).catch((error) => this.failed(error));
  }

  async readNodes(asked = {}) {
    this.asked = asked;
    const turn = (this.turn = Symbol());
    const began = performance.now();
    // What changes while the pages come is newer than they are.
    this.pending = new Map();
    const found = new Map();
    let total = 0;
    for (let offset = 0; offset < HELD; offset += PAGE) {
      const page = await get(query("api/nodes", { ...asked, offset, limit: PAGE }));
      if (this.turn !== turn) return;
      total = page.total;
      for (const row of page.nodes) found.set(row.node, row);
      for (const [name, row] of this.pending) row ? found.set(name, row) : found.delete(name);
      this.nodes = found;
      this.total = total;
      this.complete = false;
      this.tell("nodes", "rows");
      if (offset + page.nodes.length >= total) break;
    }
    this.fits = total <= HELD;
    this.complete = true;
    performance.measure("mpypi-nodes", { start: began });
    this.pending = null;
    this.tell("nodes", "rows");
  }
}

const sorted = (all) => [...all].sort((one, other) => (one.channel < other.channel ? -1 : 1));
const replaced = (all, one) => sorted([...(all ?? []).filter((other) => other.channel !== one.channel), one]);

/** How many nodes are at something. */
export const busy = (phases) => BUSY.reduce((sum, phase) => sum + (phases[phase] ?? 0), 0);

export const fleet = new Fleet();

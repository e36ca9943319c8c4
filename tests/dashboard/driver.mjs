// A browser that does what it is told: one JSON line each on standard input, `{ "do": NAME, … }`, and one line back, `{ "ok": VALUE }` or
// `{ "error": TEXT }`. Driven by `tests/src/browser.rs`.
//
//   node driver.mjs MODULES BROWSER SCREENSHOTS

import { createRequire } from "node:module";
import path from "node:path";
import readline from "node:readline";

const [modules, executablePath, screenshots] = process.argv.slice(2);
const require = createRequire(path.resolve(modules, "package.json"));
const { chromium } = require("playwright-core");
const axe = require("axe-core");

/** How long something may take to show; only failures wait for it. */
const PATIENCE = 30_000;
const RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
let page;
let complaints = [];

const does = {
  /** A new page, as someone has it who never was here. */
  async open({ url, scheme = "light", width = 1280, height = 860 }) {
    await page?.context().close();
    const context = await browser.newContext({ viewport: { width, height }, colorScheme: scheme, reducedMotion: "reduce" });
    page = await context.newPage();
    page.setDefaultTimeout(PATIENCE);
    complaints = [];
    page.on("pageerror", (error) => complaints.push(`error: ${error.stack}`));
    page.on("dialog", (dialog) => complaints.push(`dialog: ${dialog.message()}`) && dialog.dismiss());
    page.on("console", (message) => {
      // That nobody is logged in is said by the broker, and shown.
      if (message.type() === "error" && !/status of 40[134]|ERR_CONNECTION|ERR_INCOMPLETE/.test(message.text())) complaints.push(`console: ${message.text()}`);
    });
    page.on("request", (request) => {
      if (!request.url().startsWith(new URL(url).origin) && !request.url().startsWith("blob:")) complaints.push(`elsewhere: ${request.url()}`);
    });
    await page.goto(url);
  },
  go: ({ hash }) => page.evaluate((hash) => void (location.hash = hash), hash),
  reload: () => page.reload().then(() => {}),
  /** Waits until an element that matches shows `text`, if one is asked for. */
  see: ({ selector, text }) => page.locator(selector).filter(text === undefined ? { visible: true } : { hasText: text, visible: true }).first().waitFor(),
  /** Waits until nothing that matches shows `text`. */
  miss: ({ selector, text }) => page.waitForFunction(([selector, text]) => ![...document.querySelectorAll(selector)].some((one) => one.checkVisibility() && one.textContent.includes(text)), [selector, text ?? ""]).then(() => {}),
  text: ({ selector }) => page.locator(selector).first().innerText(),
  count: ({ selector }) => page.locator(selector).count(),
  click: ({ selector, text }) => page.locator(selector).filter({ hasText: text ?? "", visible: true }).first().click(),
  type: ({ selector, text }) => page.locator(selector).fill(text),
  choose: ({ selector, value }) => page.locator(selector).selectOption(value).then(() => {}),
  press: ({ key }) => page.keyboard.press(key),
  run: ({ code }) => page.evaluate(`(async () => { ${code} })()`),
  size: ({ width, height }) => page.setViewportSize({ width, height }),
  scheme: ({ scheme }) => page.emulateMedia({ colorScheme: scheme, reducedMotion: "reduce" }),
  screenshot: ({ name }) => page.screenshot({ path: path.join(screenshots, `${name}.png`) }).then(() => {}),
  /** What axe finds, and what does not fit into the width. */
  async judge() {
    // Playwright's own way past the page's policy, which lets nothing in.
    await page.evaluate(axe.source);
    const { violations } = await page.evaluate((values) => axe.run(document, { runOnly: { type: "tag", values } }), RULES);
    const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.target} (${node.failureSummary})`).join("; ")}`);
    const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    return over > 0 ? [...found, `${over} px wider than the screen`] : found;
  },
  complaints: () => complaints,
  version: () => browser.version(),
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  let answer;
  try {
    answer = { ok: (await does[order.do](order)) ?? null };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();

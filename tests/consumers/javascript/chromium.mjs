// node chromium.mjs BROWSER PAGE SCRIPT < arguments.json: calls the script's function in a headless browser that has
// opened the page, and prints its result and the URL of every request as JSON.
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const [executablePath, url, script] = process.argv.slice(2);
const args = ["--disable-gpu", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"];
const browser = await chromium.launch({ executablePath, args });
try {
  const page = await browser.newPage();
  const requests = [];
  page.on("request", (request) => requests.push(request.url()));
  page.on("console", (message) => console.error(message.text()));
  await page.goto(url);
  const call = async ([script, given]) => (await import(script)).default(...given);
  const result = await page.evaluate(call, [script, JSON.parse(readFileSync(0, "utf8"))]);
  console.log(JSON.stringify({ result, requests, version: browser.version() }));
} finally {
  await browser.close();
}

import { readFileSync } from "node:fs";
const [script, ...rest] = process.argv.slice(2);
const { default: run } = await import(script);
const result = await run(...JSON.parse(readFileSync(0, "utf8")));
console.log(JSON.stringify(result));

// node node.mjs SCRIPT < arguments.json: calls the script's function, and prints its result as JSON.
import { readFileSync } from "node:fs";

const { default: run } = await import(process.argv[2]);
const result = await run(...JSON.parse(readFileSync(0, "utf8")));
console.log(JSON.stringify(result));

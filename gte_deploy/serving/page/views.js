// Answers as elements: bars, a number on a scale, a heat map, tokens, and labelled spans.

import { element } from "./dom.js";

const HEAT_LEVELS = 10;
const STRONG_LEVEL = 7; // from here on the ground needs the other colour of text: page.css
const KINDS_OF_LABELS = 6;

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;
export const decimal = (value) => value.toFixed(Math.abs(value) < 10 ? 4 : 2);
export const counted = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** A table with a bar in each row. `rows`: `{ name, value }`; `prose`: the names are texts, and get a place each. */
export function bars(caption, headings, rows, { format = decimal, prose = false } = {}) {
  const isShare = rows.every(({ value }) => value >= 0 && value <= 1);
  const largest = isShare ? 1 : Math.max(...rows.map(({ value }) => Math.abs(value))) || 1;
  const row = ({ name, value }, place) =>
    element(
      "tr",
      {},
      prose ? element("td", { class: "place" }, String(place + 1)) : null,
      element("th", { scope: "row" }, element("div", {}, name)),
      element("td", { class: "track", "aria-hidden": "true" }, bar(value, Math.abs(value) / largest)),
      element("td", { class: "score" }, format(value)),
    );
  const [named, scored] = headings;
  return element(
    "table",
    { class: prose ? "bars prose" : "bars" },
    element("caption", {}, caption),
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        prose ? element("th", { scope: "col", class: "place" }, "#") : null,
        element("th", { scope: "col" }, named),
        element("td", { "aria-hidden": "true" }),
        element("th", { scope: "col", class: "score" }, scored),
      ),
    ),
    element("tbody", {}, ...rows.map(row)),
  );
}

function bar(value, share) {
  const filled = element("div", { "--share": share.toFixed(4), class: value < 0 ? "negative" : null });
  return element("div", {}, filled);
}

/** A large number, and its place between two ends. */
export function measure(value, low, high) {
  const at = (number) => Math.min(1, Math.max(0, (number - low) / (high - low)));
  const zero = at(0);
  const end = at(value);
  return element(
    "div",
    { class: "measure" },
    element("output", {}, decimal(value)),
    element(
      "div",
      { class: "scale", "aria-hidden": "true" },
      element("div", { "--from": Math.min(zero, end).toFixed(4), "--size": Math.abs(end - zero).toFixed(4) }),
    ),
    element(
      "div",
      { class: "ends", "aria-hidden": "true" },
      element("span", {}, String(low)),
      element("span", {}, String(high)),
    ),
  );
}

/** A table of all pairs of texts: the colour shows where a value is between the lowest and the highest. */
export function heatMap(caption, texts, values) {
  const all = values.flat();
  const low = Math.min(...all);
  const high = Math.max(...all);
  const level = (value) => (high > low ? Math.round((HEAT_LEVELS * (value - low)) / (high - low)) : HEAT_LEVELS);
  const cell = (value) =>
    element(
      "td",
      { "--level": level(value), class: level(value) >= STRONG_LEVEL ? "strong" : null },
      value.toFixed(2),
    );
  const row = (text, index) =>
    element(
      "tr",
      {},
      element(
        "th",
        { scope: "row", title: text },
        element("span", { class: "place" }, String(index + 1)),
        element("span", { class: "text" }, text),
      ),
      ...values[index].map(cell),
    );
  const column = (text, index) =>
    element("th", { scope: "col", title: text }, String(index + 1), element("span", { class: "visually-hidden" }, ` ${text}`));
  const table = element(
    "table",
    { class: "heat" },
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, element("td"), ...texts.map(column))),
    element("tbody", {}, ...texts.map(row)),
  );
  const legend = element(
    "div",
    { class: "legend", "aria-hidden": "true" },
    element("span", {}, low.toFixed(2)),
    element("div"),
    element("span", {}, high.toFixed(2)),
  );
  return [element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table), legend];
}

/** Tokens in order: `{ id, text, special }`. */
export function chips(tokens) {
  const chip = ({ id, text, special }) =>
    element(
      "li",
      { class: special ? "special" : null },
      element("span", {}, text),
      element("span", { class: "id" }, element("span", { class: "visually-hidden" }, "id "), String(id)),
    );
  return element("ol", { class: "chips" }, ...tokens.map(chip));
}

/** A text with the spans that have a label: `{ start, end, label, score }`, positions in characters. */
export function tagged(text, spans) {
  const characters = [...text]; // positions count characters, and a string of JavaScript counts UTF-16 units
  const kinds = new Map();
  const parts = [];
  let done = 0;
  for (const { start, end, label, score } of [...spans].sort((a, b) => a.start - b.start)) {
    if (start < done) continue;
    if (!kinds.has(label)) kinds.set(label, kinds.size % KINDS_OF_LABELS);
    parts.push(characters.slice(done, start).join(""));
    const name = element("span", { class: "label" }, label);
    const title = `${label} ${percent(score)}`;
    parts.push(element("mark", { class: `kind-${kinds.get(label)}`, title }, characters.slice(start, end).join(""), name));
    done = end;
  }
  parts.push(characters.slice(done).join(""));
  return element("p", { class: "tagged" }, ...parts);
}

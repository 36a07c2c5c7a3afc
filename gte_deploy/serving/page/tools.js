// The tools: which models answer each, what it sends, and how it shows the answer.

import { element } from "./dom.js";
import { bars, chips, counted, decimal, heatMap, measure, percent, tagged } from "./views.js";

const MOST_TEXTS = 12;

/** The lines of a text that hold something. */
const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** What a token is called: a few have no text of their own. */
const tokenName = (text, id) => (text.trim() ? text : `id ${id}`);

/** A fault of the form, told before anything is sent. */
export class FormError extends Error {}

/**
 * Name of a tool -> what it is:
 *   title, needs   its name, and the models that it needs, with an example for the command line
 *   route          the route that answers it
 *   suits          (model) -> whether a model that has the route gives a sensible answer; missing if all do
 *   request        (values of the form) -> the body of the request
 *   show           (answer, values, { model, post }) -> { summary, content }; `post` asks the same model once more
 *   live           whether it runs while one types
 */
export const TOOLS = {
  "fill-mask": {
    title: "Fill mask",
    needs: "a masked language model: gte-deploy serve ./my-fill-mask-bundle",
    route: "fill-mask",
    request: ({ text, top }) => ({ inputs: text, parameters: { top_k: Number(top) } }),
    show: showMasks,
  },
  rank: {
    title: "Rank",
    needs: "a reranker: gte-deploy serve ./my-reranker-bundle",
    route: "rerank",
    suits: (model) => model.labels.length <= 1,
    request: ({ query, passages, raw }) => {
      const texts = linesOf(passages);
      if (texts.length === 0) throw new FormError("There is no passage; write one a line.");
      return { query, texts, raw_scores: raw };
    },
    show: showRanking,
  },
  similarity: {
    title: "Similarity",
    needs: "an embedding model: gte-deploy serve ./my-embedding-bundle",
    route: "similarity",
    request: ({ first, second, prompt }) => ({ inputs: { source_sentence: first, sentences: [second] }, ...(prompt && { parameters: { prompt_name: prompt } }) }),
    show: ([value]) => ({
      summary: "Cosine of the two embeddings",
      content: [measure(value, Math.min(0, Math.floor(value)), Math.max(1, Math.ceil(value)))],
    }),
  },
  matrix: {
    title: "Matrix",
    needs: "an embedding model: gte-deploy serve ./my-embedding-bundle",
    route: "embed",
    request: ({ texts, prompt }) => {
      const lines = linesOf(texts);
      if (lines.length < 2) throw new FormError("A matrix needs two texts or more; write one a line.");
      if (lines.length > MOST_TEXTS) throw new FormError(`There are ${lines.length} texts; a matrix takes ${MOST_TEXTS} at most.`);
      return { inputs: lines, normalize: true, ...(prompt && { prompt_name: prompt }) };
    },
    show: showMatrix,
  },
  sparse: {
    title: "Sparse weights",
    needs: "a sparse model, such as SPLADE: gte-deploy serve ./my-sparse-bundle",
    route: "embed_sparse",
    request: ({ text }) => ({ inputs: text }),
    show: showSparse,
  },
  entities: {
    title: "Entities",
    needs: "a token classifier: gte-deploy serve ./my-tagger-bundle",
    route: "classify_tokens",
    request: ({ text, strategy }) => ({ inputs: text, parameters: { aggregation_strategy: strategy } }),
    show: showEntities,
  },
  classify: {
    title: "Classify",
    needs: "a text classifier: gte-deploy serve ./my-classifier-bundle",
    route: "predict",
    suits: (model) => model.labels.length > 1,
    request: ({ text, raw }) => ({ inputs: text, raw_scores: raw }),
    show: (answer) => ({
      summary: `${answer[0].label}: ${decimal(answer[0].score)}`,
      content: [bars("Labels", ["Label", "Score"], answer.map(({ label, score }) => ({ name: label, value: score })))],
    }),
  },
  tokens: {
    title: "Tokens",
    needs: "any model",
    route: "tokenize",
    request: ({ text, special }) => ({ inputs: text, add_special_tokens: special }),
    show: showTokens,
    live: true,
  },
};

/** Whether the model answers the tool of this name. */
export function answers(model, name) {
  const { route, suits } = TOOLS[name];
  return model.routes.includes(route) && (suits?.(model) ?? true);
}

function showMasks(answer, { text }, { model }) {
  const masks = Array.isArray(answer[0]) ? answer : [answer];
  const best = masks.map((candidates) => candidates[0]);
  const tables = masks.map((candidates, index) =>
    bars(
      masks.length === 1 ? "Candidates" : `Candidates for mask ${index + 1}`,
      ["Token", "Probability"],
      candidates.map(({ token, token_str, score }) => ({ name: tokenName(token_str, token), value: score })),
      { format: percent },
    ),
  );
  return {
    summary: `${masks.length === 1 ? "Best" : "Best, each mask alone"}: ${best.map(({ token_str, score }) => `${token_str} ${percent(score)}`).join(", ")}`,
    content: [filledSentence(text, best, model.maskToken), ...tables],
  };
}

/** The text with the best candidate at each mask. */
function filledSentence(text, best, maskToken) {
  const parts = text.split(maskToken);
  if (parts.length !== best.length + 1) return null;
  const filled = parts.flatMap((part, index) => (index ? [element("mark", {}, best[index - 1].token_str.trim()), part] : [part]));
  return element("p", { class: "sentence" }, ...filled);
}

function showRanking(answer, { passages }) {
  const texts = linesOf(passages);
  const rows = [...answer].sort((a, b) => b.score - a.score).map(({ index, score }) => ({ name: texts[index], value: score }));
  return {
    summary: `${counted(rows.length, "passage")}, best first`,
    content: [bars("Ranking", ["Passage", "Score"], rows, { prose: true })],
  };
}

function showMatrix(embeddings, { texts }) {
  const product = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const values = embeddings.map((row) => embeddings.map((column) => product(row, column)));
  return {
    summary: `${counted(embeddings.length, "text")}, ${counted(embeddings[0].length, "dimension")}`,
    content: heatMap("Cosine similarity of each pair", linesOf(texts), values),
  };
}

async function showSparse([weights], { top }, { post }) {
  const heaviest = [...weights].sort((a, b) => b.value - a.value).slice(0, Number(top));
  if (heaviest.length === 0) return { summary: "No token has a weight.", content: [] };
  const names = await post("decode", { ids: heaviest.map(({ index }) => [index]), skip_special_tokens: false });
  const rows = heaviest.map(({ index, value }, place) => ({ name: tokenName(names[place], index), value }));
  return {
    summary: `${counted(weights.length, "token")} with a weight`,
    content: [bars(`The ${heaviest.length} heaviest`, ["Token", "Weight"], rows)],
  };
}

function showEntities(answer, { text }) {
  const spans = answer.map(({ entity_group, entity, score, start, end }) => ({ label: entity_group ?? entity, score, start, end }));
  const characters = [...text];
  const rows = spans.map(({ label, score, start, end }) => ({ name: `${characters.slice(start, end).join("")} (${label})`, value: score }));
  if (rows.length === 0) return { summary: "No token has a label.", content: [tagged(text, [])] };
  return {
    summary: counted(rows.length, "label"),
    content: [tagged(text, spans), bars("Scores", ["Text and label", "Score"], rows, { format: percent })],
  };
}

function showTokens([tokens], _values, { model: { maxLength } }) {
  const limit = maxLength ? ` of ${maxLength.toLocaleString("en")} that the model takes` : "";
  const excess = maxLength && tokens.length > maxLength ? ": too long unless it is cut" : "";
  return { summary: `${counted(tokens.length, "token")}${limit}${excess}`, content: [chips(tokens)] };
}

// Requests to the server that sent this page, and what its answers say of time and tokens.

let token = ""; // in memory only: it must not outlive the page, nor stand in its address

export function useToken(value) {
  token = value;
}

/** An answer that is an error, or none at all (status 0). */
export class Failure extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Sends the body as JSON (GET without one) and returns `{ answer, figures }`; throws a Failure, or an AbortError. */
export async function send(path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal, cache: "no-store", credentials: "same-origin" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  const started = performance.now();
  const [response, text] = await received(path, options);
  const milliseconds = performance.now() - started;
  if (!response.ok) throw failureOf(response, text);
  return { answer: parsed(response, text), figures: figuresOf(response.headers, milliseconds) };
}

async function received(path, options) {
  try {
    const response = await fetch(path, options);
    return [response, await response.text()];
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, `The server does not answer (${error.message}).`);
  }
}

function parsed(response, text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Failure(response.status, `The answer is not JSON: ${text.slice(0, 200)}`);
  }
}

function failureOf(response, text) {
  let message = text.slice(0, 500) || response.statusText;
  try {
    const { error } = JSON.parse(text);
    message = error?.message ?? error ?? message;
  } catch {
    // A proxy answers in HTML or plain text: shown as it is.
  }
  const wait = Number.parseInt(response.headers.get("Retry-After"), 10);
  return new Failure(response.status, String(message), Number.isNaN(wait) ? null : wait);
}

/** What the headers say: milliseconds by part of the work, and the number of tokens; null for what they do not say. */
function figuresOf(headers, milliseconds) {
  const parts = (headers.get("Server-Timing") ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g);
  const times = Object.fromEntries([...parts].map(([, name, value]) => [name, Number(value)]));
  const tokens = Number(headers.get("x-compute-tokens"));
  return {
    milliseconds,
    server: times.total ?? null,
    queue: times.queue ?? null,
    engine: times.engine ?? null,
    tokens: tokens || null, // 0: the answer took no computation
  };
}

/** The request as a command for a POSIX shell. The token is named, not shown. */
export function curlOf(path, body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl ${quoted(new URL(path, document.baseURI).href)}`];
  if (token) lines.push('-H "Authorization: Bearer $GTE_DEPLOY_TOKEN"');
  lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}

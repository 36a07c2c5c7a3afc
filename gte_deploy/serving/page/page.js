// The page: tabs, forms, the view in the address, and the run of a tool. tools.js has what each tool does.

import { Failure, curlOf, send, useToken } from "./client.js";
import { copyOf, copyText, element } from "./dom.js";
import { servedModels } from "./models.js";
import { FormError, TOOLS, answers } from "./tools.js";
import { counted } from "./views.js";

const DEFAULT_MASK = "[MASK]"; // as in the form's first text
const TYPING_PAUSE_MS = 300;
const STARTUP_PAUSE_MS = 2000;
const NEAR_THE_END = 0.7; // of the height of the window
const MOST_SHOWN = 20_000; // characters of an answer as JSON

const byId = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll('[role="tab"]')];
const shownTabs = () => tabs.filter((tab) => !tab.hidden);
const nameOf = (tab) => tab.id.replace("tab-", "");
const panelOf = (name) => byId(`panel-${name}`);
const formOf = (name) => panelOf(name).querySelector("form");

let models = [];
let current = null; // name of the tool in front
const running = new Map(); // name of a tool -> the AbortController of its request
const wasRun = new Set();

// ---- The view in the address: #tool=rank&query=… ----

const modelOf = (name) => models.find((model) => model.name === formOf(name).elements.model.value);
const isBox = (control) => control.type === "checkbox";
const controlsOf = (name) => [...formOf(name).elements].filter((control) => control.name);
const valuesOf = (name) =>
  Object.fromEntries(controlsOf(name).map((control) => [control.name, isBox(control) ? control.checked : control.value]));

function addressOf(name) {
  const values = Object.entries(valuesOf(name)).filter(([field]) => field !== "model" || models.length > 1);
  return `#${new URLSearchParams({ tool: name, ...Object.fromEntries(values) })}`;
}

function rememberView() {
  history.replaceState(null, "", addressOf(current));
}

/** Fills the form that the address names, and returns its tool; null if the address names none that is served. */
function viewOfAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const tab = shownTabs().find((candidate) => nameOf(candidate) === fields.get("tool"));
  if (!tab) return null;
  const controls = controlsOf(nameOf(tab));
  const fill = (control) => {
    const value = fields.get(control.name);
    if (value === null) return;
    if (isBox(control)) control.checked = value === "true";
    else if (control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value)) control.value = value;
  };
  controls.filter(({ name }) => name === "model").forEach(fill);
  fitToModel(nameOf(tab)); // which prompts there are to choose from depends on the model
  controls.filter(({ name }) => name !== "model").forEach(fill);
  return nameOf(tab);
}

// ---- Tabs ----

function openTool(name, { focus = false } = {}) {
  current = name;
  for (const tab of tabs) {
    const selected = nameOf(tab) === name;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    panelOf(nameOf(tab)).hidden = !selected;
    if (selected && focus) tab.focus();
  }
  fitToModel(name);
  document.title = `${TOOLS[name].title} · gte-deploy`;
  rememberView();
  if (!wasRun.has(name) && formOf(name).checkValidity()) run(name);
}

function moveBetweenTabs(event) {
  const shown = shownTabs();
  const at = shown.findIndex((tab) => nameOf(tab) === current);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  openTool(nameOf(shown.at(to % shown.length)), { focus: true });
}

// ---- Running a tool ----

async function run(name) {
  const panel = panelOf(name);
  const values = valuesOf(name);
  const model = modelOf(name);
  running.get(name)?.abort();
  const control = new AbortController();
  running.set(name, control);
  wasRun.add(name);
  panel.setAttribute("aria-busy", "true");
  try {
    const { route, request, show } = TOOLS[name];
    const addressed = (body) => (models.length > 1 ? { model: model.name, ...body } : body);
    const body = addressed(request(values));
    showRequest(panel, route, body);
    const { answer, figures } = await send(route, body, control.signal);
    const post = async (path, more) => (await send(path, addressed(more), control.signal)).answer;
    const shown = await show(answer, values, { model, post });
    if (!control.signal.aborted) showAnswer(panel, answer, figures, shown);
  } catch (error) {
    if (error.name === "AbortError" || control.signal.aborted) return; // a newer request has the panel
    showFailure(name, error);
  } finally {
    if (running.get(name) === control) panel.removeAttribute("aria-busy");
  }
}

function showRequest(panel, route, body) {
  panel.querySelector(".curl").textContent = curlOf(route, body);
  panel.querySelector(".received").hidden = true;
  panel.querySelector(".copied").textContent = "";
  panel.querySelector(".exchange").hidden = false;
}

function showAnswer(panel, answer, figures, { summary, content }) {
  panel.querySelector(".failure").hidden = true;
  panel.querySelector(".summary").textContent = summary;
  panel.querySelector(".answer").replaceChildren(...content.filter(Boolean));
  panel.querySelector(".figures").replaceChildren(...figureItems(figures));
  panel.querySelector(".json").textContent = shortened(asJson(answer));
  panel.querySelector(".received").hidden = false;
}

/** Queue and engine are sums over the batches of a request, some of which are computed at once. */
function figureItems({ milliseconds, server, queue, engine, tokens }) {
  const time = (value) => (value === null ? null : `${value.toFixed(value < 10 ? 1 : 0)} ms`);
  const items = {
    "Round trip": time(milliseconds),
    "In the server": time(server),
    "Queue (sum)": time(queue),
    "Engine (sum)": time(engine),
    Tokens: tokens === null ? null : tokens.toLocaleString("en"),
  };
  const given = Object.entries(items).filter(([, value]) => value !== null);
  return given.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

/** JSON with one line for each element of the outermost list. */
function asJson(answer) {
  if (!Array.isArray(answer)) return JSON.stringify(answer, null, 2);
  return `[\n${answer.map((item) => `  ${JSON.stringify(item)}`).join(",\n")}\n]`;
}

function shortened(text) {
  if (text.length <= MOST_SHOWN) return text;
  return `${text.slice(0, MOST_SHOWN)} … and ${(text.length - MOST_SHOWN).toLocaleString("en")} characters more`;
}

/** Shows an error in place of the answer before. A fault of this page itself is thrown on, for the console. */
function showFailure(name, error) {
  const panel = panelOf(name);
  const failure = panel.querySelector(".failure");
  const known = error instanceof Failure || error instanceof FormError;
  const status = error.status ? `${error.status}: ` : "";
  panel.querySelector(".summary").textContent = "";
  panel.querySelector(".answer").replaceChildren();
  panel.querySelector(".figures").replaceChildren();
  failure.replaceChildren(element("p", {}, known ? `${status}${error.message}` : `This page failed: ${error.message}`));
  if (error.retryAfter) failure.append(element("p", {}, `It asks to wait ${counted(error.retryAfter, "second")}.`));
  failure.hidden = false;
  if (error.status === 401) askForToken();
  else if (error instanceof Failure && (error.status === 0 || error.status === 429 || error.status >= 500)) {
    const again = element("button", { type: "button" }, "Try again");
    again.addEventListener("click", () => run(name));
    failure.append(again);
  }
  if (!known) throw error;
}

// ---- The bearer token ----

function askForToken() {
  byId("token").hidden = false;
  byId("token-value").focus();
}

byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(byId("token-value").value);
  byId("token-value").value = "";
  byId("token").hidden = true;
  if (current) run(current);
  else start();
});

// ---- Building the page ----

function buildPanel(name) {
  const form = formOf(name);
  form.append(copyOf("run"));
  panelOf(name).append(copyOf("outcome"));
  const label = form.querySelector(".model label");
  const select = form.querySelector(".model select");
  select.id = `${name}-model`;
  label.htmlFor = select.id;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    rememberView();
    run(name);
    if (event.submitter) showOutcome(panelOf(name).querySelector(".outcome"));
  });
  form.addEventListener("keydown", (event) => {
    const isWanted = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (isWanted) form.requestSubmit(form.querySelector('[type="submit"]'));
  });
  form.addEventListener("change", (event) => {
    if (event.target.name === "model") fitToModel(name);
    if (event.target.matches("select, [type=checkbox], [type=number]") && form.reportValidity()) form.requestSubmit();
  });
  let pause;
  form.addEventListener("input", () => {
    clearTimeout(pause); // browsers refuse a page that changes its address with every key
    pause = setTimeout(() => {
      rememberView();
      if (TOOLS[name].live && form.checkValidity()) run(name);
    }, TYPING_PAUSE_MS);
  });
  panelOf(name).addEventListener("click", (event) => {
    const { copy } = event.target.dataset;
    if (copy) copyFrom(panelOf(name), copy);
  });
}

/** Moves to the answer where the form fills the screen, as on phones. */
function showOutcome(outcome) {
  if (outcome.getBoundingClientRect().top > NEAR_THE_END * innerHeight) outcome.scrollIntoView();
}

async function copyFrom(panel, what) {
  const told = panel.querySelector(".copied");
  rememberView();
  try {
    await copyText(what === "curl" ? panel.querySelector(".curl").textContent : location.href);
    told.textContent = what === "curl" ? "The command is copied." : "The link is copied.";
  } catch (error) {
    told.textContent = `Nothing is copied: ${error.message}`;
  }
}

/** Shows the tools that the models answer, with the models to choose from, and names the other tools. */
function offerTools() {
  const others = [];
  for (const tab of tabs) {
    const name = nameOf(tab);
    const able = models.filter((model) => answers(model, name));
    tab.hidden = able.length === 0;
    if (able.length === 0) others.push(element("dt", {}, TOOLS[name].title), element("dd", {}, `needs ${TOOLS[name].needs}`));
    const select = formOf(name).querySelector(".model select");
    const chosen = select.value;
    select.replaceChildren(...able.map((model) => element("option", { value: model.name }, model.name)));
    if (able.some((model) => model.name === chosen)) select.value = chosen;
    formOf(name).querySelector(".model").hidden = models.length < 2;
  }
  byId("others").hidden = others.length === 0;
  byId("others").querySelector("dl").replaceChildren(...others);
}

/** Fits the form to its model: names it, and offers its prompts and its tokenizer's own mask token. */
function fitToModel(name) {
  const model = modelOf(name);
  byId("served").textContent = [model.name, ...model.facts].join(" · ");
  const prompt = formOf(name).querySelector(".prompt select");
  if (prompt) {
    const chosen = prompt.value;
    const option = (value) => element("option", { value, selected: value === chosen }, value || "the default");
    prompt.replaceChildren(...["", ...model.prompts].map(option));
    prompt.closest(".prompt").hidden = model.prompts.length === 0;
  }
  if (name === "fill-mask") offerMask(model.maskToken ?? DEFAULT_MASK);
}

/** Writes the mask token on the button, and into the first text unless that was changed. */
function offerMask(mask) {
  const button = byId("insert-mask");
  const text = byId("fill-mask-text");
  if (text.value === text.defaultValue) text.value = text.defaultValue.replace(DEFAULT_MASK, mask);
  button.textContent = `Insert ${mask}`;
  button.dataset.mask = mask;
}

byId("insert-mask").addEventListener("click", (event) => {
  const text = byId("fill-mask-text");
  text.setRangeText(event.target.dataset.mask, text.selectionStart, text.selectionEnd, "end");
  text.focus();
  text.dispatchEvent(new Event("input", { bubbles: true }));
});

const theme = byId("theme");
try {
  theme.value = localStorage.getItem("theme") ?? "";
} catch {
  // The browser keeps nothing for this page: the choice holds until it is closed.
}
function applyTheme() {
  if (theme.value) document.documentElement.dataset.theme = theme.value;
  else delete document.documentElement.dataset.theme;
}
theme.addEventListener("change", () => {
  applyTheme();
  try {
    localStorage.setItem("theme", theme.value);
  } catch {
    // As above.
  }
});
applyTheme();

tabs.forEach((tab) => {
  buildPanel(nameOf(tab));
  tab.addEventListener("click", () => openTool(nameOf(tab)));
});
document.querySelector('[role="tablist"]').addEventListener("keydown", moveBetweenTabs);
window.addEventListener("hashchange", () => {
  const name = viewOfAddress();
  if (!name) return;
  wasRun.delete(name);
  openTool(name);
});

async function start() {
  const notice = byId("startup");
  try {
    models = await servedModels();
  } catch (error) {
    byId("served").textContent = "";
    notice.replaceChildren(element("p", {}, error.message));
    if (error.status === 503) notice.append(element("p", {}, "This page tries again until it is ready."));
    notice.hidden = error.status === 401;
    if (error.status === 401) askForToken();
    else if (error.status === 503 || error.status === 0) setTimeout(start, STARTUP_PAUSE_MS);
    else throw error;
    return;
  }
  notice.hidden = true;
  byId("tools").hidden = false;
  offerTools();
  openTool(viewOfAddress() ?? nameOf(shownTabs()[0]));
}

start();

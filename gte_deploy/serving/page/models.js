// The models that the server serves, as the tools need them.

import { send } from "./client.js";

/** `[{ name, task, routes, maxLength, maskToken, labels, prompts, facts }]`, in the server's order. */
export async function servedModels() {
  const { answer } = await send("v1/models");
  return answer.data.map(described);
}

function described(model) {
  const limit = model.max_length ? `up to ${model.max_length.toLocaleString("en")} tokens` : null;
  return {
    name: model.name ?? model.id,
    task: model.task,
    routes: model.routes.map((route) => route.replace(/^\//, "")),
    maxLength: model.max_length,
    maskToken: model.mask_token,
    labels: model.labels ?? [],
    prompts: Object.keys(model.prompts ?? {}),
    facts: [model.task, model.precision, model.backend, limit].filter(Boolean),
  };
}

import { AutoConfig, pipeline } from "@huggingface/transformers";

export default async function fillMask(bundle, texts) {
  const config = await AutoConfig.from_pretrained(bundle);
  config.model_type = "bert"; // the name of a class that transformers.js has; the graph is the bundle's
  const fill = await pipeline("fill-mask", bundle, { config });
  return await fill(texts, { top_k: 5 });
}

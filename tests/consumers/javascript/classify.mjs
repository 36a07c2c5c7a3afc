import { AutoConfig, pipeline } from "@huggingface/transformers";

export default async function classify(bundle, texts) {
  const config = await AutoConfig.from_pretrained(bundle);
  config.model_type = "bert"; // the name of a class that transformers.js has; the graph is the bundle's
  const classifier = await pipeline("text-classification", bundle, { config });
  return await classifier(texts, { top_k: null });
}

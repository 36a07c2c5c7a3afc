import { pipeline } from "@huggingface/transformers";

export default async function features(bundle, texts) {
  const extract = await pipeline("feature-extraction", bundle);
  const embeddings = await extract(texts, { pooling: "mean", normalize: true });
  return embeddings.tolist();
}

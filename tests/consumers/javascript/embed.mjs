import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

export default async function embed(bundle, texts) {
  const tokenizer = await AutoTokenizer.from_pretrained(bundle);
  const model = await AutoModel.from_pretrained(bundle);
  const inputs = tokenizer(texts, { padding: true, truncation: true });
  const { sentence_embedding } = await model(inputs); // pooled as the bundle says
  return sentence_embedding.normalize().tolist();
}

import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

export default async function rerank(bundle, query, documents) {
  const tokenizer = await AutoTokenizer.from_pretrained(bundle);
  const model = await AutoModel.from_pretrained(bundle);
  const queries = documents.map(() => query);
  const inputs = tokenizer(queries, { text_pair: documents, padding: true, truncation: true });
  const { logits } = await model(inputs);
  return logits.sigmoid().tolist().flat();
}

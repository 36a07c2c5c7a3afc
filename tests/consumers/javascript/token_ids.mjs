import { AutoTokenizer } from "@huggingface/transformers";

export default async function tokenIds(bundle, texts) {
  const tokenizer = await AutoTokenizer.from_pretrained(bundle);
  return texts.map((text) => tokenizer(text, { return_tensor: false }).input_ids);
}

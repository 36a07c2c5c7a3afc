import { readFile } from "node:fs/promises";
import { Tokenizer } from "@huggingface/tokenizers";
import { InferenceSession, Tensor } from "onnxruntime-node";

export default async function embed(bundle, text) {
  const read = async (name) => JSON.parse(await readFile(`${bundle}/${name}`, "utf8"));
  const settings = await read("tokenizer_config.json");
  const tokenizer = new Tokenizer(await read("tokenizer.json"), settings);
  const session = await InferenceSession.create(`${bundle}/onnx/model.onnx`);
  const { ids } = tokenizer.encode(text);
  ids.splice(settings.model_max_length - 1, ids.length - settings.model_max_length); // keeps the last, [SEP]
  const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const feeds = { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
  const { sentence_embedding } = await session.run(feeds);
  return Array.from(sentence_embedding.data); // not normalised
}

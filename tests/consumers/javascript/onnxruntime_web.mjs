import { Tokenizer } from "@huggingface/tokenizers";
import { InferenceSession, Tensor } from "onnxruntime-web";

export default async function embed(bundle, text) {
  const read = async (name) => (await fetch(`${bundle}/${name}`)).json();
  const settings = await read("tokenizer_config.json");
  const tokenizer = new Tokenizer(await read("tokenizer.json"), settings);
  const weights = { path: "model.onnx_data", data: `${bundle}/onnx/model.onnx_data` };
  const session = await InferenceSession.create(`${bundle}/onnx/model.onnx`, { externalData: [weights] });
  const { ids } = tokenizer.encode(text);
  ids.splice(settings.model_max_length - 1, ids.length - settings.model_max_length); // keeps the last, [SEP]
  const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const feeds = { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
  const { sentence_embedding } = await session.run(feeds);
  return Array.from(sentence_embedding.data); // not normalised
}

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from tokenizers import Tokenizer

bundle, texts = Path(sys.argv[1]), sys.argv[2:]
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
config = json.loads((bundle / "config.json").read_text())
tokenizer.enable_truncation(config["max_position_embeddings"])  # the limit of the bundle
tokenizer.enable_padding(pad_id=config["pad_token_id"])
encodings = tokenizer.encode_batch(texts)
feed = {
    "input_ids": np.array([encoding.ids for encoding in encodings]),
    "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
}
# Without the hint, OpenVINO computes in bfloat16 on CPUs that have it.
options = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.compile_model(bundle / "onnx" / "model_openvino.onnx", "CPU", options)
embeddings = model(feed)["sentence_embedding"]  # [texts, hidden] float32
np.save("embeddings.npy", embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))

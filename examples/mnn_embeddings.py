"""Convert a bundle's graph of standard operators to MNN, and embed texts with MNN alone.

    pip install MNN numpy tokenizers
    python examples/mnn_embeddings.py my-bundle "a text" "another"    # an embedding model; writes my-bundle.mnn here

The bundle needs onnx/model_openvino.onnx: openvino was installed where gte-export wrote it.
"""

import json
import sys
from pathlib import Path

import _tools  # MNN's converter; the command mnnconvert also reports each conversion to its maker
import MNN.expr
import MNN.nn
import numpy as np
from tokenizers import Tokenizer


def variable(array):
    """An input of MNN, which has no 64-bit integers."""
    made = MNN.expr.placeholder(list(array.shape), MNN.expr.NCHW, MNN.expr.int)
    made.write(array.ravel().tolist())
    return made


bundle, texts = Path(sys.argv[1]), sys.argv[2:]
manifest = json.loads((bundle / "manifest.json").read_text())
names = [tensor["name"] for tensor in manifest["graphs"]["openvino"]["inputs"]]
graph, converted = str(bundle / "onnx/model_openvino.onnx"), f"{bundle.name}.mnn"
_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", graph, "--MNNModel", converted, "--bizCode", "gte"])

tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
tokenizer.enable_truncation(manifest["spec"]["max_length"])
module = MNN.nn.load_module_from_file(converted, names, ["sentence_embedding"])
rows = []
for text in texts:  # one at a time: a text alone needs no padding
    ids = np.array([tokenizer.encode(text).ids])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (embedding,) = module.forward([variable(feed[name]) for name in names])
    rows.append(np.array(embedding.read(), np.float32).ravel())
embeddings = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
np.save("embeddings.npy", embeddings)
print(f"{converted}: {Path(converted).stat().st_size / 1e6:.1f} MB")
print(np.round(embeddings @ embeddings.T, 4))

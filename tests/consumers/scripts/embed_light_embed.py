import sys

import numpy as np
from light_embed import TextEmbedding

bundle, texts = sys.argv[1], sys.argv[2:]
config = {
    "onnx_file": "onnx/model.onnx",
    "onnx_output_map": {"sentence_embedding": "sentence_embedding"},
    "normalize": True,
}
model = TextEmbedding(bundle, model_config=config)
np.save("embeddings.npy", model.encode(texts))

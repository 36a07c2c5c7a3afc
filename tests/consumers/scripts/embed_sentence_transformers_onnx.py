import sys

import numpy as np
from sentence_transformers import SentenceTransformer

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, texts = sys.argv[1], sys.argv[2:]
model = SentenceTransformer(bundle, backend="onnx", model_kwargs={"file_name": "onnx/model.onnx"})
np.save("embeddings.npy", model.encode(texts))

import sys

import numpy as np
from sentence_transformers import SentenceTransformer

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, texts = sys.argv[1], sys.argv[2:]
options = {"export": False, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
model = SentenceTransformer(bundle, backend="openvino", model_kwargs=options)
np.save("embeddings.npy", model.encode(texts))

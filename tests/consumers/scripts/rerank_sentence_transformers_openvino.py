import sys

import numpy as np
from sentence_transformers import CrossEncoder

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, query, documents = sys.argv[1], sys.argv[2], sys.argv[3:]
options = {"export": False, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
model = CrossEncoder(bundle, backend="openvino", model_kwargs=options)
np.save("scores.npy", model.predict([(query, document) for document in documents]))

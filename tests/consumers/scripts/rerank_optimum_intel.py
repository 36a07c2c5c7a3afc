import sys

import numpy as np
from optimum.intel import OVModelForSequenceClassification
from transformers import AutoTokenizer

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, query, documents = sys.argv[1], sys.argv[2], sys.argv[3:]
tokenizer = AutoTokenizer.from_pretrained(bundle)
options = {"INFERENCE_PRECISION_HINT": "f32"}
model = OVModelForSequenceClassification.from_pretrained(bundle, subfolder="openvino", export=False, ov_config=options)
batch = tokenizer([query] * len(documents), documents, padding=True, truncation=True, return_tensors="np")
np.save("scores.npy", model(**batch).logits[:, 0])

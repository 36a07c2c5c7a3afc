import sys

import numpy as np
from optimum.intel import OVModelForFeatureExtraction
from transformers import AutoTokenizer

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, texts = sys.argv[1], sys.argv[2:]
tokenizer = AutoTokenizer.from_pretrained(bundle)
options = {"INFERENCE_PRECISION_HINT": "f32"}
model = OVModelForFeatureExtraction.from_pretrained(bundle, subfolder="openvino", export=False, ov_config=options)
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
hidden = model(**batch).last_hidden_state  # [texts, tokens, hidden]
mask = batch["attention_mask"][:, :, None]
embeddings = (hidden * mask).sum(1) / mask.sum(1)  # mean pooling, as 1_Pooling/config.json says
np.save("embeddings.npy", embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))

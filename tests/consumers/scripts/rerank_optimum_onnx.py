import sys

import numpy as np
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, query, documents = sys.argv[1], sys.argv[2], sys.argv[3:]
tokenizer = AutoTokenizer.from_pretrained(bundle)
model = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
batch = tokenizer([query] * len(documents), documents, padding=True, truncation=True, return_tensors="np")
np.save("scores.npy", model(**batch).logits[:, 0])

import json
import sys
from pathlib import Path

from optimum.intel import OVModelForMaskedLM
from transformers import AutoTokenizer, pipeline

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, text = sys.argv[1], sys.argv[2]
options = {"INFERENCE_PRECISION_HINT": "f32"}
model = OVModelForMaskedLM.from_pretrained(bundle, subfolder="openvino", export=False, ov_config=options)
fill_mask = pipeline("fill-mask", model=model, tokenizer=AutoTokenizer.from_pretrained(bundle))
Path("answer.json").write_text(json.dumps(fill_mask(text)))

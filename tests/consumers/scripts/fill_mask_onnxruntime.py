import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

bundle, text = Path(sys.argv[1]), sys.argv[2]
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
ids = np.array([tokenizer.encode(text).ids])  # [1, tokens]
session = onnxruntime.InferenceSession(bundle / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
logits = logits[ids == tokenizer.token_to_id("[MASK]")][0]  # [vocabulary]
scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = np.argsort(-scores)[:5]
answer = [{"token_str": tokenizer.id_to_token(int(token)), "score": float(scores[token])} for token in best]
Path("answer.json").write_text(json.dumps(answer))

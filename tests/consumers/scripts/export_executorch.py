"""Export a checkpoint to a bundle for ExecuTorch, and save the answers of gte_deploy on it."""

import json
import sys
from pathlib import Path

import numpy as np

import gte_deploy
from gte_deploy.exporters.cli import main

checkpoint, bundle, task, precision, *texts = sys.argv[1:]
options = ["--format", "executorch", "--task", task, "--precision", precision, "--max-len", "64"]
options += ["--program-masks", "2", "--program-batch", "2"]
assert main([checkpoint, bundle, *options, "--reference-cache", "off"]) == 0
with gte_deploy.load(bundle) as model:
    answers = {"backend": model.backend, "refusal": None}
    if task == "fill-mask":
        answers["fills"] = [model.fill_mask(text, top_k=5) for text in texts]
    elif task == "classify":
        pairs = [(texts[0], text) for text in texts[1:]]
        np.save("scores.npy", model.predict(pairs, activation_fn=lambda logits: logits))
    else:
        np.save("embeddings.npy", model.encode(texts, normalize_embeddings=True))
    try:
        model.encode("word " * 100)
    except gte_deploy.InputError as error:
        answers["refusal"] = str(error)
Path("answers.json").write_text(json.dumps(answers))

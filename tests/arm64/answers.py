"""Run on both machines: `answers.py BUNDLE BACKEND OUTPUT` writes the runtime's answers to some texts."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

import gte_deploy

WORDS = "the government of the united states has made peace with the nations of the world and pays its debts"
TEXTS = ["a", WORDS, "Größe, naïveté, 東京, 3.14159", " ".join([WORDS] * 20)]
MASKED = [
    "The president of the united [MASK] of America.",
    "Paris is the [MASK] of [MASK].",
    "The congress passed a [MASK] to pay the public debt.",
]


def masks_of(filled: list[Any]) -> list[Any]:
    """A text with one mask gives its choices, and one with several masks a list of them for each."""
    return [filled] if isinstance(filled[0], dict) else filled


bundle, backend, output = sys.argv[1:]
with gte_deploy.load(bundle, backend=backend, num_threads=1) as model:
    embeddings, alone = model.encode(TEXTS), model.encode(TEXTS[:1])
    masks = [mask for text in MASKED for mask in masks_of(model.fill_mask(text, top_k=3))]
    facts = {
        "machine": platform.machine(),
        "backend": model.info()["backend"],
        "words": [[choice["token_str"] for choice in mask] for mask in masks],
    }
scores = np.array([[choice["score"] for choice in mask] for mask in masks])
np.savez(output, embeddings=embeddings, alone=alone, scores=scores)
Path(output).with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")

"""A hybrid checkpoint in the form of gte-multilingual-base, and its answers from transformers' classes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factories import raise_token_weights
from runtime_models import make_word_checkpoint


def make_hybrid_checkpoint(folder: Path) -> Path:
    """A token classifier with one label, CLS pooling and Normalize, whose weights lie on both sides of 0."""
    prompts = {"query": "the query: ", "document": ""}
    make_word_checkpoint(folder, task="token-classify", seed=3, pooling="cls", normalize=True, prompts=prompts)
    return raise_token_weights(folder)


def hybrid_reference(folder: Path, text: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The dense vector [D], and the weights [V], of transformers' token classifier in float64 and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, GteForTokenClassification

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = GteForTokenClassification.from_pretrained(str(folder)).double().eval()
    inputs = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state[0]
        weights = hidden @ model.classifier.weight[0] + model.classifier.bias[0]
    dense = np.zeros(model.config.vocab_size)
    for token, weight in zip(inputs["input_ids"][0].tolist(), weights.tolist(), strict=True):
        if token not in tokenizer.all_special_ids or token == tokenizer.mask_token_id:
            dense[token] = max(dense[token], weight)
    return (hidden[0] / hidden[0].norm()).numpy(), dense

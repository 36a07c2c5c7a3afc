"""gte_sparse_output: a weight for each token to a sparse vector for each text, as gte-multilingual-base defines it.

The weight of a vocabulary entry is the largest relu(logit) among its places in the text. Special tokens have none.

Shapes: B rows of a request, S tokens, N entries of the vector that has most.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the runtime's modules that lie beside this file, before any installed

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from gte_deploy.exporters.triton.serving.exchange import (  # noqa: E402
    Settings,
    answer_each,
    check_finite,
    filled,
    floats,
    required,
)
from gte_deploy.tokenization import load_tokenizer  # noqa: E402


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer, which names the entries."""
        folder = Settings(args).folder
        self._tokenizer = load_tokenizer(folder)
        added = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
        self._special = np.array([token["id"] for token in added if token["special"]])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`TOKENS` [B, 1]; `TOKEN`, `TOKEN_ID` and `WEIGHT` [B, N], heaviest first, for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Any) -> dict[str, NDArray[Any]]:
        mask = required(request, "attention_mask") == 1
        logits = np.where(mask, floats(request, "logits")[:, :, 0], 0)
        check_finite("logits", logits)
        vectors = [self._vector(ids, row) for ids, row in zip(required(request, "input_ids"), logits, strict=True)]
        width = max(1, *(len(weights) for _, weights in vectors))
        names = [[self._tokenizer.decode([token]).encode() for token in tokens] for tokens, _ in vectors]
        return {
            "TOKENS": np.array([[len(tokens)] for tokens, _ in vectors], dtype=np.int32),
            "TOKEN": filled(names, width, b"", np.object_),
            "TOKEN_ID": filled([tokens for tokens, _ in vectors], width, -1, np.int64),
            "WEIGHT": filled([weights for _, weights in vectors], width, 0.0, np.float32),
        }

    def _vector(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> tuple[list[int], list[float]]:
        """Vocabulary ids and their weights, heaviest first; equal weights by id. What is padding has a logit of 0."""
        tokens, places = np.unique(ids, return_inverse=True)
        weights = np.zeros(len(tokens), dtype=np.float32)
        np.maximum.at(weights, places.reshape(-1), logits)
        weights[np.isin(tokens, self._special)] = 0
        order = np.lexsort((tokens, -weights))[: np.count_nonzero(weights)]
        return tokens[order].tolist(), weights[order].tolist()

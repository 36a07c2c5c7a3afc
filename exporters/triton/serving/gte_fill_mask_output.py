"""gte_fill_mask_output: vocabulary logits of the masks to the answers that `Model.fill_mask` returns.

Shapes: B rows of a request, S tokens, M masks of the row that has most, K answers for each, V vocabulary.
"""

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
    floats,
    option,
    required,
    shared_texts,
)
from gte_deploy.fill_mask import MaskAnswer, answers, top_tokens  # noqa: E402
from gte_deploy.inputs import as_texts, check_integer  # noqa: E402
from gte_deploy.tokenization import load_tokenizer  # noqa: E402

_DEFAULT_TOP_K = 5


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer, which decodes the answers."""
        settings = Settings(args)
        self._spec = settings.spec
        self._tokenizer = load_tokenizer(settings.folder)
        self._answerable = np.flatnonzero(self._tokenizer.known_ids(self._spec.vocab_size))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`MASKS` [B, 1]; `TOKEN`, `TOKEN_ID`, `SCORE` and `SEQUENCE` [B, M, K] for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Any) -> dict[str, NDArray[Any]]:
        top_k = check_integer("TOP_K", option(request, "TOP_K", _DEFAULT_TOP_K), 1, len(self._answerable))
        candidates = self._candidates(request)
        lengths = required(request, "attention_mask").sum(axis=1)
        rows = [row[:length].tolist() for row, length in zip(required(request, "input_ids"), lengths, strict=True)]
        found = [
            [self._mask_answers(row, place, logits, candidates, top_k) for place, logits in masks]
            for row, masks in zip(rows, self._masks(rows, floats(request, "logits")), strict=True)
        ]
        shape = (len(rows), max(map(len, found)), min(top_k, len(candidates)))
        tensors = {
            "MASKS": np.array([[len(masks)] for masks in found], dtype=np.int32),
            "TOKEN": np.full(shape, b"", dtype=np.object_),
            "TOKEN_ID": np.full(shape, -1, dtype=np.int64),
            "SCORE": np.zeros(shape, dtype=np.float32),
            "SEQUENCE": np.full(shape, b"", dtype=np.object_),
        }
        for row, masks in enumerate(found):
            for mask, best in enumerate(masks):
                tensors["TOKEN"][row, mask] = [answer["token_str"].encode() for answer in best]
                tensors["TOKEN_ID"][row, mask] = [answer["token"] for answer in best]
                tensors["SCORE"][row, mask] = [answer["score"] for answer in best]
                tensors["SEQUENCE"][row, mask] = [answer["sequence"].encode() for answer in best]
        return tensors

    def _masks(self, rows: list[list[int]], logits: NDArray[np.float32]) -> list[list[tuple[int, NDArray[np.float32]]]]:
        """Place and logits [V] of each mask of each row; logits are [B, M, V], or of a plan [all masks, V]."""
        places = [[at for at, token in enumerate(row) if token == self._tokenizer.mask_token_id] for row in rows]
        if logits.ndim == 2:
            ends = np.cumsum([len(found) for found in places])
            parts = np.split(logits[: ends[-1]], ends[:-1])
        else:
            parts = [values[: len(found)] for values, found in zip(logits, places, strict=True)]
        for index, part in enumerate(parts):
            check_finite(f"the logits of input {index}", part)
        return [list(zip(found, part, strict=True)) for found, part in zip(places, parts, strict=True)]

    def _mask_answers(
        self, row: list[int], place: int, logits: NDArray[np.float32], candidates: NDArray[np.int64], top_k: int
    ) -> list[MaskAnswer]:
        scores, tokens = top_tokens(logits, candidates, top_k)
        return answers(row, place, scores, tokens, self._tokenizer, pad_token_id=self._spec.pad_token_id)

    def _candidates(self, request: Any) -> NDArray[np.int64]:
        targets = shared_texts(request, "TARGETS", "target")
        if targets is None:
            return self._answerable
        return np.array(self._tokenizer.target_ids(as_texts(targets, name="TARGETS")[0]))

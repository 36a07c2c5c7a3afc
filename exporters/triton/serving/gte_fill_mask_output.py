"""gte_fill_mask_output: converts vocabulary logits of masks to the answers that `Model.fill_mask` returns.

Shapes: B rows of a request, S tokens, M masks (the most of any row), K answers for each, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    check_finite,
    check_ids,
    floats,
    option,
    required,
    shared_texts,
)
from gte_deploy.tasks.fill_mask import MaskRequest, check_size, to_tensors
from gte_deploy.text.inputs import as_texts, check_integer
from gte_deploy.text.tokenization import load_tokenizer

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

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        top_k = check_integer("TOP_K", option(request, "TOP_K", _DEFAULT_TOP_K), 1, len(self._answerable))
        candidates = self._candidates(request)
        ids, mask = required(request, "input_ids"), required(request, "attention_mask")
        check_ids(ids, self._spec.vocab_size)
        masks = (ids == self._tokenizer.mask_token_id) & (mask == 1)
        counts, kept = masks.sum(axis=1).tolist(), min(top_k, len(candidates))
        # The tensors of the answer have as many places for each text as for the one with the most masks.
        check_size(f"a request of {len(ids)} texts", [max(counts)] * len(ids), mask.sum(axis=1).tolist(), kept)
        batch = Batch(ids, mask, np.argwhere(masks))
        logits = _logits_of_masks(floats(request, "logits"), counts)
        found = MaskRequest(self._spec, self._tokenizer, candidates, top_k).answer(batch, {"logits": logits})
        return to_tensors(found, kept)

    def _candidates(self, request: Inputs) -> NDArray[np.int64]:
        targets = shared_texts(request, "TARGETS", "target")
        if targets is None:
            return self._answerable
        return np.array(self._tokenizer.target_ids(as_texts(targets, name="TARGETS")[0]))


def _logits_of_masks(logits: NDArray[np.float32], counts: list[int]) -> NDArray[np.float32]:
    """Logits [all masks, V] without padding, from [B, M, V].

    Raises:
        InputError: a row has no mask, or more masks than logits; texts are checked before, token ids are not.
    """
    parts = [values[:count] for values, count in zip(logits, counts, strict=True)]
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if not count or len(part) < count:
            raise InputError(f"input {index} has {count:,} masks, and mask_positions has {len(part):,} of them")
        check_finite(f"the logits of input {index}", part)
    return np.concatenate(parts)

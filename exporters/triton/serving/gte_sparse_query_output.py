"""gte_sparse_query_output: looks up the stored weights of a query's token ids, without the encoder.

Shapes: B rows of a request, S tokens, N entries (the most of any vector).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    max_active_dims,
    required,
)
from gte_deploy.tasks.sparse import SparseRequest, entry_names, to_tensors, weights_of_query
from gte_deploy.text.tokenization import load_tokenizer


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the weights, and the tokenizer, which names the entries."""
        settings = Settings(args)
        self._spec = settings.spec
        assert self._spec.sparse is not None and self._spec.sparse.query_weights is not None
        tokenizer = load_tokenizer(settings.folder)
        self._name = entry_names(tokenizer, self._spec)
        self._template = tokenizer.template
        self._weights = np.load(settings.folder / self._spec.sparse.query_weights, allow_pickle=False)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`TOKENS` [B, 1]; `TOKEN`, `TOKEN_ID` and `WEIGHT` [B, N], heaviest first, for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        first, last = len(self._template.prefix), len(self._template.suffix)
        lengths = required(request, "attention_mask").sum(axis=1)
        rows = zip(required(request, "input_ids"), lengths, strict=True)
        weights = [weights_of_query(ids[first : length - last], self._weights) for ids, length in rows]
        return to_tensors(SparseRequest(self._spec, max_active_dims(request)).vectors(weights), self._name)

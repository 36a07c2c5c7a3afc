"""gte_sparse_output: converts outputs of the encoder to sparse vectors, as `encode_sparse` returns them.

The graph of a sparse model gives pooled and activated vectors. A hybrid model gives the weights of the tokens, and a
token classifier with one label their logits; both become vectors by the definition of gte-multilingual-base.

Shapes: B rows of a request, S tokens, V vocabulary, N entries (the most of any vector).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    check_finite,
    check_ids,
    floats,
    max_active_dims,
    required,
)
from gte_deploy.tasks.sparse import SparseRequest, entry_names, to_tensors, unweighted_ids
from gte_deploy.text.tokenization import load_tokenizer


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer, which names the entries."""
        settings = Settings(args)
        self._spec = settings.spec
        tokenizer = load_tokenizer(settings.folder)
        self._name = entry_names(tokenizer, self._spec)
        self._unweighted = unweighted_ids(tokenizer, self._spec.pad_token_id)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`TOKENS` [B, 1]; `TOKEN`, `TOKEN_ID` and `WEIGHT` [B, N], heaviest first, for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        wanted = SparseRequest(self._spec, max_active_dims(request), unweighted=self._unweighted)
        return to_tensors(wanted.vectors(self._weights(request, wanted)), self._name)

    def _weights(self, request: Inputs, wanted: SparseRequest) -> Iterable[NDArray[np.float32]]:
        """The weights [V] of each row."""
        if self._spec.task == "sparse":
            weights = floats(request, "sparse_embedding")
            check_finite("the sparse embedding", weights)
            return weights
        batch = Batch(required(request, "input_ids"), required(request, "attention_mask"))
        check_ids(batch.input_ids, self._spec.vocab_size)
        (name,) = wanted.graph_outputs(())
        values = np.where(batch.attention_mask[:, :, None] == 1, floats(request, name), np.float32(0))
        check_finite(name, values)
        return wanted.weights(batch, {name: values})

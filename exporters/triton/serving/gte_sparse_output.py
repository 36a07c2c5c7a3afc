"""gte_sparse_output: what the encoder gives of a sparse model to a vector for each text, as `encode_sparse` does.

A graph for task sparse gives the vectors, pooled and activated. Of a token classifier with one label come the logits of
the tokens, which are weights as gte-multilingual-base defines them.

Shapes: B rows of a request, S tokens, V vocabulary, N entries of the vector that has most.
"""

import sys
from collections.abc import Iterable, Sequence
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
    required,
    sparse_vectors,
)
from gte_deploy.sparse import entry_names, unweighted_ids, weights_of_tokens  # noqa: E402
from gte_deploy.tokenization import load_tokenizer  # noqa: E402


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

    def _answer(self, request: Any) -> dict[str, NDArray[Any]]:
        return sparse_vectors(request, self._weights(request), self._spec, self._name)

    def _weights(self, request: Any) -> Iterable[NDArray[np.float32]]:
        """[V] of each row."""
        if self._spec.task == "sparse":
            weights = floats(request, "sparse_embedding")
            check_finite("the sparse embedding", weights)
            return weights
        mask = required(request, "attention_mask") == 1
        logits = np.where(mask, floats(request, "logits")[:, :, 0], 0)
        check_finite("logits", logits)
        rows = zip(required(request, "input_ids"), logits, mask, strict=True)
        size = self._spec.vocab_size
        return [weights_of_tokens(ids[real], row[real], size, self._unweighted) for ids, row, real in rows]

"""gte_multi_vector_output: keeps the embeddings of the tokens that count, as `Model.encode_multi_vector` returns them.

Shapes: B rows of a request, S tokens, T tokens that are kept (the most of any row), D embedding size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    check_finite,
    floats,
    option,
    required,
)
from gte_deploy.tasks.base import counted
from gte_deploy.tasks.multi_vector import KEPT_TOKENS, SERVED_VECTORS, TOKEN_VECTORS, kept_vectors


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings."""
        self._spec = Settings(args).spec

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`TOKENS` [B, 1] and `TOKEN_EMBEDDINGS` [B, T, D] for each request, in the order of the tokens."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        vectors, kept = floats(request, TOKEN_VECTORS), required(request, KEPT_TOKENS)
        if kept.shape != vectors.shape[:2]:  # of a client that sends token ids
            raise InputError(f"{KEPT_TOKENS} has the shape {list(kept.shape)}, and the ids {list(vectors.shape[:2])}")
        check_finite(TOKEN_VECTORS, np.where(kept[:, :, None], vectors, np.float32(0)))
        found = kept_vectors(vectors, kept, normalize=option(request, "NORMALIZE", self._spec.normalize))
        return counted(found, SERVED_VECTORS, self._spec.embedding_width)

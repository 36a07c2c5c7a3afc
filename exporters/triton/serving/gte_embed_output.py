"""gte_embed_output: converts pooled states to the embeddings that `Model.encode` returns.

The encoder gives both poolings, or a TensorRT plan only its own.

Shapes: B rows of a request, H hidden size, D dimensions kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import POOLINGS, Pooling
from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    check_finite,
    floats,
    option,
)
from gte_deploy.tasks.embed import EmbeddingRequest, check_pooling
from gte_deploy.text.inputs import check_integer


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings."""
        settings = Settings(args)
        self._spec = settings.spec
        self._inputs = settings.inputs

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`EMBEDDING` [B, D] for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        width = self._spec.embedding_width
        size = option(request, "TRUNCATE_DIM", self._spec.truncate_dim or width)
        check_integer("TRUNCATE_DIM", size, 1, width)
        pooling = option(request, "POOLING", self._spec.pooling)
        check_choice("POOLING", pooling, POOLINGS)
        check_pooling(self._spec, pooling)
        normalize = option(request, "NORMALIZE", False)
        pooled = self._pooled(request, pooling)
        check_finite("the embedding", pooled)
        wanted = EmbeddingRequest(self._spec, pooling, normalize=normalize, truncate_dim=size)
        return {"EMBEDDING": np.ascontiguousarray(wanted.finished(pooled))}

    def _pooled(self, request: Inputs, pooling: Pooling) -> NDArray[np.float32]:
        """Pooled states [B, H] from the encoder."""
        if (name := f"embedding_{pooling}") in self._inputs:
            return floats(request, name)
        raise InputError(
            f"this TensorRT plan pools by {self._spec.pooling!r}; for {pooling!r} use gte_token_embed, which plans "
            "exported with --outputs answer do not have"
        )

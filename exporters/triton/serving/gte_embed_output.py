"""gte_embed_output: pooled states to the embeddings that `Model.encode` returns.

The encoder's graph pools in both ways; a TensorRT plan gives its own pooling, or the hidden states to pool here.

Shapes: B rows of a request, S tokens, H hidden size, D dimensions kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the runtime's modules that lie beside this file, before any installed

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from gte_deploy.embedding import check_choice, check_pooling  # noqa: E402
from gte_deploy.errors import InputError  # noqa: E402
from gte_deploy.exporters.triton.serving.exchange import (  # noqa: E402
    Settings,
    answer_each,
    check_finite,
    floats,
    option,
    required,
)
from gte_deploy.inputs import check_integer  # noqa: E402
from gte_deploy.pooling import l2_normalize, pool  # noqa: E402
from gte_deploy.spec import POOLINGS  # noqa: E402


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

    def _answer(self, request: Any) -> dict[str, NDArray[Any]]:
        width = self._spec.embedding_width
        size = option(request, "TRUNCATE_DIM", self._spec.truncate_dim or width)
        check_integer("TRUNCATE_DIM", size, 1, width)
        embeddings = self._pooled(request, option(request, "POOLING", self._spec.pooling))
        check_finite("the embedding", embeddings)
        # The checkpoint's own Normalize module comes before the caller's truncation.
        embeddings = (l2_normalize(embeddings) if self._spec.normalize else embeddings)[:, :size]
        if option(request, "NORMALIZE", False):
            embeddings = l2_normalize(embeddings)
        return {"EMBEDDING": np.ascontiguousarray(embeddings)}

    def _pooled(self, request: Any, pooling: Any) -> NDArray[np.float32]:
        check_choice("POOLING", pooling, POOLINGS)
        check_pooling(self._spec, pooling)
        name = f"embedding_{pooling}"
        if name in self._inputs:
            return floats(request, name)
        if "last_hidden_state" in self._inputs:
            return pool(floats(request, "last_hidden_state"), required(request, "attention_mask"), pooling)
        raise InputError(f"this TensorRT plan pools by {self._spec.pooling!r}; for {pooling!r} take gte_token_embed")

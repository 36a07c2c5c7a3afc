"""gte_rerank_output: a classifier's logits to the scores that `Model.predict` returns.

Shapes: B rows of a request, L labels.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the runtime's modules that lie beside this file, before any installed

from numpy.typing import NDArray  # noqa: E402

from gte_deploy.activations import default_activation, softmax  # noqa: E402
from gte_deploy.exporters.triton.serving.exchange import (  # noqa: E402
    Settings,
    answer_each,
    check_finite,
    floats,
    option,
)


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings."""
        self._spec = Settings(args).spec

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`SCORE` and `LOGITS` [B, L] for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Any) -> dict[str, NDArray[Any]]:
        logits = floats(request, "logits")
        check_finite("logits", logits)
        scores = default_activation(self._spec.activation, self._spec.num_labels)(logits)
        if self._spec.num_labels > 1 and option(request, "APPLY_SOFTMAX", False):
            scores = softmax(scores)
        return {"SCORE": scores, "LOGITS": logits}

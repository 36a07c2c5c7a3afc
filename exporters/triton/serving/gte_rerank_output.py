"""gte_rerank_output: converts the logits of a classifier to the scores that `Model.predict` returns.

Shapes: B rows of a request, L labels.
"""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    check_finite,
    floats,
    option,
)
from gte_deploy.tasks.classify import ScoreRequest


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings."""
        self._spec = Settings(args).spec

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`SCORE` and `LOGITS` [B, L] for each request."""
        return answer_each(requests, self._answer)

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        logits = floats(request, "logits")
        check_finite("logits", logits)
        wanted = ScoreRequest(self._spec, apply_softmax=option(request, "APPLY_SOFTMAX", False))
        return {"SCORE": wanted.scores(logits), "LOGITS": logits}

"""Scores of texts and pairs by a classifier: from logits to the forms of CrossEncoder.predict.

Shapes: N inputs, B rows, L labels.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.activations import default_activation, softmax
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tasks.base import HIDDEN, Ensemble, Library, Outputs, ReturnType, Task, import_torch

logger = logging.getLogger(__name__)

ActivationFn = Callable[[Any], Any]
"""From logits [N, L] to scores of the same shape: a function of numpy arrays or of torch tensors, or a torch module."""

SERVED = Ensemble("gte_rerank", ("SCORE", "LOGITS"), ("APPLY_SOFTMAX",))


@dataclass(frozen=True)
class ScoreRequest:
    """The arguments of one call that say what to return.

    Args:
        spec: facts of the model.
        activation_fn: function applied to the logits; None for the checkpoint's own.
        apply_softmax: whether a softmax over several labels follows the activation.
        return_type: "numpy", one "tensor", or a "list of tensors".
    """

    spec: ModelSpec
    activation_fn: ActivationFn | None = None
    apply_softmax: bool = False
    return_type: ReturnType = "numpy"

    def check(self) -> None:
        """Refuse unsupported arguments, before any work.

        Raises:
            InputError: an argument has a wrong value; the message names the argument and the allowed values.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        if self.activation_fn is not None and not callable(self.activation_fn):
            raise InputError(
                f"activation_fn must be a function or a torch module, such as torch.nn.Sigmoid(), not "
                f"{self.activation_fn!r}"
            )
        if isinstance(self.activation_fn, type):
            raise InputError(f"activation_fn is the class {self.activation_fn.__name__}; give an instance of it")
        if self.return_type != "numpy":
            import_torch()

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`."""
        return ("logits",)

    def answer(self, batch: Batch, outputs: Outputs) -> list[NDArray[np.float32]]:
        """See `Request`: the logits [L] of each row. Activations see those of all rows at once, in `assemble`."""
        return list(outputs["logits"])

    def assemble(self, logits: Sequence[NDArray[np.float32]], *, single: bool) -> Any:
        """Return scores from the logits [L] of each input: [N] for one label, else [N, L]; one element if `single`."""
        scores = self.scores(np.stack(logits))
        if self.spec.num_labels == 1:
            scores = scores.reshape(len(logits))
        whole: Any = scores if self.return_type == "numpy" else import_torch().from_numpy(scores)
        if single:
            return whole[0]
        return list(whole) if self.return_type == "list of tensors" else whole

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the activation and, if requested, the softmax to logits [N, L]."""
        if self.activation_fn is None:
            scores = default_activation(self.spec.activation, self._labels_of_default())(logits)
        else:
            scores = _checked_scores(_activated(self.activation_fn, logits), logits)
        return softmax(scores) if self.apply_softmax and self.spec.num_labels > 1 else scores

    def _labels_of_default(self) -> int:
        """The number of labels that chooses the default activation: CrossEncoder has the sigmoid for one."""
        return self.spec.num_labels


def refuse_processes(pool: Any, chunk_size: Any) -> None:
    """Refuse CrossEncoder's arguments for several processes.

    Raises:
        InputError: one of them is given.
    """
    for name, value in (("pool", pool), ("chunk_size", chunk_size)):
        if value is not None:
            raise InputError(f"{name} is for CrossEncoder's pools of processes, which this has not; leave it out")


def former_arguments(activation_fn: Any, activation_fct: Any, num_workers: Any) -> Any:
    """Return the activation, given by its current or its former name; warn that `num_workers` has no effect."""
    if num_workers is not None:
        logger.warning("num_workers has no effect, as in CrossEncoder since its version 5.4")
    if activation_fct is not None:
        logger.warning("activation_fct is now called activation_fn")
    return activation_fct if activation_fn is None else activation_fn


def _activated(activation_fn: ActivationFn, logits: NDArray[np.float32]) -> NDArray[Any]:
    """Apply the activation to the logits, as an array or as a tensor, whichever it takes."""
    torch = sys.modules.get("torch")  # a torch module can only come from a process that has torch
    try:
        if torch is None or not isinstance(activation_fn, torch.nn.Module):
            try:
                return _as_array(activation_fn(logits.copy()))
            except Exception:
                # Functions of tensors fail for arrays in many ways: a wrong type, no such method, another meaning.
                if torch is None:
                    raise
        return _activated_tensor(torch, activation_fn, logits)
    except Exception as error:
        raise InputError(
            f"activation_fn failed for logits {list(logits.shape)}: {type(error).__name__}: {error}"
        ) from error


def _activated_tensor(torch: Any, activation_fn: ActivationFn, logits: NDArray[np.float32]) -> NDArray[Any]:
    with torch.inference_mode():
        return _as_array(activation_fn(torch.from_numpy(logits.copy())))


def _as_array(scores: Any) -> NDArray[Any]:
    if hasattr(scores, "detach"):
        scores = scores.detach().float().cpu()
    return np.asarray(scores)


def _checked_scores(scores: NDArray[Any], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shape = logits.shape
    if scores.shape != shape and not (shape[1] == 1 and scores.shape == shape[:1]):
        raise InputError(f"activation_fn gave the shape {list(scores.shape)} for logits {list(shape)}; keep the shape")
    if scores.dtype.kind not in "fiub":
        raise InputError(f"activation_fn gave {scores.dtype}, which are no scores; it must give floating-point numbers")
    scores = scores.astype(np.float32).reshape(shape)
    if np.isnan(scores).any():
        raise InputError("activation_fn gave NaN for finite logits; nothing of it is returned")
    return scores


CLASSIFY = Task(
    name="classify",
    outputs=("logits", HIDDEN),
    request=ScoreRequest,
    method="predict",
    architecture="ForSequenceClassification",
    ensembles=(SERVED,),
    has_labels=True,
    library=Library("CrossEncoder", "sequence-classification", "logits", "scores"),
)

"""Describes a task without torch: names, checks and answers of one call, and its tensors on a Triton server.

Each file of this package describes one task. Nothing here imports torch, an engine or the tokenizers library.

Shapes: B rows of a batch or of a request.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import MissingDependencyError
from gte_deploy.core.spec import LateInteraction, ModelSpec, Similarity, TaskName

HIDDEN = "last_hidden_state"
"""The output that a graph for any task has: the hidden states [B, S, H]."""

EMBEDDING = "sentence_embedding"
"""The output of tasks that pool the hidden states: [B, D], through any Dense modules."""

Outputs = Mapping[str, NDArray[np.float32]]
"""A backend's results for a batch, by the names of the graph's outputs."""

Tensors = Mapping[str, NDArray[Any]]
"""The tensors of a Triton request or response, by name."""

ReturnType = Literal["numpy", "tensor", "list of tensors"]

_Value = TypeVar("_Value")


class Request(Protocol):
    """The arguments of one call that decide the answer. One request holds for all batches of the call."""

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the outputs to compute, out of those that the backend offers."""
        ...

    def answer(self, batch: Batch, outputs: Outputs) -> Sequence[Any]:
        """One answer for each row of the batch, in the order of its rows."""
        ...


@dataclass(frozen=True)
class Ensemble:
    """The model on a Triton server that serves one use of a task.

    Args:
        name: name of the model on the server.
        outputs: names of the output tensors.
        options: names of the optional input tensors, apart from those that the tokenizer reads.
    """

    name: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """The description of a model for the task in sentence-transformers' checkpoint files.

    Args:
        model_type: class of the model.
        transformer_task: task of its Transformer module.
        method_output: output of transformers' forward that the module takes.
        module_output: name under which the module passes it on.
    """

    model_type: str
    transformer_task: str
    method_output: str
    module_output: str


@dataclass(frozen=True)
class Task:
    """One use of the encoder.

    Args:
        name: name in command lines, manifests and `ModelSpec.task`.
        outputs: names of the outputs of a graph for the task, in the order of the graph. The answer comes first, since
            many libraries take the first output of a graph; the hidden states come first for embeddings, because those
            libraries pool them.
        request: class of the requests of this task.
        architecture: the part after "New" or "Gte" in the `architectures` of a checkpoint's config.json; None if the
            task has no head of its own and uses the head of another task.
        ensembles: models on a Triton server that serve the task.
        has_labels: whether the head gives one logit for each of the checkpoint's labels.
        similarity: the function that compares two answers if the checkpoint names none.
        library: description in sentence-transformers' files; None if that library has no such model.
        method: the method of a model that gives the answer of the task.
        suits: decides from a spec whether a model can do the task; by default a model can if it is made for the task.
    """

    name: TaskName
    outputs: tuple[str, ...]
    request: Callable[..., Request]
    architecture: str | None = None
    ensembles: tuple[Ensemble, ...] = ()
    has_labels: bool = False
    similarity: Similarity | LateInteraction | None = None
    library: Library | None = None
    method: str = "encode"
    suits: Callable[[ModelSpec], bool] | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The names of the outputs besides the hidden states."""
        return tuple(name for name in self.outputs if name != HIDDEN)

    @property
    def pools(self) -> bool:
        """Whether a graph for the task gives a pooled embedding."""
        return EMBEDDING in self.outputs

    def can_run_on(self, spec: ModelSpec) -> bool:
        """Whether a model with this spec can do the task."""
        return spec.task == self.name if self.suits is None else self.suits(spec)


def import_torch() -> Any:
    """The module torch, which only tensors as results need.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependencyError("torch", "torch") from error
    return torch


def counted(rows: Sequence[NDArray[np.float32]], name: str, width: int) -> dict[str, NDArray[Any]]:
    """Return the rows [T, width] of each text as the tensor `name` [B, T, width], and `TOKENS` [B, 1], which counts."""
    counts = [len(row) for row in rows]
    together = np.zeros((len(rows), max(1, *counts), width), dtype=np.float32)
    for target, row in zip(together, rows, strict=True):
        target[: len(row)] = row
    return {"TOKENS": np.array(counts, dtype=np.int32)[:, None], name: together}


def from_counted(tensors: Tensors, name: str) -> list[NDArray[np.float32]]:
    """Return the rows that `counted` converted."""
    counts = tensors["TOKENS"][:, 0].tolist()
    return [values[:count] for values, count in zip(tensors[name], counts, strict=True)]


def filled(rows: Sequence[Sequence[_Value]], width: int, filler: _Value, dtype: Any) -> NDArray[Any]:
    """Rows of unequal length as [len(rows), width], with `filler` behind each."""
    result = np.full((len(rows), width), filler, dtype=dtype)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result

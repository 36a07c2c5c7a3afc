"""A target: what an export is made for. `gte_deploy.exporters.export` calls its methods in the order of this file.

A module of a target imports neither torch nor an engine at its top, since `gte-export --help` reads its options.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import Option, check_choices, options_given
from gte_deploy.core.spec import Engine, ModelSpec, Precision
from gte_deploy.exporters.job import Built, Job

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.verification.accuracy import Runs


@dataclass(frozen=True)
class NoOptions:
    """The options of a target that has none."""


@dataclass(frozen=True)
class Candidates:
    """What is compared with PyTorch.

    Args:
        runs: (engine, precision that it computes in) -> what runs batches.
        caveats: what this machine cannot verify, one sentence each.
    """

    runs: "Mapping[tuple[Engine, Precision], Runs]"
    caveats: Sequence[str] = ()


class Target(ABC):
    """Where a bundle is to run, with the options that only this target has."""

    name: ClassVar[str]
    """In `TARGETS`, and of `--target` where the format has several."""
    format: ClassVar[str]
    """What `--format` calls it: "onnx" or "trt"."""
    title: ClassVar[str]
    """A heading for `--help`."""
    engines: ClassVar[tuple[Engine, ...]]
    """What can run the bundle."""
    precisions: ClassVar[tuple[Precision, ...]]
    """The default first."""
    Options: ClassVar[type] = NoOptions
    """The dataclass of this target's own options; see `gte_deploy.core.options`."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check(self, precision: Precision) -> None:
        """Refuse options that do not go together, before anything is read.

        Raises:
            InputError: naming the option.
        """
        check_choices(self.options)
        for name, described in options_given(self.options):
            if (allowed := allowed_precisions(described, type(self))) and precision not in allowed:
                raise InputError(f"{name} is for precision {' and '.join(allowed)}, and the precision is {precision}")

    def check_model(self, spec: ModelSpec, precision: Precision) -> None:  # noqa: B027 - most refuse nothing
        """Refuse a model that this target cannot run, before its weights are loaded.

        Raises:
            InputError: saying what to do.
            ExportError, MissingDependencyError: this machine cannot build for the target.
        """

    @abstractmethod
    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Write graphs, and engines made of them, to `job.folder`.

        Args:
            graphs: the FP32 graphs of one trace: "onnxruntime" is fused, "openvino" has standard operators alone.
            job: the export.

        Raises:
            ExportError: an engine refuses the graph, or made of it what was not asked for.
        """

    @abstractmethod
    def candidates(self, built: Built, job: Job) -> AbstractContextManager[Candidates]:
        """Open what is compared with PyTorch: what users will run, or its emulation where this machine cannot."""

    def open(self, built: Built, job: Job) -> "Backend | None":
        """Open the engine that answers texts, as the runtime does; None where this machine cannot run it."""
        return None


@contextlib.contextmanager
def closing(opened: Mapping[Any, Any]) -> Any:
    """Yields `opened`, and closes its values in the end."""
    with ExitStack() as stack:
        for value in opened.values():
            stack.callback(value.close)
        yield opened


def allowed_precisions(described: Option, target: type[Target]) -> list[Precision]:
    """The precisions of a target that an option is for; empty for all."""
    return [precision for precision in target.precisions if precision in described.precisions]


def refuse_token_weights(spec: ModelSpec) -> None:
    """Refuse a sparse head of token weights on a GPU.

    Raises:
        InputError: naming the task that answers the same there.
    """
    if spec.sparse is not None and spec.sparse.head == "token-weights":
        raise InputError(
            "a token-weights head is pooled by ScatterElements with a maximum, which not every CUDA or TensorRT has. "
            "Export it with --task token-classify: encode_sparse answers the same there."
        )

"""The base class of a target: the engine and device that an export is for.

`gte_deploy.exporters.export` calls the methods in the order of this file. The module of a target imports neither torch
nor an engine at the top, because `gte-export --help` reads its options.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.core.options import Option, check_choices, options_given
from gte_deploy.core.spec import Engine, ModelSpec, Precision
from gte_deploy.exporters.job import Built, Job

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.verification.accuracy import Runs
    from gte_deploy.exporters.verification.checks import Check
    from gte_deploy.model import Model
    from gte_deploy.models.description import Description

PADDING_FREE_PASS = "packed_attention"
"""The pass in the sites of families, and in reports, for attention without padding."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a target that has none."""


@dataclass(frozen=True)
class Candidates:
    """The engines to compare with PyTorch.

    Args:
        runs: (engine, its compute precision) -> the object that runs batches.
        caveats: one sentence for each thing that this machine cannot verify.
        emulated: those of `runs` that emulate an engine which this machine cannot run, as reports call them.
        all_logits: those of `runs` with a graph for all logits -> the object that runs that graph.
        without_parts: those of `runs` that have the whole graph alone.
    """

    runs: "Mapping[tuple[Engine, Precision], Runs]"
    caveats: Sequence[str] = ()
    emulated: Collection[tuple[Engine, Precision]] = ()
    all_logits: "Mapping[tuple[Engine, Precision], Runs]" = field(default_factory=dict)
    without_parts: Collection[tuple[Engine, Precision]] = ()


class Target(ABC):
    """The engine and device that a bundle is for, with the options of this target."""

    name: ClassVar[str]
    """Its name in `TARGETS`, and for `--target` if the format has several targets."""
    format: ClassVar[str]
    """Its value of `--format`: "onnx", "executorch" or "trt"."""
    title: ClassVar[str]
    """A heading for `--help`."""
    engines: ClassVar[tuple[Engine, ...]]
    """The engines that can run the bundle."""
    precisions: ClassVar[tuple[Precision, ...]]
    """The precisions that it offers, the default first."""
    Options: ClassVar[type] = NoOptions
    """The dataclass of this target's own options; see `gte_deploy.core.options`."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check(self, precision: Precision) -> None:
        """Refuse options that contradict each other, before anything is read.

        Raises:
            InputError: the message names the option.
        """
        check_choices(self.options)
        self.check_precision(self.options, precision)

    def check_precision(self, options: Any, precision: Precision) -> None:
        """Refuse options that are for other precisions.

        Raises:
            InputError: the message names the option.
        """
        for name, described in options_given(options):
            if (allowed := allowed_precisions(described, type(self))) and precision not in allowed:
                raise InputError(f"{name} is for precision {' and '.join(allowed)}, and the precision is {precision}")

    def check_model(self, checkpoint: "Description", precision: Precision) -> None:  # noqa: B027 - most refuse nothing
        """Refuse a model that this target cannot run, before its weights are loaded.

        Raises:
            InputError: the model does not fit; the message says what to do.
            ExportError, MissingDependencyError: this machine cannot build for the target.
        """

    @abstractmethod
    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Write graphs, and engines built from them, to `job.folder`.

        Args:
            graphs: the FP32 graphs of one trace: "onnxruntime" is fused, "openvino" has only standard operators.
            job: the export.

        Raises:
            ExportError: an engine refuses the graph, or builds something else from it than requested.
        """

    @abstractmethod
    def candidates(self, built: Built, job: Job) -> AbstractContextManager[Candidates]:
        """Open the engines to compare with PyTorch, or their emulation if this machine cannot run them."""

    def finish(self, job: Job) -> "Sequence[Check]":
        """Write further files from the verified graphs, and return the checks of these files."""
        return ()

    def open_engine(self, built: Built, job: Job) -> "Backend | None":
        """Open the engine that the runtime takes by default; None if this machine cannot run it."""
        return None

    def open(self, built: Built, job: Job) -> "Model":
        """Open the folder of the bundle as the runtime will; on PyTorch if this machine cannot run its engine."""
        from gte_deploy.backends.torch import TorchBackend
        from gte_deploy.loading import open_folder

        backend = self.open_engine(built, job)
        return open_folder(job.folder, TorchBackend(job.model, job.spec) if backend is None else backend, job.spec)


@contextlib.contextmanager
def closing(opened: Mapping[Any, Any]) -> Any:
    """Yield `opened`, and close its values at the end."""
    with ExitStack() as stack:
        for value in opened.values():
            stack.callback(value.close)
        yield opened


def allowed_precisions(described: Option, target: type[Target]) -> list[Precision]:
    """The precisions of a target for which an option exists; empty for all."""
    return [precision for precision in target.precisions if precision in described.precisions]


def has_padding_free(checkpoint: "Description") -> bool:
    """Whether the model's graph can be padding-free: as the sites of its family say, and if no padding is scored."""
    return PADDING_FREE_PASS in checkpoint.sites and not _scores_unattended(checkpoint)


def _scores_unattended(checkpoint: "Description") -> bool:
    multi_vector = checkpoint.spec.multi_vector
    return multi_vector is not None and multi_vector.scores_unattended


def require_padding_free(checkpoint: "Description") -> None:
    """Refuse to remove the padding of a model that scores it, or whose attention has no padding-free form.

    Raises:
        ExportError: the message names the model type and the positions of its family, or the tokens that are scored.
    """
    if _scores_unattended(checkpoint):
        raise ExportError(
            "padding cannot be removed from a model that scores the tokens that lengthen queries, to which no token "
            "attends: they are computed as padding is. Export with padding='keep'."
        )
    if not has_padding_free(checkpoint):
        raise ExportError(
            f"padding cannot be removed from models of model_type {checkpoint.config.model_type!r}, which have "
            f"{checkpoint.family.positions} positions: attention without padding is built for rotary positions and "
            "layers like those of GTE. Export with padding='keep'."
        )


def refuse_token_weights(spec: ModelSpec) -> None:
    """Refuse a sparse head of token weights on a GPU. A hybrid model's graph gives one weight for each token instead.

    Raises:
        InputError: the message names the task that gives the same answers on a GPU.
    """
    if spec.task == "sparse" and spec.sparse is not None and spec.sparse.head == "token-weights":
        raise InputError(
            "a token-weights head needs ScatterElements with a maximum, which not every CUDA or TensorRT has. "
            "Export it with --task token-classify or --task hybrid: encode_sparse then gives the same answers."
        )

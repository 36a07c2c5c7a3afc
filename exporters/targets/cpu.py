"""The target "cpu": a fused graph for ONNX Runtime and one of standard operators for OpenVINO, with shared weights."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args

from gte_deploy.core.errors import MissingDependencyError
from gte_deploy.core.options import option
from gte_deploy.core.spec import Engine, ModelSpec, Precision
from gte_deploy.exporters.job import GRAPH_PATHS, WEIGHTS_PATH, Built, Job
from gte_deploy.exporters.targets.base import Candidates, Target, closing
from gte_deploy.exporters.targets.calibration import CalibrationOptions
from gte_deploy.exporters.targets.openvino_ir import OpenVinoIr, check_ir, write_ir

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.quantization.int8 import Activations
    from gte_deploy.exporters.quantization.recipes import Quantized
    from gte_deploy.exporters.verification.accuracy import Runs
    from gte_deploy.exporters.verification.checks import Check
    from gte_deploy.models.description import Description


KEPT_IN_FP32: Collection[Precision] = ("fp32", "bf16")
"""The precisions whose graphs are those of FP32. OpenVINO rounds them to bfloat16 when it compiles them."""

_ONNXRUNTIME: tuple[Engine, Precision] = ("onnxruntime", "fp32")
_OPENVINO_FP32: tuple[Engine, Precision] = ("openvino", "fp32")
_OPENVINO_BF16: tuple[Engine, Precision] = ("openvino", "bf16")
_EMULATED = (
    "openvino bf16 was emulated, because this CPU does not compute in bfloat16: ONNX Runtime ran its whole graph with "
    "the inputs and the result of every operator rounded to bfloat16, and sums in FP32. OpenVINO itself did not run in "
    "bfloat16."
)


@dataclass(frozen=True)
class OpenVinoOptions(CalibrationOptions):
    """The files for OpenVINO besides its ONNX graph.

    Args:
        openvino_ir: "model" also writes openvino/openvino_model.xml and .bin, a second copy of the weights, which
            optimum-intel and sentence-transformers open; "genai" the tokenizer too, for OpenVINO GenAI.
    """

    openvino_ir: OpenVinoIr | None = option(
        None,
        "also write OpenVINO's own format: 'model' for optimum-intel and sentence-transformers, 'genai' with the "
        "tokenizer for OpenVINO GenAI; it stores the weights a second time",
        choices=get_args(OpenVinoIr),
        precisions=("fp32", "bf16", "int8"),
        not_for=("triton",),
    )


@dataclass(frozen=True)
class CpuOptions(OpenVinoOptions):
    """Options for the graphs of a lower precision.

    Args:
        activations: the ranges of activations in ONNX Runtime's INT8 graph. "static" takes them from the calibration
            texts, so that the answer for a row does not depend on its batch; "dynamic" takes them from each batch.
            OpenVINO's graph is always static.
        reduce_range: whether weights have 7 bits, for CPUs without VNNI.
    """

    activations: "Activations" = option(
        "static",
        "ranges of ONNX Runtime's activations, from the calibration texts or from each batch",
        choices=("static", "dynamic"),
        precisions=("int8",),
    )
    reduce_range: bool = option(False, "quantize weights to 7 bits, for CPUs without VNNI", precisions=("int8",))


class CpuTarget(Target):
    """See the module."""

    name: ClassVar[str] = "cpu"
    format: ClassVar[str] = "onnx"
    title: ClassVar[str] = "a CPU (--target cpu)"
    engines: ClassVar[tuple[Engine, ...]] = ("onnxruntime", "openvino")
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "int8", "int8-weight", "int4-weight")
    Options: ClassVar[type] = CpuOptions
    options: CpuOptions

    def check_model(self, checkpoint: "Description", precision: Precision) -> None:
        """Require openvino for bf16, which no other engine computes in on a CPU, and for its own format."""
        check_ir(self.options.openvino_ir, checkpoint.spec)
        if precision == "bf16":
            require_openvino()

    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Quantize the graphs if requested, and save them."""
        graphs, caveats = for_openvino(graphs, job), []
        if importlib.util.find_spec("openvino") is None:
            del graphs["openvino"]
            caveats.append("openvino is not installed here, so the bundle holds no graph for it.")
        if job.precision in KEPT_IN_FP32:
            return dataclasses.replace(save(graphs, job, with_all_logits=True), caveats=caveats)
        quantized = quantized_graphs(graphs, job, self.options)
        if len(quantized.graphs) < len(graphs):
            caveats.append(f"{job.precision} has a graph only for ONNX Runtime.")
        return save_quantized(quantized, quantized.graphs, job, caveats)

    @contextlib.contextmanager
    def candidates(self, built: Built, job: Job) -> Iterator[Candidates]:
        """Every engine of the bundle, in every precision that this CPU computes in."""
        from gte_deploy.backends.onnxruntime import OnnxBackend

        opened: dict[tuple[Engine, Precision], Runs] = {_ONNXRUNTIME: self.open_engine(built, job)}
        every = _all_logits(built, job, "onnxruntime")
        of_all: dict[tuple[Engine, Precision], Runs] = {} if every is None else {_ONNXRUNTIME: OnnxBackend(*every)}
        with closing(opened), closing(of_all):
            if "openvino" not in built.graphs:
                yield Candidates(opened, all_logits=of_all)
                return
            with openvino_candidates(built, job) as openvino:
                yield dataclasses.replace(
                    openvino, runs={**opened, **openvino.runs}, all_logits={**of_all, **openvino.all_logits}
                )

    def finish(self, job: Job) -> "Sequence[Check]":
        """Write the model in OpenVINO's own format, if the options ask for it."""
        return write_ir(job, self.options.openvino_ir)

    def open_engine(self, built: Built, job: Job) -> "Backend":
        """Open ONNX Runtime, the default engine."""
        from gte_deploy.backends.onnxruntime import OnnxBackend

        return OnnxBackend(job.graph_files(built, "onnxruntime"), job.spec)


def require_openvino() -> None:
    """Require openvino, without which a precision could not be verified.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("openvino") is None:
        raise MissingDependencyError("openvino", "openvino")


def for_openvino(graphs: "Mapping[Engine, Graph]", job: Job) -> "dict[Engine, Graph]":
    """The graphs of an export, with the plain one in the form that OpenVINO runs."""
    from gte_deploy.exporters.graph.build import openvino_graph

    return {**graphs, "openvino": openvino_graph(graphs["openvino"], job.sites)}


def quantized_graphs(graphs: "Mapping[Engine, Graph]", job: Job, options: OpenVinoOptions) -> "Quantized":
    """The FP32 graphs in the precision of the job."""
    from gte_deploy.exporters.quantization.recipes import quantize_graphs

    of_onnx = options if isinstance(options, CpuOptions) else CpuOptions()
    with job.steps(f"quantize to {job.precision}"):
        return quantize_graphs(
            graphs,
            job.precision,
            spec=job.spec,
            tokenizer=job.tokenizer,
            calibration=job.texts.calibration,
            activations=of_onnx.activations,
            reduce_range=of_onnx.reduce_range,
            progress=job.steps.report,
        )


def save_quantized(quantized: "Quantized", engines: Collection[Engine], job: Job, caveats: Sequence[str] = ()) -> Built:
    """Write the graphs for `engines` to the folder of the bundle.

    Raises:
        ParityError: no layer may be INT8, and `bounds` is "strict".
    """
    if quantized.sweep is not None:
        job.require_kept_bounds(quantized.sweep.failure)
    built = save({engine: quantized.graphs[engine] for engine in engines}, job, with_all_logits=True)

    def finer() -> Built:
        assert quantized.finer is not None  # checked below
        with job.steps(f"quantize to {job.precision}"):
            found = quantized.finer()
        return save_quantized(found, engines, job, caveats)

    sweep = quantized.sweep
    return dataclasses.replace(
        built,
        sensitivity={} if sweep is None else sweep.loss,
        kept_groups=() if sweep is None else sweep.kept_groups,
        caveats=caveats,
        finer=finer if quantized.finer else None,
        calibration=quantized.calibration,
    )


def save(graphs: "Mapping[Engine, Graph]", job: Job, *, with_all_logits: bool = False) -> Built:
    """Write graphs and their parts over one weights file to the folder of the bundle.

    `with_all_logits` also writes the graphs of `all_logits_graph`, if those of the model need mask positions.
    """
    # The module and not its function, because a test replaces the function.
    from gte_deploy.exporters.graph import build as graph_module
    from gte_deploy.exporters.graph.all_logits import all_logits_graph, needs_mask_positions
    from gte_deploy.exporters.graph.parts import parts_of

    with job.steps("write the graphs"):
        weights = job.folder / WEIGHTS_PATH
        weights.parent.mkdir(exist_ok=True)
        has_all = with_all_logits and needs_mask_positions(job.spec)
        built = Built(
            graphs,
            parts={engine: parts_of(graph, job.spec) for engine, graph in graphs.items()},
            all_logits={engine: all_logits_graph(graph) for engine, graph in graphs.items() if has_all},
        )
        files = {job.folder / GRAPH_PATHS[engine]: graph for engine, graph in built.all_logits.items()}
        for engine in graphs:
            files |= job.saved_graphs(built, engine)
        graph_module.save_graphs(files, weights)
    return built


def _all_logits(built: Built, job: Job, engine: Engine) -> tuple[Path, ModelSpec] | None:
    """The file of an engine's graph with all logits, and the spec to open it with; None if there is none."""
    if engine not in built.all_logits:
        return None
    return job.folder / GRAPH_PATHS[engine], dataclasses.replace(job.spec, logits="all")


@contextlib.contextmanager
def openvino_candidates(built: Built, job: Job) -> Iterator[Candidates]:
    """Open OpenVINO's graph in FP32 and in bfloat16; the latter as an emulation where this CPU does not compute in it.

    The emulation takes the time of a further engine, so an FP32 bundle, which runs in bfloat16 only on request, does
    without it.
    """
    from gte_deploy.backends.openvino import OpenVinoBackend, has_native_bf16

    files = job.graph_files(built, "openvino")
    opened: dict[tuple[Engine, Precision], Runs] = {_OPENVINO_FP32: OpenVinoBackend(files, job.spec, precision="fp32")}
    every = _all_logits(built, job, "openvino")
    # In FP32 alone: in bfloat16, the same operators round as they do in the graph with masked logits.
    of_all: dict[tuple[Engine, Precision], Runs] = {} if every is None else {_OPENVINO_FP32: OpenVinoBackend(*every)}
    caveats: list[str] = []
    emulated: list[tuple[Engine, Precision]] = []
    if has_native_bf16():
        opened[_OPENVINO_BF16] = OpenVinoBackend(files, job.spec, precision="bf16")
    elif job.precision in ("bf16", "int8"):
        from gte_deploy.exporters.verification.emulated_onnx import EmulatedOnnx
        from gte_deploy.exporters.verification.emulation import bf16_emulation
        from gte_deploy.exporters.verification.parity import LONGEST_OPTIONAL_EMULATION

        heads = job.model.config.num_attention_heads
        opened[_OPENVINO_BF16] = EmulatedOnnx(bf16_emulation(built.graphs["openvino"]), job.spec, num_heads=heads)
        caveats, emulated = [_EMULATED], [_OPENVINO_BF16]
        if job.precision == "int8" and job.spec.max_length > LONGEST_OPTIONAL_EMULATION:
            caveats.append(f"The emulation had inputs of at most {LONGEST_OPTIONAL_EMULATION:,} tokens.")
    else:
        caveats = ["openvino bf16 was not compared: this CPU does not compute in bfloat16."]
    with closing(opened), closing(of_all):
        yield Candidates(opened, caveats, emulated, of_all, without_parts=emulated)

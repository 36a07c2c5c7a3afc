"""The target "tensorrt": an engine of TensorRT or TensorRT-RTX, compiled from a typed graph."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.core.spec import Engine, ModelSpec, Precision, Profile
from gte_deploy.exporters.job import GRAPH_PATHS, Built, Job
from gte_deploy.exporters.targets.base import Candidates, Target, refuse_token_weights
from gte_deploy.exporters.targets.tensorrt.layouts import TEXT_LAYOUTS, TextLayout, trtexec_line
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.profiles import read_lengths
from gte_deploy.exporters.targets.tensorrt.runtimes import NO_ENGINE, Runtime, choose_runtime, resolve_capabilities

if TYPE_CHECKING:
    from gte_deploy.backends.base import Batch
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx, PaddingFreeOnnx
    from gte_deploy.exporters.targets.tensorrt.precision import QuantizedGemms
    from gte_deploy.exporters.verification.accuracy import Runs
    from gte_deploy.models.description import Description
    from gte_deploy.tasks.base import Outputs

_ENGINE_NOT_RUN = (
    "The comparison ran the ONNX graph that the engine was compiled from, with ONNX Runtime on the CPU; the engine "
    "itself runs only on its GPUs."
)

_THEN_ADOPT = "Then make it part of the bundle, on the same machine: gte-export adopt model.plan ."


_UNFUSED_IN_RTX = "TensorRT-RTX leaves FP8 attention unfused in profiles that take short texts"
_FP8_ATTENTION_NOT_BUILT = (
    "Attention is quantized to FP8 in the form that NVIDIA's ModelOpt writes for ordinary TensorRT. The comparison ran "
    "this arithmetic on the CPU; no engine with FP8 attention has been built or run in the tests of this project."
)

_STATES_OF_WHOLE = (
    "The engine gives no hidden states (--outputs answer). Those whose accuracy on text was measured come from the "
    "whole graph, of which the engine's graph is a part."
)


class TensorRTTarget(Target):
    """See the module."""

    name: ClassVar[str] = "tensorrt"
    format: ClassVar[str] = "trt"
    title: ClassVar[str] = "TensorRT (--format trt)"
    engines: ClassVar[tuple[Engine, ...]] = ("tensorrt",)
    precisions: ClassVar[tuple[Precision, ...]] = ("fp16", "bf16", "int8", "fp8")
    Options: ClassVar[type] = TensorRTOptions
    options: TensorRTOptions

    @property
    def layout(self) -> TextLayout:
        """How the engine's tensors hold texts."""
        return TEXT_LAYOUTS[self.options.padding]

    def check(self, precision: Precision) -> None:
        """Check the calibrator and the source of the profiles."""
        super().check(precision)
        if precision == "fp8" and self.options.calibrator == "entropy":
            raise InputError("calibrator entropy is for 128 integer levels; use max or percentile for fp8")
        if self.options.profiles and self.options.lengths is not None:
            raise InputError("profiles come from --profile or from --lengths, not from both")
        if self.options.fp8_attention and self.options.padding == "remove":
            raise InputError("fp8_attention is for engines with padding; leave out --fp8-attention or --padding remove")
        if self.options.fp8_attention and self.options.runtime == "rtx":
            raise InputError(f"fp8_attention is for ordinary TensorRT, and the runtime is rtx: {_UNFUSED_IN_RTX}")

    def check_model(self, checkpoint: "Description", precision: Precision) -> None:
        """Check that the layout and the profiles fit the model, and that a TensorRT can build here."""
        self.layout.check_model(checkpoint)
        refuse_token_weights(checkpoint.spec)
        if self.options.outputs == "answer":
            _require_answer_part(checkpoint)
        self._profiles(checkpoint.spec)
        if (runtime := self._runtime()) is not None:
            if self.options.fp8_attention and runtime.variant == "tensorrt-rtx":
                raise ExportError(
                    f"fp8_attention is for ordinary TensorRT, and {runtime.title} was chosen because {runtime.reason}: "
                    f"{_UNFUSED_IN_RTX}. Leave out --fp8-attention, or write the graph with --onnx-only."
                )
            resolve_capabilities(runtime, self.options.compute_capabilities, precision)

    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Write the graph in the precision of the job, and compile the engine from it."""
        gemms: QuantizedGemms | None = None
        if job.precision in ("int8", "fp8"):
            from gte_deploy.exporters.targets.tensorrt.precision import choose_gemms

            with job.steps(f"choose the layers in {job.precision}"):
                gemms = choose_gemms(graphs, job, self.options)
        return self._build(graphs, job, gemms)

    def _build(self, graphs: "Mapping[Engine, Graph]", job: Job, gemms: "QuantizedGemms | None") -> Built:
        from gte_deploy.exporters.graph.build import save_graph
        from gte_deploy.exporters.graph.parts import parts_of
        from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph

        if gemms is not None:
            job.require_kept_bounds(gemms.sweep.failure)
        scheme = None if gemms is None else gemms.scheme
        with job.steps(f"write the graph in {job.precision}"):
            whole = tensorrt_graph(
                graphs["openvino"], job.precision, sites=job.sites, scheme=scheme, layout=self.layout
            )
            graph = parts_of(whole, job.spec)["answer"] if self.options.outputs == "answer" else whole
            file = job.graph_file("tensorrt")
            file.parent.mkdir(exist_ok=True)
            save_graph(graph, file)
        made = Built(
            {"tensorrt": graph},
            {} if gemms is None else gemms.sweep.loss,
            () if gemms is None else gemms.sweep.kept_groups,
            finer=None if gemms is None else lambda: self._build(graphs, job, gemms.finer()),
            calibration=None if gemms is None else gemms.calibration,
            whole=None if graph is whole else whole,
        )
        runtime, profiles = self._runtime(), self._profiles(job.spec)
        if runtime is None:
            line = trtexec_line(GRAPH_PATHS["tensorrt"], profiles, graph.inputs, workspace=self.options.workspace)
            advice = f"{NO_ENGINE} Build it on its GPU, in the folder of the bundle, with:\n{line}\n{_THEN_ADOPT}"
            return dataclasses.replace(made, caveats=[advice])
        from gte_deploy.exporters.targets.tensorrt.engine import build_plan

        job.steps.report(f"build with {runtime.title}: {runtime.reason}")
        with job.steps(f"build the engine with {runtime.title}"):
            plan = build_plan(
                file,
                job.folder,
                runtime,
                self.options,
                graph=graph,
                num_layers=job.num_layers,
                compute_capabilities=resolve_capabilities(runtime, self.options.compute_capabilities, job.precision),
                profiles=profiles,
            )
        for caveat in plan.caveats:
            job.steps.report(caveat)
        caveats = [_ENGINE_NOT_RUN, *plan.caveats]
        return dataclasses.replace(made, plan=plan, keeps_graphs=self.options.keep_onnx, caveats=caveats)

    @contextlib.contextmanager
    def candidates(self, built: Built, job: Job) -> Iterator[Candidates]:
        """The graph of the engine, run by ONNX Runtime on the CPU."""
        caveats = [*self.layout.caveats(), *([_FP8_ATTENTION_NOT_BUILT] if self.options.fp8_attention else [])]
        with contextlib.ExitStack() as stack:
            runs: Runs = stack.enter_context(self._emulation(built.graphs["tensorrt"], job))
            if built.whole is not None:
                names = [tensor.name for tensor in built.graphs["tensorrt"].outputs]
                runs = _AnswersAndStates(runs, names, stack.enter_context(self._emulation(built.whole, job)))
                caveats.append(_STATES_OF_WHOLE)
            key: tuple[Engine, Precision] = ("tensorrt", job.precision)
            yield Candidates({key: runs}, caveats, emulated=[key])

    def _emulation(self, graph: "Graph", job: Job) -> "contextlib.closing[PaddedOnnx | PaddingFreeOnnx]":
        emulation = self.layout.emulation(
            graph, job.spec, profiles=self._profiles(job.spec), num_heads=job.model.config.num_attention_heads
        )
        return contextlib.closing(emulation)

    def _runtime(self) -> Runtime | None:
        """The TensorRT that builds the engine; None if no engine is wanted."""
        if self.options.onnx_only:
            return None
        runtime = choose_runtime(self.options.runtime)
        self.layout.check_runtime(runtime)
        return runtime

    def _profiles(self, spec: ModelSpec) -> tuple[Profile, ...]:
        lengths = [] if self.options.lengths is None else read_lengths(self.options.lengths)
        return self.layout.profiles(self.options.profiles, lengths, spec.max_length)


@dataclass(frozen=True)
class _AnswersAndStates:
    """Runs a graph of answers, and for hidden states the whole graph that it is a part of.

    Args:
        answers: runs the graph of answers.
        names: the outputs of that graph.
        whole: runs the whole graph.
    """

    answers: "Runs"
    names: Sequence[str]
    whole: "Runs"

    def run(self, batch: "Batch", outputs: Sequence[str]) -> "Outputs":
        """See `Backend.run`."""
        own, others = ([name for name in outputs if (name in self.names) is wanted] for wanted in (True, False))
        found = self.answers.run(batch, own) if own else {}
        return {**found, **(self.whole.run(batch, others) if others else {})}


def _require_answer_part(checkpoint: "Description") -> None:
    """Refuse an engine of answers for a model whose answer needs the last layer's states of all tokens.

    Raises:
        InputError: the message says for which models there are such engines, and what to do.
    """
    from gte_deploy.exporters.graph.parts import reads_few_rows

    spec = checkpoint.spec
    pools_all = spec.task == "classify" and checkpoint.family.classifier_pooling(checkpoint.config) != "cls"
    if pools_all or not reads_few_rows(spec):
        asked = {
            "embed": f"{spec.pooling} pooling",
            "fill-mask": f"logits {spec.logits!r}",
            "classify": "a classifier of the mean of all tokens",
        }
        raise InputError(
            "outputs 'answer' is for embeddings with CLS pooling, for task classify, and for fill-mask with logits "
            f"'masked'; {asked.get(spec.task, f'task {spec.task}')} needs the last layer's states of every token. "
            "Leave out --outputs answer."
        )

"""Checkpoint -> graph -> proof -> bundle: the whole export, from top to bottom."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gte_deploy.bundle import GraphEntry, Manifest, PlanEntry
from gte_deploy.errors import InputError, MissingDependencyError
from gte_deploy.exporters.answers import Asked, check_bundle
from gte_deploy.exporters.bundle_writer import publish, seal, staging
from gte_deploy.exporters.cuda_options import CUDA_PRECISIONS, PADDINGS, removes_padding
from gte_deploy.exporters.profiles import (
    check_packed_profiles,
    check_profiles,
    default_profiles,
    packed_profiles,
    profiles_for_lengths,
    read_lengths,
)
from gte_deploy.exporters.source_libraries import library_of
from gte_deploy.exporters.tensorrt_engine import (
    TensorRTOptions,
    build_plan,
    choose_runtime,
    require_padding_free,
    resolve_targets,
    trtexec_line,
)
from gte_deploy.exporters.text_batches import ROUNDS, builtin_texts, read_texts, text_batches
from gte_deploy.files import sha256_file
from gte_deploy.models import BUILTIN_NAME, resolve_checkpoint
from gte_deploy.models.description import Description, describe
from gte_deploy.models.sparse_modules import read_query_weights
from gte_deploy.spec import (
    LOGITS,
    POOLINGS,
    TARGETS,
    TASKS,
    ComputePrecision,
    Engine,
    Logits,
    ModelSpec,
    Precision,
    Profile,
    Target,
)
from gte_deploy.tokenization import TextTokenizer

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph import Graph
    from gte_deploy.exporters.lower_precision import Quantized
    from gte_deploy.exporters.parity import Bounds, ParityReport
    from gte_deploy.exporters.quantize import Activations
    from gte_deploy.exporters.text_batches import TextBatch

MIN_LENGTH = 8
GRAPH_PATHS: Mapping[Engine, str] = {
    "onnxruntime": "onnx/model.onnx",
    "openvino": "onnx/model_openvino.onnx",
    "tensorrt": "onnx/model_tensorrt.onnx",
}
WEIGHTS_PATH = "onnx/model.onnx.data"
FORMATS = ("onnx", "trt")
FORMAT_PRECISIONS: Mapping[str, tuple[Precision, ...]] = {
    "onnx": ("fp32", "int8", "int8-weight", "int4-weight"),
    "trt": ("fp16", "bf16", "int8", "fp8"),
}
"""Format -> its precisions, the default first."""
ACTIVATIONS = ("static", "dynamic")
BOUNDS = ("strict", "report")
EVALUATION_TOKENS = 6000
"""Words of text on which a lower precision's accuracy is measured, in texts and again in windows."""
_EXTRA = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "matplotlib",
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where the bundle is, what its manifest says, and how its graphs compared with PyTorch."""

    path: Path
    manifest: Manifest
    parity: "ParityReport"


def export(
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "onnx",
    target: str = "cpu",
    task: str = "auto",
    precision: str | None = None,
    max_length: int | None = None,
    pooling: str = "auto",
    logits: str = "masked",
    opset: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    activations: str = "static",
    reduce_range: bool = False,
    padding: str = "auto",
    tensorrt: TensorRTOptions | None = None,
    bounds: str = "strict",
    force: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a checkpoint to a verified bundle.

    Args:
        model: checkpoint folder, hub id or preset name; None for the built-in model.
        output: folder of the bundle; None for one named after model, format and precision in the working directory.
        format: "onnx" for ONNX Runtime and OpenVINO, "trt" for a TensorRT engine.
        target: of format onnx, "cpu", or "cuda" for a graph that ONNX Runtime's CUDA provider runs well.
        task: "fill-mask", "embed", "classify", "token-classify", "sparse", or "auto" for what the checkpoint was made
            for.
        precision: for ONNX "fp32"; "int8" (weights and activations); "int8-weight" or "int4-weight" (weights alone, for
            small disks). For TensorRT "fp16", "bf16", "int8" or "fp8"; for target cuda "fp16", "bf16" or "fp32". None
            for the first of these.
            docs/numerics.md compares them.
        max_length: longest input in tokens; None for the checkpoint's own limit.
        pooling: "mean", "cls", or "auto" for what the checkpoint says.
        logits: "masked" computes the vocabulary logits of the masks alone, "all" those of every token (fill-mask).
        opset: ONNX opset of the graph; None for the default.
        calibration: for int8 and fp8, a UTF-8 file with one text a line, like those that will be served; None for
            English prose that comes along.
        activations: for int8 on ONNX Runtime, "static" (ranges of the calibration texts: a row's answer does not
            depend on its batch) or "dynamic" (ranges of each batch). OpenVINO's graph is always static.
        reduce_range: for int8, weights of 7 bits, for CPUs without VNNI.
        padding: for target cuda, "remove", "keep", or "auto" for what suits the precision; see `cuda_graph`. For format
            trt, "remove" is for ordinary TensorRT from 11.1 on, see `tensorrt_packed`, and "auto" keeps it.
        tensorrt: what the engine is built with and for; see `TensorRTOptions`.
        bounds: what happens where a bound is missed or a check fails: "strict" raises and leaves no bundle; "report"
            writes it with its misses in the manifest, the report and `gte-deploy info`, and loading it warns. What
            gives numbers that are not finite, has other shapes or does not run is not written either way.
        force: replace a bundle that is there already.
        progress: called with one line at every step.

    Raises:
        InputError: an argument is out of range.
        CheckpointError, ConfigError: the checkpoint cannot be read, or asks for what is not honoured.
        ParityError: an engine differs from PyTorch by more than its bound, or a check fails; no bundle is left.
        ExportError: the target must not be replaced, or the graph could not be built.
        MissingDependencyError: the [export] extra is not installed.
    """
    _check_choice("format", format, FORMATS)
    _check_choice(f"target of format {format}", target, TARGETS if format == "onnx" else ("cpu",))
    precisions = CUDA_PRECISIONS if target == "cuda" else FORMAT_PRECISIONS[format]
    precision = precisions[0] if precision is None else precision
    for name, value, allowed in (
        ("task", task, ("auto", *TASKS)),
        (f"precision of format {format}, target {target}", precision, precisions),
        ("pooling", pooling, ("auto", *POOLINGS)),
        ("logits", logits, LOGITS),
        ("activations", activations, ACTIVATIONS),
        ("bounds", bounds, BOUNDS),
    ):
        _check_choice(name, value, allowed)
    if target == "cuda":
        removes_padding(precision, padding)
    elif format == "trt":
        _check_choice("padding", padding, PADDINGS)
    elif padding != "auto":
        raise InputError(f"padding is {padding!r}; it is for target cuda and for format trt")
    lower = _LowerPrecision(
        cast(Precision, precision),
        None if calibration is None else read_texts(Path(calibration)),
        cast("Activations", activations),
        reduce_range,
    )
    _require_extra()
    steps = _Steps(progress or (lambda line: None))
    kind = "cuda" if target == "cuda" else format
    path = Path(output if output is not None else default_output(model, format=kind, precision=precision))
    # The real path: a rename over a link would replace the link.
    place = Path(os.path.realpath(path))
    with staging(place, force=force) as folder:
        with steps("read the checkpoint"):
            checkpoint = _describe(
                resolve_checkpoint(model), task=task, pooling=pooling, logits=logits, max_length=max_length, steps=steps
            )
            source = _source_of(model, checkpoint)
            asked = Asked(pooling=pooling, limit="own" if max_length is None else "asked")
        _check_sparse(
            checkpoint.spec,
            on_gpu=format == "trt" or target == "cuda",
            padding_free=format == "trt" and padding == "remove",
        )
        if format == "trt":
            options = tensorrt or TensorRTOptions()
            removes = padding == "remove"
            made = _build(checkpoint, folder, lower, options, padding_free=removes, opset=opset, steps=steps)
        elif target == "cuda":
            made = _prove_cuda(checkpoint, folder, lower.precision, padding, opset=opset, steps=steps)
        else:
            made = _prove(checkpoint, folder, lower, opset=opset, steps=steps)
        made.parity.require(cast("Bounds", bounds))
        with steps("write the bundle"):
            manifest, parity = _write_bundle(
                folder,
                checkpoint,
                made=made,
                asked=asked,
                bounds=cast("Bounds", bounds),
                source=source,
                steps=steps,
            )
        steps.tell(f"rename to {path}")
        publish(folder, place, force=force)
    return ExportResult(path=path, manifest=manifest, parity=parity)


def default_output(model: str | os.PathLike[str] | None, *, precision: str, format: str = "onnx") -> Path:
    """The folder named after model, format and precision in the working directory, e.g. gte-en-mlm-tiny-onnx-fp32."""
    return Path(f"{_name_of(model)}-{format}-{precision}")


@dataclass
class _Steps:
    """Tells each step's name as it starts and keeps how long it took."""

    tell: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.tell(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class _LowerPrecision:
    """The precision asked for, and how it is to be made; see `export`."""

    precision: Precision
    calibration: Sequence[str] | None
    activations: "Activations"
    reduce_range: bool


@dataclass(frozen=True)
class _Made:
    """What stands in the folder of a bundle that is not described yet.

    Args:
        graphs: engine -> graph; `keeps_graphs` says whether their files stay.
        parity: not judged yet.
        sensitivity: what a sweep measured, if one was needed.
        plan: the TensorRT engine, if there is one.
        target: what ONNX Runtime's graph is made for.
    """

    graphs: Mapping[Engine, "Graph"]
    parity: "ParityReport"
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    plan: PlanEntry | None = None
    keeps_graphs: bool = True
    target: Target = "cpu"


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _require_extra() -> None:
    for module in _EXTRA:
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, "export")


def _check_sparse(spec: ModelSpec, *, on_gpu: bool, padding_free: bool) -> None:
    if spec.sparse is None:
        return
    if padding_free:
        raise InputError(
            "padding 'remove' is not for task sparse with format trt: its head pools padded rows. Keep it."
        )
    if spec.sparse.head == "token-weights" and on_gpu:
        raise InputError(
            "a token-weights head is pooled by ScatterElements with a maximum, which not every CUDA or TensorRT has. "
            "Export it with --task token-classify: encode_sparse answers the same there."
        )


def _describe(
    folder: Path, *, task: str, pooling: str, logits: str, max_length: int | None, steps: _Steps
) -> Description:
    """What the checkpoint is, with the limits of this export in its spec."""
    checkpoint = describe(folder, task=task, pooling=pooling)
    spec = checkpoint.spec
    if logits == "all" and spec.task != "fill-mask":
        raise InputError(f"logits 'all' is for task fill-mask; the task is {spec.task}")
    limit = checkpoint.config.max_position_embeddings
    length = spec.max_length if max_length is None else max_length
    if not MIN_LENGTH <= length <= limit:
        raise InputError(
            f"max_length is {length:,}; expected {MIN_LENGTH} to {limit:,}, the checkpoint's max_position_embeddings"
        )
    if length > spec.max_length:
        steps.tell(f"the bundle takes {length:,} tokens; the checkpoint's own files cut texts at {spec.max_length:,}")
    return dataclasses.replace(
        checkpoint, spec=dataclasses.replace(spec, max_length=length, logits=cast(Logits, logits))
    )


def _tokenizer_of(checkpoint: Description) -> TextTokenizer:
    tokenizer = TextTokenizer(**checkpoint.tokenizer.parts())
    if checkpoint.spec.token_types:
        tokenizer.check_types(checkpoint.spec.type_vocab_size)
    return tokenizer


def _prove(checkpoint: Description, folder: Path, lower: _LowerPrecision, *, opset: int | None, steps: _Steps) -> _Made:
    """Trace the checkpoint into `folder`/onnx and compare the saved graphs, as users will run them, with PyTorch."""
    # Here and not above: `gte-export --help` and a refused target need none of these.
    from gte_deploy.exporters.graph import DEFAULT_OPSET, build_graphs, save_graphs
    from gte_deploy.exporters.parity import TorchReference, check_parity
    from gte_deploy.exporters.parity_batches import TokenSource
    from gte_deploy.models.checkpoint import load_model

    spec = checkpoint.spec
    with steps("load the weights"):
        tokenizer = _tokenizer_of(checkpoint)
        model = load_model(checkpoint.folder, task=spec.head_task)
    with steps("trace and fuse"):
        graphs = build_graphs(
            model,
            task=spec.task,
            max_length=spec.max_length,
            pooling=spec.pooling if spec.task == "embed" else None,
            logits=spec.logits,
            opset=DEFAULT_OPSET if opset is None else opset,
            token_types=spec.token_types,
            sparse=spec.sparse,
        )
        not_proven = []
        if importlib.util.find_spec("openvino") is None:
            del graphs["openvino"]
            not_proven.append("openvino is not installed here, so the bundle holds no graph for it.")
    texts: list[list[TextBatch]] = []
    sensitivity: Mapping[str, float] = {}
    if lower.precision != "fp32":
        with steps(f"quantize to {lower.precision}"):
            made = _quantize(graphs, lower, spec, tokenizer, steps)
        if len(made.graphs) < len(graphs):
            not_proven.append(f"{lower.precision} has a graph for ONNX Runtime alone.")
        graphs, sensitivity = made.graphs, made.sweep.loss if made.sweep else {}
        texts = _evaluation(tokenizer, spec)
    with steps("write the graphs"):
        weights = folder / WEIGHTS_PATH
        weights.parent.mkdir()
        save_graphs({folder / GRAPH_PATHS[engine]: graph for engine, graph in graphs.items()}, weights)
    with steps("compare with PyTorch"), contextlib.ExitStack() as stack:
        candidates = _open_engines(folder, graphs, spec, stack)
        if "openvino" in graphs and ("openvino", "bf16") not in candidates:
            not_proven.append("openvino bf16 was not compared: this CPU does not compute in bfloat16.")
        parity = check_parity(
            TorchReference(model, task=spec.task, pooling=spec.pooling, logits=spec.logits, sparse=spec.sparse),
            candidates,
            outputs=[output.name for output in graphs["onnxruntime"].outputs],
            spec=spec,
            precision=lower.precision,
            tokens=TokenSource.from_tokenizer(tokenizer),
            texts=texts,
            not_proven=not_proven,
            progress=steps.tell,
        )
    return _Made(graphs, parity, sensitivity)


def _prove_cuda(
    checkpoint: Description,
    folder: Path,
    precision: Precision,
    padding: str,
    *,
    opset: int | None,
    steps: _Steps,
) -> _Made:
    """Write the graph for ONNX Runtime's CUDA provider, and compare it, or its stand-in on a CPU, with PyTorch."""
    from gte_deploy.exporters.cuda_graph import build_cuda_graph, opened_for_proof
    from gte_deploy.exporters.graph import DEFAULT_OPSET, save_graph
    from gte_deploy.exporters.parity import TorchReference, check_parity
    from gte_deploy.exporters.parity_batches import TokenSource
    from gte_deploy.models.checkpoint import load_model

    spec = checkpoint.spec
    with steps("load the weights"):
        tokenizer = _tokenizer_of(checkpoint)
        model = load_model(checkpoint.folder, task=spec.head_task)
    with steps("trace and fuse"):
        graph = build_cuda_graph(
            model,
            task=spec.task,
            max_length=spec.max_length,
            precision=precision,
            padding=padding,
            pooling=spec.pooling if spec.task == "embed" else None,
            logits=spec.logits,
            opset=DEFAULT_OPSET if opset is None else opset,
            token_types=spec.token_types,
            sparse=spec.sparse,
        )
    file = folder / GRAPH_PATHS["onnxruntime"]
    with steps("write the graph"):
        file.parent.mkdir()
        save_graph(graph, file)
    texts = _evaluation(tokenizer, spec)
    with steps("compare with PyTorch"), opened_for_proof(graph, file, spec) as (backend, not_proven):
        parity = check_parity(
            TorchReference(model, task=spec.task, pooling=spec.pooling, logits=spec.logits, sparse=spec.sparse),
            {("onnxruntime", "fp32"): backend},
            outputs=[output.name for output in graph.outputs],
            spec=spec,
            precision=precision,
            tokens=TokenSource.from_tokenizer(tokenizer),
            texts=[] if precision == "fp32" else texts,
            not_proven=not_proven,
            progress=steps.tell,
        )
    return _Made({"onnxruntime": graph}, parity, target="cuda")


def _build(
    checkpoint: Description,
    folder: Path,
    lower: _LowerPrecision,
    options: TensorRTOptions,
    *,
    padding_free: bool,
    opset: int | None,
    steps: _Steps,
) -> _Made:
    """Build the TensorRT engine in `folder`/tensorrt, and compare the ONNX that it is made of with PyTorch.

    Raises:
        InputError: profiles or targets that do not fit the model or the precision.
        ExportError: TensorRT refuses the graph, or made of it what was not asked for.
    """
    from gte_deploy.exporters.graph import DEFAULT_OPSET, build_graphs, save_graph
    from gte_deploy.exporters.lower_precision import quantize_for_tensorrt
    from gte_deploy.exporters.parity import TorchReference, check_parity
    from gte_deploy.exporters.parity_batches import TokenSource
    from gte_deploy.exporters.tensorrt_check import CompiledOnnx, PackedOnnx
    from gte_deploy.exporters.tensorrt_graph import tensorrt_graph
    from gte_deploy.models.checkpoint import load_model

    spec = checkpoint.spec
    if lower.precision == "fp8" and options.calibrator == "entropy":
        raise InputError("calibrator entropy is about 128 integer levels; for fp8 take max or percentile")
    profiles = _profiles_of(options, spec.max_length, padding_free=padding_free)
    runtime = None
    if not options.onnx_only:
        runtime = choose_runtime(options.runtime)
        if padding_free:
            require_padding_free(runtime)
        steps.tell(f"build with {runtime.title}: {runtime.reason}")
        targets = resolve_targets(runtime, options.targets, lower.precision)
    with steps("load the weights"):
        tokenizer = _tokenizer_of(checkpoint)
        model = load_model(checkpoint.folder, task=spec.head_task)
    layers = model.config.num_hidden_layers
    with steps("trace"):
        graphs = build_graphs(
            model,
            task=spec.task,
            max_length=spec.max_length,
            pooling=spec.pooling if spec.task == "embed" else None,
            logits=spec.logits,
            opset=DEFAULT_OPSET if opset is None else opset,
            token_types=spec.token_types,
            sparse=spec.sparse,
        )
    sensitivity: Mapping[str, float] = {}
    with steps(f"write the graph in {lower.precision}"):
        if lower.precision in ("int8", "fp8"):
            made = quantize_for_tensorrt(
                graphs,
                lower.precision,
                spec=spec,
                tokenizer=tokenizer,
                num_layers=layers,
                calibration=lower.calibration,
                calibrator=options.calibrator,
                padding_free=padding_free,
                progress=steps.tell,
            )
            graph, sensitivity = made.graphs["tensorrt"], made.sweep.loss if made.sweep else {}
        else:
            plain = graphs["openvino"]
            graph = tensorrt_graph(plain, lower.precision, num_layers=layers, padding_free=padding_free)
        file = folder / GRAPH_PATHS["tensorrt"]
        file.parent.mkdir()
        save_graph(graph, file)
    plan = None
    not_proven = [_trtexec_advice(profiles, spec, padding_free=padding_free)]
    if runtime is not None:
        with steps(f"build the engine with {runtime.title}"):
            plan = build_plan(
                file,
                folder,
                runtime,
                options,
                graph=graph,
                num_layers=layers,
                targets=targets,
                profiles=profiles,
            )
        not_proven = [_NOT_RUN]
    texts = _evaluation(tokenizer, spec)
    heads = model.config.num_attention_heads
    compiled: CompiledOnnx | PackedOnnx
    if padding_free:
        compiled = PackedOnnx(graph, spec, profiles=profiles, num_heads=heads)
        not_proven.append(_STAND_IN)
    else:
        compiled = CompiledOnnx(graph, spec, file=file, num_heads=heads)
    with steps("compare with PyTorch"), contextlib.closing(compiled):
        parity = check_parity(
            TorchReference(model, task=spec.task, pooling=spec.pooling, logits=spec.logits, sparse=spec.sparse),
            {("tensorrt", lower.precision): compiled},
            outputs=[output.name for output in graph.outputs],
            spec=spec,
            precision=lower.precision,
            tokens=TokenSource.from_tokenizer(tokenizer),
            texts=texts,
            not_proven=not_proven,
            progress=steps.tell,
        )
    keeps = options.onnx_only or options.keep_onnx
    if not keeps:
        shutil.rmtree(file.parent)
    return _Made({"tensorrt": graph}, parity, sensitivity, plan, keeps)


_NOT_RUN = (
    "What was compared is the ONNX that the engine was compiled from, run by ONNX Runtime on the CPU; the engine "
    "itself runs on its GPUs alone."
)
_STAND_IN = (
    "In place of TRT_Attention, which ONNX Runtime does not have, each text attended to itself, as TensorRT's "
    "documentation says of the operator."
)


def _profiles_of(options: TensorRTOptions, max_length: int, *, padding_free: bool) -> tuple[Profile, ...]:
    if options.profiles and options.lengths is not None:
        raise InputError("profiles come from --profile or from --lengths, not from both")
    lengths = [] if options.lengths is None else read_lengths(options.lengths)
    if padding_free:
        profiles = options.profiles or packed_profiles(max_length, lengths)
        check_packed_profiles(profiles, max_length)
        return profiles
    if lengths:
        return profiles_for_lengths(lengths, max_length)
    profiles = options.profiles or default_profiles(max_length)
    check_profiles(profiles, max_length)
    return profiles


def _trtexec_advice(profiles: Sequence[Profile], spec: ModelSpec, *, padding_free: bool) -> str:
    has_masks = spec.task == "fill-mask" and spec.logits == "masked"
    line = trtexec_line(
        GRAPH_PATHS["tensorrt"],
        profiles,
        has_masks=has_masks,
        has_types=spec.token_types,
        padding_free=padding_free,
    )
    return f"No engine was built. On the GPU that is to run it, in the bundle's folder:\n{line}"


def _quantize(
    graphs: Mapping[Engine, "Graph"],
    lower: _LowerPrecision,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    steps: _Steps,
) -> "Quantized":
    from gte_deploy.exporters.lower_precision import quantize_graphs

    return quantize_graphs(
        graphs,
        lower.precision,
        spec=spec,
        tokenizer=tokenizer,
        calibration=lower.calibration,
        activations=lower.activations,
        reduce_range=lower.reduce_range,
        progress=steps.tell,
    )


def _evaluation(tokenizer: TextTokenizer, spec: ModelSpec) -> "list[list[TextBatch]]":
    """Held-out text, in as many rounds as a verdict may need."""
    texts = builtin_texts("evaluation")
    return [text_batches(texts, tokenizer, spec, max_tokens=EVALUATION_TOKENS, round=i) for i in range(ROUNDS)]


def _open_engines(
    folder: Path, graphs: Mapping[Engine, "Graph"], spec: ModelSpec, stack: contextlib.ExitStack
) -> dict[tuple[Engine, Precision], "Backend"]:
    """Every engine that the bundle is for, in every precision that this CPU computes in; `stack` closes them."""
    from gte_deploy.backends.onnx_backend import OnnxBackend
    from gte_deploy.backends.openvino_backend import OpenVinoBackend, has_native_bf16

    opened: dict[tuple[Engine, Precision], Backend] = {
        ("onnxruntime", "fp32"): OnnxBackend(folder / GRAPH_PATHS["onnxruntime"], spec)
    }
    if "openvino" in graphs:
        computes: tuple[ComputePrecision, ...] = ("fp32", "bf16") if has_native_bf16() else ("fp32",)
        for compute in computes:
            opened["openvino", compute] = OpenVinoBackend(folder / GRAPH_PATHS["openvino"], spec, precision=compute)
    for backend in opened.values():
        stack.callback(backend.close)
    return opened


def _write_bundle(
    folder: Path,
    checkpoint: Description,
    *,
    made: _Made,
    asked: Asked,
    bounds: "Bounds",
    source: Mapping[str, str],
    steps: _Steps,
) -> tuple[Manifest, "ParityReport"]:
    from gte_deploy.exporters.hub_files import write_hub_files
    from gte_deploy.exporters.report import build_report, library_versions, render_html

    spec = checkpoint.spec
    write_hub_files(folder, checkpoint)
    if spec.sparse is not None and spec.sparse.query_weights is not None:
        _write_query_weights(folder / spec.sparse.query_weights, checkpoint)
    made = _with_answers(folder, checkpoint, made, asked, bounds, steps)
    entries: dict[Engine, GraphEntry] = {
        engine: GraphEntry(
            path=GRAPH_PATHS[engine],
            opset=graph.opset,
            inputs=graph.inputs,
            outputs=graph.outputs,
            fusions=graph.fusions,
            computes=made.parity.proven(engine),
        )
        for engine, graph in made.graphs.items()
    }
    report = build_report(
        made.parity,
        spec=spec,
        source=source,
        graphs=entries,
        plan=made.plan,
        timings_s=steps.seconds,
        sensitivity=made.sensitivity,
    )
    _write_json(folder / "report.json", report)
    (folder / "report.html").write_text(render_html(made.parity, report, made.plan), encoding="utf-8")
    manifest = seal(
        folder,
        spec=spec,
        precision=made.parity.precision,
        graphs=entries if made.keeps_graphs else {},
        target=made.target,
        plan=made.plan,
        versions=library_versions(),
        source=source,
        missed_bounds=made.parity.failures(),
    )
    return manifest, made.parity


def _with_answers(
    folder: Path, checkpoint: Description, made: _Made, asked: Asked, bounds: "Bounds", steps: _Steps
) -> _Made:
    """Compare what the files in `folder` answer to texts with the checkpoint's own library, and report that as well.

    Raises:
        ParityError: they differ.
    """
    with steps(f"compare answers with {library_of(checkpoint.folder, checkpoint.task)}"):
        check = check_bundle(
            folder,
            checkpoint.folder,
            checkpoint.spec,
            precision=made.parity.precision,
            graph=folder / GRAPH_PATHS["onnxruntime"] if "onnxruntime" in made.graphs else None,
            target=made.target,
            asked=asked,
        )
    parity = made.parity.with_checks(check)
    parity.require(bounds)
    return dataclasses.replace(made, parity=parity)


def _write_query_weights(file: Path, checkpoint: Description) -> None:
    tokenizer = _tokenizer_of(checkpoint)
    weights = read_query_weights(checkpoint.folder, checkpoint.spec.vocab_size, tokenizer.known_or_unknown_id)
    assert weights is not None  # the spec names them
    np.save(file, weights, allow_pickle=False)


def _name_of(model: str | os.PathLike[str] | None) -> str:
    """Last part of a hub id or of a folder's real path; no directory of this machine gets into a bundle."""
    if model is None:
        return BUILTIN_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else path.name


def _source_of(model: str | os.PathLike[str] | None, checkpoint: Description) -> dict[str, str]:
    """Name of the checkpoint, commit of a hub download, and sha256 of the weights: of the one file, or of the lines
    that sha256sum prints for several.
    """
    is_hub_id = model is not None and not Path(model).expanduser().is_dir()
    source = {"name": str(model) if is_hub_id else _name_of(model)}
    if checkpoint.folder.parent.name == "snapshots":
        source["revision"] = checkpoint.folder.name
    weights = checkpoint.weight_files()
    digests = [sha256_file(file) for file in weights]
    if len(digests) == 1:
        source["sha256"] = digests[0]
    elif digests:
        lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, weights, strict=True))
        source["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    return source


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

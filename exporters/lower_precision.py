"""The FP32 graphs of a bundle -> the same in a lower precision: what `gte-export --precision` does."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gte_deploy.exporters.accuracy import (
    ACCURACY_BOUNDS,
    Accuracy,
    AccuracyBounds,
    TextReference,
)
from gte_deploy.exporters.calibration import Calibrator, Range, measure_peaks, measure_ranges, running
from gte_deploy.exporters.graph import Graph
from gte_deploy.exporters.linears import find_linears
from gte_deploy.exporters.quantize import Activations, Int8Plan, plan_int8, quantize_int8
from gte_deploy.exporters.sensitivity import Sweep, sweep_sensitivity
from gte_deploy.exporters.tensorrt_graph import QdqPlan, tensorrt_graph
from gte_deploy.exporters.text_batches import ROUNDS, builtin_texts, text_batches
from gte_deploy.exporters.weight_only import Bits, quantize_weights
from gte_deploy.spec import Engine, ModelSpec, Precision
from gte_deploy.tokenization import TextTokenizer

# Words of each kind of batch; see `text_batches`. A sweep measures every layer, on fewer, and judges on all of them.
CALIBRATION_TOKENS = 4000
_SWEEP_TOKENS = 1000
_WEIGHT_BITS: Mapping[Precision, Bits] = {"int8-weight": 8, "int4-weight": 4}
# What one input feeds is quantized together, so it is judged together.
_ROLES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "up_proj": "up_gate", "gate_proj": "up_gate"}


@dataclass(frozen=True)
class Quantized:
    """Graphs of a lower precision.

    Args:
        graphs: engine -> graph; weight-only precisions have ONNX Runtime's alone. The counts of what was quantized
            stand among the graph's fusions.
        sweep: which layers stayed in FP32, and why; INT8 only.
    """

    graphs: dict[Engine, Graph]
    sweep: Sweep | None = None


def quantize_graphs(
    graphs: Mapping[Engine, Graph],
    precision: Precision,
    *,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    calibration: Sequence[str] | None = None,
    activations: Activations = "static",
    reduce_range: bool = False,
    progress: Callable[[str], None],
) -> Quantized:
    """Copy the FP32 `graphs` into `precision`.

    Args:
        graphs: of one model, FP32; left as they are.
        precision: other than "fp32".
        spec: of the model.
        tokenizer: of the model.
        calibration: texts like those that will be asked; None for English prose that comes along. INT8 only, as the
            next two.
        activations: of ONNX Runtime's graph. OpenVINO's is static.
        reduce_range: weights of 7 bits, for CPUs without VNNI.
        progress: called with a line at every step that takes long.
    """
    if precision != "int8":
        copy = graphs["onnxruntime"].model.clone()
        counts = quantize_weights(copy, _WEIGHT_BITS[precision])
        return Quantized({"onnxruntime": _with(graphs["onnxruntime"], copy, counts)})
    fp32 = graphs["onnxruntime"]
    texts, ranges = _calibrated(fp32, spec, tokenizer, calibration, progress)
    plan = plan_int8(fp32.model, ranges, reduce_range=reduce_range)
    # Static is the stricter form, and OpenVINO's.
    judged: Activations = "static" if "openvino" in graphs else activations

    def tried(high: frozenset[str]) -> Graph:
        model = fp32.model.clone()
        quantize_int8(model, plan.keeping(high), engine="onnxruntime", activations=judged)
        return dataclasses.replace(fp32, model=model)

    sweep = _sweep(fp32, plan, tried, "int8", texts=texts, tokenizer=tokenizer, spec=spec, progress=progress)
    plan = plan.keeping(sweep.high)
    made: dict[Engine, Graph] = {}
    for engine, graph in graphs.items():
        copy = graph.model.clone()
        made[engine] = _with(graph, copy, quantize_int8(copy, plan, engine=engine, activations=activations))
    return Quantized(made, sweep)


def quantize_for_tensorrt(
    graphs: Mapping[Engine, Graph],
    precision: Precision,
    *,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    num_layers: int,
    calibration: Sequence[str] | None = None,
    calibrator: Calibrator = "max",
    padding_free: bool = False,
    progress: Callable[[str], None],
) -> Quantized:
    """TensorRT's graph in INT8 or FP8, made of the FP32 `graphs`; see `quantize_graphs`.

    Args:
        graphs: of one model, FP32: ONNX Runtime's is calibrated with, OpenVINO's (standard operators) is rewritten.
        precision: "int8" or "fp8".
        spec: of the model.
        tokenizer: of the model.
        num_layers: of the encoder.
        calibration: texts like those that will be asked; None for English prose that comes along.
        calibrator: how the inputs' scales are chosen, see `measure_peaks`.
        padding_free: see `tensorrt_graph`. The sweep judges the padded form, whose GEMMs are the same.
        progress: called with a line at every step that takes long.
    """
    assert precision in ("int8", "fp8")
    fp32, plain = graphs["onnxruntime"], graphs["openvino"]
    texts, ranges = _calibrated(fp32, spec, tokenizer, calibration, progress)
    base = plan_int8(fp32.model, ranges)
    quantized = {name: found for name, found in ranges.items() if name not in base.high}
    batches = [batch for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)]
    peaks = measure_peaks(fp32, spec, batches, quantized, smoothing=base.smoothing, calibrator=calibrator)
    # For a few masked rows an 8-bit matrix saves less than the copy of the embeddings that it would be.
    few_rows = spec.task == "fill-mask" and spec.logits == "masked"
    rows_only = {name for name in quantized if "decoder" in name and few_rows}
    plan = QdqPlan(precision, peaks, base.smoothing, base.high | rows_only)

    def made(high: frozenset[str], padding_free: bool = False) -> Graph:
        kept = plan.keeping(high)
        return tensorrt_graph(plain, precision, num_layers=num_layers, plan=kept, padding_free=padding_free)

    sweep = _sweep(fp32, plan, made, precision, texts=texts, tokenizer=tokenizer, spec=spec, progress=progress)
    return Quantized({"tensorrt": made(sweep.high, padding_free)}, sweep)


def groups_of(graph: Graph, plan: Int8Plan | QdqPlan) -> dict[str, list[str]]:
    """Weights that a sweep judges together: "gte.layers.0.self_attn.qkv" -> those of queries, keys and values."""
    groups: dict[str, list[str]] = {}
    for linear in find_linears(graph.model):
        if linear.name not in plan.high:
            module, _, role = linear.name.removesuffix(".weight").rpartition(".")
            if role.isdigit():  # a part of the vocabulary's matrix
                module, _, role = module.rpartition(".")
            groups.setdefault(f"{module}.{_ROLES.get(role, role)}", []).append(linear.name)
    return groups


def _calibrated(
    fp32: Graph,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    calibration: Sequence[str] | None,
    progress: Callable[[str], None],
) -> tuple[Sequence[str], dict[str, Range]]:
    """The texts to calibrate with, and the range of every linear layer on them."""
    texts = calibration or builtin_texts("calibration")
    batches = [batch for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)]
    size = sum(int(batch.attention_mask.sum()) for batch in batches)
    kind = "your texts" if calibration else "built-in English prose (--calibration takes your own texts)"
    progress(f"calibrate on {size:,} tokens of {kind}")
    return texts, measure_ranges(fp32, spec, batches)


def _sweep(
    fp32: Graph,
    plan: Int8Plan | QdqPlan,
    made: Callable[[frozenset[str]], Graph],
    precision: Precision,
    *,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    spec: ModelSpec,
    progress: Callable[[str], None],
) -> Sweep:
    """`made(high)` quantizes but for those weights, and is judged against FP32 on the calibration texts."""
    bounds = ACCURACY_BOUNDS[precision]
    groups = groups_of(fp32, plan)
    sample = [text_batches(texts, tokenizer, spec, max_tokens=_SWEEP_TOKENS)]
    rounds = [text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS, round=i) for i in range(ROUNDS)]
    with running(fp32, spec) as backend:
        few, all_of_them = TextReference(backend, sample, spec), TextReference(backend, rounds, spec)

        def measured(by: TextReference, bounds: AccuracyBounds | None = None) -> Callable[[frozenset[str]], Accuracy]:
            def measure(high: frozenset[str]) -> Accuracy:
                with running(made(high), spec) as candidate:
                    return by.compare(candidate, bounds)

            return measure

        return sweep_sensitivity(groups, measured(few), measured(all_of_them, bounds), bounds, progress=progress)


def _with(graph: Graph, model: ir.Model, counts: Mapping[str, int]) -> Graph:
    return dataclasses.replace(graph, model=model, fusions={**graph.fusions, **counts})

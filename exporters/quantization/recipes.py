"""Converts the FP32 graphs of a bundle to a lower precision, for `gte-export --precision`."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import Engine, ModelSpec, Precision
from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.quantization.calibration import Range, measure_ranges, running
from gte_deploy.exporters.quantization.int8 import Activations, int8_scheme, quantize_int8
from gte_deploy.exporters.quantization.sensitivity import Sweep, sweep_sensitivity
from gte_deploy.exporters.quantization.weight_only import Bits, quantize_weights
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, Accuracy, AccuracyBounds, TextReference
from gte_deploy.exporters.verification.texts import TextRounds, builtin_texts, text_batches
from gte_deploy.text.tokenization import TextTokenizer

# The `max_tokens` of `text_batches`. A sweep measures each group of layers on fewer tokens than the result.
CALIBRATION_TOKENS = 4000
SWEEP_TOKENS = 1000
_WEIGHT_BITS: Mapping[Precision, Bits] = {"int8-weight": 8, "int4-weight": 4}
# Layers with the same input are quantized together, so they are judged together.
_ROLES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "up_proj": "up_gate", "gate_proj": "up_gate"}


@dataclass(frozen=True)
class Quantized:
    """Graphs of a lower precision.

    Args:
        graphs: engine -> graph; weight-only precisions have only ONNX Runtime's. The fusions of a graph include the
            numbers of quantized layers.
        sweep: the layers that stay in FP32, and their losses; INT8 only.
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
    """Copy the FP32 `graphs` and convert the copies to `precision`.

    Args:
        graphs: the FP32 graphs of one model; they stay unchanged.
        precision: a precision other than "fp32".
        spec: the facts about the model.
        tokenizer: the tokenizer of the model.
        calibration: texts like those in production; None for built-in English prose. This and the next two arguments
            are for INT8 only.
        activations: the ranges of activations in ONNX Runtime's graph; OpenVINO's graph is always static.
        reduce_range: whether weights have 7 bits, for CPUs without VNNI.
        progress: called with a line at every long step.
    """
    if precision != "int8":
        copy = graphs["onnxruntime"].model.clone()
        counts = quantize_weights(copy, _WEIGHT_BITS[precision])
        return Quantized({"onnxruntime": _with_model(graphs["onnxruntime"], copy, counts)})
    fp32 = graphs["onnxruntime"]
    texts, _, ranges = calibrated(fp32, spec, tokenizer, calibration, progress)
    scheme = int8_scheme(fp32.model, ranges, reduce_range=reduce_range)
    # Static ranges lose more accuracy than dynamic ones, and OpenVINO's graph always has them.
    sweep_activations: Activations = "static" if "openvino" in graphs else activations

    def quantize(excluded: frozenset[str]) -> Graph:
        model = fp32.model.clone()
        quantize_int8(model, scheme.excluding(excluded), engine="onnxruntime", activations=sweep_activations)
        return dataclasses.replace(fp32, model=model)

    found = sweep(
        fp32, scheme.excluded, quantize, "int8", texts=texts, tokenizer=tokenizer, spec=spec, progress=progress
    )
    scheme = scheme.excluding(found.excluded)
    quantized: dict[Engine, Graph] = {}
    for engine, graph in graphs.items():
        copy = graph.model.clone()
        quantized[engine] = _with_model(
            graph, copy, quantize_int8(copy, scheme, engine=engine, activations=activations)
        )
    return Quantized(quantized, found)


def groups_of(graph: Graph, excluded: Collection[str]) -> dict[str, list[str]]:
    """Groups of weights that a sweep judges together, such as "gte.layers.0.self_attn.qkv" -> three weights.

    The weights in `excluded` stay in a higher precision and are in no group.
    """
    groups: dict[str, list[str]] = {}
    for linear in find_linear_layers(graph.model):
        if linear.name not in excluded:
            module, _, role = linear.name.removesuffix(".weight").rpartition(".")
            if role.isdigit():  # a part of the vocabulary's matrix
                module, _, role = module.rpartition(".")
            groups.setdefault(f"{module}.{_ROLES.get(role, role)}", []).append(linear.name)
    return groups


def calibrated(
    fp32: Graph,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    calibration: Sequence[str] | None,
    progress: Callable[[str], None],
) -> tuple[Sequence[str], Sequence[Batch], dict[str, Range]]:
    """The calibration texts, their batches, and the input range of every linear layer on them."""
    texts = calibration or builtin_texts("calibration")
    batches = [batch for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)]
    size = sum(int(batch.attention_mask.sum()) for batch in batches)
    kind = "your texts" if calibration else "built-in English prose (--calibration takes your own texts)"
    progress(f"calibrate on {size:,} tokens of {kind}")
    return texts, batches, measure_ranges(fp32, spec, batches)


def sweep(
    fp32: Graph,
    excluded: Collection[str],
    quantize: Callable[[frozenset[str]], Graph],
    precision: Precision,
    *,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    spec: ModelSpec,
    progress: Callable[[str], None],
) -> Sweep:
    """Find the layers that must stay in a higher precision, by comparison with FP32 on the calibration texts.

    Args:
        fp32: the graph to quantize.
        excluded: weights that stay in a higher precision in any case.
        quantize: returns the quantized graph in which the given weights stay in a higher precision as well.
        precision: the precision, which sets the bounds of accuracy.
        texts: the calibration texts.
        tokenizer: the tokenizer of the model.
        spec: the facts about the model.
        progress: called with a line for every measurement.
    """
    bounds = ACCURACY_BOUNDS[precision]
    groups = groups_of(fp32, excluded)
    sample = [text_batches(texts, tokenizer, spec, max_tokens=SWEEP_TOKENS)]
    rounds = TextRounds(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)
    with running(fp32, spec) as backend:
        small, full = TextReference(backend, sample, spec), TextReference(backend, rounds, spec)

        def measured_by(
            reference: TextReference, bounds: AccuracyBounds | None = None
        ) -> Callable[[frozenset[str]], Accuracy]:
            def measure(excluded: frozenset[str]) -> Accuracy:
                with running(quantize(excluded), spec) as candidate:
                    return reference.compare(candidate, bounds)

            return measure

        return sweep_sensitivity(groups, measured_by(small), measured_by(full, bounds), bounds, progress=progress)


def _with_model(graph: Graph, model: ir.Model, counts: Mapping[str, int]) -> Graph:
    return dataclasses.replace(graph, model=model, fusions={**graph.fusions, **counts})

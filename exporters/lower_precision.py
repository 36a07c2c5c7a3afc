"""The FP32 graphs of a bundle -> the same in a lower precision: what `gte-export --precision` does."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gte_deploy.backends.onnx_backend import OnnxBackend
from gte_deploy.exporters.accuracy import (
    ACCURACY_BOUNDS,
    Accuracy,
    TextBatch,
    measure_accuracy,
    reference_outputs,
)
from gte_deploy.exporters.calibration import measure_ranges
from gte_deploy.exporters.graph import Graph, save_graph
from gte_deploy.exporters.linears import find_linears
from gte_deploy.exporters.quantize import Activations, Int8Plan, plan_int8, quantize_int8
from gte_deploy.exporters.sensitivity import Sweep, sweep_sensitivity
from gte_deploy.exporters.text_batches import builtin_texts, text_batches
from gte_deploy.exporters.weight_only import Bits, quantize_weights
from gte_deploy.spec import Engine, ModelSpec, Precision
from gte_deploy.tokenization import TextTokenizer

# Real tokens of each kind of batch; see `text_batches`. A sweep measures every layer, on fewer.
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
    texts = calibration or builtin_texts("calibration")
    batches = text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)
    size = sum(int(batch.attention_mask.sum()) for batch, _ in batches)
    kind = "your texts" if calibration else "built-in English prose (--calibration takes your own texts)"
    progress(f"calibrate on {size:,} tokens of {kind}")
    fp32 = graphs["onnxruntime"]
    ranges = measure_ranges(fp32, spec, [batch for batch, _ in batches])
    plan = plan_int8(fp32.model, ranges, reduce_range=reduce_range)
    # Static is the stricter form, and OpenVINO's.
    judged: Activations = "static" if "openvino" in graphs else activations
    sample = text_batches(texts, tokenizer, spec, max_tokens=_SWEEP_TOKENS)
    sweep = sweep_sensitivity(
        groups_of(fp32, plan),
        _accuracy_on(fp32, plan, judged, sample, spec),
        ACCURACY_BOUNDS["int8"],
        progress=progress,
    )
    plan = plan.keeping(sweep.high)
    made: dict[Engine, Graph] = {}
    for engine, graph in graphs.items():
        copy = graph.model.clone()
        made[engine] = _with(graph, copy, quantize_int8(copy, plan, engine=engine, activations=activations))
    return Quantized(made, sweep)


def groups_of(graph: Graph, plan: Int8Plan) -> dict[str, list[str]]:
    """Weights that a sweep judges together: "gte.layers.0.self_attn.qkv" -> those of queries, keys and values."""
    groups: dict[str, list[str]] = {}
    for linear in find_linears(graph.model):
        if linear.name not in plan.high:
            module, _, role = linear.name.removesuffix(".weight").rpartition(".")
            groups.setdefault(f"{module}.{_ROLES.get(role, role)}", []).append(linear.name)
    return groups


def _accuracy_on(
    fp32: Graph, plan: Int8Plan, activations: Activations, batches: Sequence[TextBatch], spec: ModelSpec
) -> Callable[[frozenset[str]], Accuracy]:
    """`measure(high)`: of the INT8 graph with these weights in FP32, against the FP32 graph, in ONNX Runtime."""
    with _running(fp32, spec) as backend:
        references = reference_outputs(backend, batches, spec)

    def measure(high: frozenset[str]) -> Accuracy:
        model = fp32.model.clone()
        quantize_int8(model, plan.keeping(high), engine="onnxruntime", activations=activations)
        with _running(dataclasses.replace(fp32, model=model), spec) as backend:
            return measure_accuracy(backend, references, batches, spec)

    return measure


@contextlib.contextmanager
def _running(graph: Graph, spec: ModelSpec) -> Iterator[OnnxBackend]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_graph(graph, file)
        with contextlib.closing(OnnxBackend(file, spec)) as backend:
            yield backend


def _with(graph: Graph, model: ir.Model, counts: Mapping[str, int]) -> Graph:
    return dataclasses.replace(graph, model=model, fusions={**graph.fusions, **counts})

"""Quantizes attention to FP8 (E4M3), for the fused FP8 attention of ordinary TensorRT.

    softmax(DQ(Q(q * scale)) · DQ(Q(k^T)) + mask) -> p;      DQ(Q(p)) · DQ(Q(v))

This is the form that NVIDIA's ModelOpt writes for TensorRT: the scale of the scores and the transposition of the keys
come before the quantization, so that every DequantizeLinear feeds its MatMul directly
(https://github.com/NVIDIA/Model-Optimizer/pull/1289). The attention weights lie in 0 … 1, so their scale is 1/448 on
any text. The scales of queries, keys and values are measured.

Shapes: B rows, N heads, S tokens, D head size.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.graph.editing import (
    Builder,
    constant,
    consumer,
    initializer,
    operand,
    producer,
    scope_of,
    split_operands,
)
from gte_deploy.exporters.quantization.calibration import running
from gte_deploy.exporters.quantization.rounding import fp16_scale
from gte_deploy.exporters.targets.tensorrt.qkv import join_projections

FP8_ATTENTION = "fp8_attention"
"""The number of quantized attentions in the fusions of a graph."""

_DTYPE, _MAX_MAGNITUDE = ir.DataType.FLOAT8E4M3FN, 448


@dataclass(frozen=True)
class AttentionAmax:
    """The largest magnitudes of scaled queries, keys and values in one layer."""

    query: float
    key: float
    value: float


@dataclass(frozen=True)
class _Products:
    """The two products of an attention: query [B, N, S, D] · key [B, N, D, S], and weights [B, N, S, S] · value."""

    scores: ir.Node
    weighted: ir.Node

    def operands(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return queries, transposed keys and values."""
        return operand(self.scores, 0), operand(self.scores, 1), operand(self.weighted, 1)


def _attentions(graph: ir.Graph) -> dict[str, _Products]:
    """Module of an attention -> its products, in a graph whose queries are scaled before the product."""
    found = {}
    for softmax in (node for node in graph if node.op_type == "Softmax"):
        scores, _ = split_operands(producer(softmax.inputs[0], "Add"), "MatMul")
        found[scope_of(softmax)] = _Products(scores, consumer(softmax.outputs[0], "MatMul"))
    return found


def measure_attention_amax(
    plain: Graph, spec: ModelSpec, batches: Sequence[Batch], *, sites: Mapping[str, int]
) -> dict[str, AttentionAmax]:
    """Run `batches` through the FP32 graph; return module of an attention -> its largest magnitudes.

    Padding counts as well, because a quantized graph also computes it.

    Args:
        plain: the graph of standard operators; it stays unchanged.
        spec: the facts about the model.
        batches: the calibration texts.
        sites: the argument of `fuse_graph`.
    """
    model = plain.model.clone()
    join_projections(model, sites=sites)
    outputs = {
        module: [_amax_output(model.graph, value) for value in products.operands()]
        for module, products in _attentions(model.graph).items()
    }
    found = {module: np.zeros(3, np.float32) for module in outputs}
    with running(dataclasses.replace(plain, model=model), spec) as backend:
        for batch in batches:
            values = backend.run(batch, [name for names in outputs.values() for name in names])
            for module, names in outputs.items():
                found[module] = np.maximum(found[module], [float(values[name]) for name in names])
    return {module: AttentionAmax(*map(float, amax)) for module, amax in found.items()}


def _amax_output(graph: ir.Graph, value: ir.Value) -> str:
    """Add an output with the largest magnitude in `value`; return its name."""
    name = f"{value.name}/amax"
    magnitude = ir.node("Abs", [value], name=f"{value.name}/abs")
    largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0}, name=name)
    largest.outputs[0].name, largest.outputs[0].dtype = name, ir.DataType.FLOAT
    largest.outputs[0].shape = ir.Shape(())
    graph.extend((magnitude, largest))
    graph.outputs.append(largest.outputs[0])
    return name


def quantize_attention(model: ir.Model, amax: Mapping[str, AttentionAmax]) -> dict[str, int]:
    """Quantize every attention of a typed, padded graph in place; return `FP8_ATTENTION` -> their number."""
    graph = model.graph
    for module, products in _attentions(graph).items():
        largest = amax[module]
        for node, index, name, scale in (
            (products.scores, 0, "query", fp16_scale(largest.query, _MAX_MAGNITUDE)),
            (products.scores, 1, "key", fp16_scale(largest.key, _MAX_MAGNITUDE)),
            (products.weighted, 0, "weights", np.array(1 / _MAX_MAGNITUDE, np.float16)),
            (products.weighted, 1, "value", fp16_scale(largest.value, _MAX_MAGNITUDE)),
        ):
            node.replace_input_with(index, _quantized(graph, node, operand(node, index), f"{module}/fp8_{name}", scale))
    return {FP8_ATTENTION: len(amax)}


def _quantized(graph: ir.Graph, user: ir.Node, value: ir.Value, name: str, scale: NDArray[np.float16]) -> ir.Value:
    zero = constant(graph, "zero_fp8", np.zeros((), _DTYPE.numpy()))
    step = initializer(graph, f"{name}.scale", ir.tensor(scale))
    build, dtype = Builder(graph, user, name), value.dtype or ir.DataType.FLOAT16
    quantized = build.op("QuantizeLinear", value, step, zero, name="quantized", dtype=_DTYPE)
    return build.op("DequantizeLinear", quantized, step, zero, name="dequantized", dtype=dtype)

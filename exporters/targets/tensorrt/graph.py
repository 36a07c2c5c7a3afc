"""Converts the plain FP32 graph to the graph that TensorRT compiles: strongly typed, with operators of ONNX opset 20.

TensorRT takes the data type of every tensor from the graph, so the graph defines them all:

* GEMMs, attention and the stored weights are in FP16 or BF16. In INT8 and FP8, QuantizeLinear and DequantizeLinear are
  around the GEMMs, but not in or around attention: with them TensorRT-RTX would not use its fused attention kernel,
  and its scratch memory would grow sixteenfold. The exception is FP8 attention, for ordinary TensorRT, on request (see
  the module `fp8_attention`). TensorRT needs symmetric quantization: zero points are 0.
* An 8-bit GEMM multiplies its sums by a power of two before it stores them, so that no sum overflows FP16. The scales
  of its outputs are an FP32 product behind it (docs/decisions/eight-bit-sums.md).
* Between GEMMs and attention, FP32 is used: for residual sums with their LayerNorms, the rotation of queries and keys
  by PyTorch's own FP32 cosines and sines (the graph never computes an angle), the scales and biases of 8-bit GEMMs, the
  gated unit and its quantization, the mask before it is added to the scores, pooling, and the outputs. These are
  elementwise operations that fuse into one kernel, whose inputs and outputs have 16 bits. Softmax is in the attention
  kernel, which may compute scores and sums in FP32 or in 16 bits: TensorRT does not let the graph decide.
* Queries, keys and values are one GEMM (see the module `qkv`), and so are the up and gate projections.
* For a padding-free engine, the module `padding_free` first rewrites the graph to the tokens of all texts, without
  padding. Attention is then TRT_Attention, an operator of TensorRT itself.

Shapes: B rows, S tokens, H hidden size, F width of the gated MLP.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as ir_passes

from gte_deploy.backends.tensorrt.variants import POSITIONS
from gte_deploy.core.spec import Precision
from gte_deploy.exporters.graph.build import Graph, graph_of
from gte_deploy.exporters.graph.editing import (
    Builder,
    array,
    constant,
    consumer,
    initializer,
    operand,
    other_operand,
    producer,
    replace,
    scope_of,
)
from gte_deploy.exporters.graph.fusion import fuse_graph
from gte_deploy.exporters.graph.fusion.gated_unit import FUNCTIONS
from gte_deploy.exporters.graph.fusion.up_gate import UP_GATE, merged_name
from gte_deploy.exporters.graph.half import rounded_when_read
from gte_deploy.exporters.graph.linear_layers import LinearLayer, find_linear_layers, is_quantized
from gte_deploy.exporters.quantization.rounding import fp16_scale, quantize_columns
from gte_deploy.exporters.quantization.smoothing import smooth
from gte_deploy.exporters.targets.tensorrt.fp8_attention import AttentionAmax, quantize_attention
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED, TextLayout
from gte_deploy.exporters.targets.tensorrt.qkv import joined_parts

EightBits = Literal["int8", "fp8"]

COMPUTE_DTYPES: Mapping[Precision, ir.DataType] = {
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.FLOAT16,
    "fp8": ir.DataType.FLOAT16,
}
"""Precision -> data type of every tensor that is neither FP32 nor quantized."""

_FP32 = ir.DataType.FLOAT
_MAX_MAGNITUDE: Mapping[EightBits, int] = {"int8": 127, "fp8": 448}
_QUANTIZED_DTYPES: Mapping[EightBits, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_MAX_FP16 = float(np.finfo(np.float16).max)
# Operators that only move data: a result in FP32 stays in FP32 behind them.
_MOVES = frozenset(("Reshape", "Split", "Squeeze", "Transpose"))


@dataclass(frozen=True)
class QdqScheme:
    """Which GEMMs are quantized and how.

    Args:
        kind: 8-bit integers, or E4M3 floating point.
        amax: weight's name -> the largest representable magnitude of the GEMM's input, after smoothing.
        smoothing: down projection's weight -> s [F], see `gte_deploy.exporters.quantization.smoothing`.
        excluded: names of weights whose GEMMs stay in FP16.
        attention: module of an attention -> the magnitudes that FP8 must represent; empty if attention stays in FP16.
    """

    kind: EightBits
    amax: Mapping[str, float]
    smoothing: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    attention: Mapping[str, AttentionAmax] = field(default_factory=dict)

    def excluding(self, names: Collection[str]) -> "QdqScheme":
        """The same scheme with these weights in FP16 as well."""
        return dataclasses.replace(self, excluded=self.excluded | frozenset(names))


def tensorrt_graph(
    plain: Graph,
    precision: Precision,
    *,
    sites: Mapping[str, int],
    scheme: QdqScheme | None = None,
    layout: TextLayout = PADDED,
) -> Graph:
    """Convert a copy of the plain FP32 graph to the graph that TensorRT compiles.

    Args:
        plain: the graph of standard operators, see `gte_deploy.exporters.graph.build.build_graphs`.
        precision: a key of `COMPUTE_DTYPES`.
        sites: how often each fusion pass must fire.
        scheme: the GEMMs to quantize, for int8 and fp8.
        layout: how the tensors of the graph hold texts.

    Raises:
        ExportError: a pass did not match as often as the architecture requires.
    """
    model = plain.model.clone()
    _fill_in_types(model.graph)
    if scheme is not None:
        smooth(model, scheme.smoothing)
    counts = layout.rewrite(model, sites)
    counts |= fuse_graph(model, sites=sites, passes=(UP_GATE,))
    if scheme is not None:
        counts |= _quantize(model, scheme)
    _assign_types(model.graph, COMPUTE_DTYPES[precision])
    if scheme is not None and scheme.attention:
        counts |= quantize_attention(model, scheme.attention)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.TopologicalSortPass()(model)
    return graph_of(model, counts, plain.opset)


def _quantize(model: ir.Model, scheme: QdqScheme) -> dict[str, int]:
    amax = {**scheme.amax, **{merged_name(name): value for name, value in scheme.amax.items()}}
    excluded = scheme.excluded | {merged_name(name) for name in scheme.excluded}
    linears = find_linear_layers(model)
    chosen = [linear for linear in linears if not joined_parts(linear) & excluded]
    for linear in chosen:
        _quantize_linear(model.graph, linear, scheme.kind, max(amax[name] for name in joined_parts(linear)))
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.CommonSubexpressionEliminationPass()(model)  # GEMMs that share an input quantize it once
    return {f"{scheme.kind}_linears": len(chosen), "fp16_linears": len(linears) - len(chosen)}


def _quantize_linear(graph: ir.Graph, linear: LinearLayer, kind: EightBits, amax: float) -> None:
    """Compute a linear layer as (Qx · Qw · 2^-n) * scales + bias, with 8-bit matrices Qx and Qw.

    The engine's GEMM multiplies its sums by 2^-n before it stores them, so FP16 holds them. If the scale of Qx or the
    scales of Qw stood in DequantizeLinear, TensorRT-RTX would store unscaled sums, which overflow FP16.
    """
    build = Builder(graph, linear.node, scope_of(linear.node))
    dtype, largest = _QUANTIZED_DTYPES[kind], _MAX_MAGNITUDE[kind]
    zero = constant(graph, f"zero_{kind}", np.zeros((), dtype.numpy()))
    scale = constant(graph, f"{linear.x.name}/{kind}.scale", fp16_scale(amax, largest).astype(np.float32))
    matrix, scales = _quantized_columns(linear.matrix(), kind)
    shift = _sum_shift(len(matrix), largest)
    sum_scale, unit = (constant(graph, f"two_to_minus_{n}", np.array(2.0**-n, np.float32)) for n in (shift, 0))
    quantized = build.op("QuantizeLinear", linear.x, scale, zero, name="quantized", dtype=dtype)
    x = build.op("DequantizeLinear", quantized, sum_scale, zero, name="input")
    stored = initializer(graph, f"{linear.name}.{kind}", ir.tensor(matrix))
    sums = build.op("MatMul", x, build.op("DequantizeLinear", stored, unit, name="weight"))
    scales = array(scale) * scales * np.float32(2.0**shift)
    product = build.op("Mul", sums, initializer(graph, f"{linear.name}.{kind}.scale", ir.tensor(scales)), name="scaled")
    replace(linear.node.outputs[0], product if linear.bias is None else build.op("Add", product, linear.bias))


def _sum_shift(length: int, largest: int) -> int:
    """The smallest n for which no sum of `length` products of 8-bit values, divided by 2^n, overflows FP16."""
    # The largest magnitude of an int8 input is 128, not 127.
    return math.ceil(math.log2(length * largest * (largest + 1) / _MAX_FP16))


def _quantized_columns(matrix: NDArray[np.float32], kind: EightBits) -> tuple[np.ndarray, NDArray[np.float32]]:
    """Quantize [in, out] float32; return 8-bit values [in, out] and scales [out] float32, 1 for a column of zeros."""
    if kind == "int8":
        return quantize_columns(matrix)
    amax = np.abs(matrix).max(axis=0)
    scales = np.where(amax > 0, amax / _MAX_MAGNITUDE[kind], 1).astype(np.float32)
    return (matrix / scales).astype(ml_dtypes.float8_e4m3fn), scales


def _fill_in_types(graph: ir.Graph) -> None:
    """Fill in the missing FP32 data types."""
    for node in graph:
        floats = any(value is not None and value.dtype == _FP32 for value in node.inputs)
        for output in node.outputs:
            if output.dtype is None and floats:
                output.type = ir.TensorType(_FP32)


def _assign_types(graph: ir.Graph, compute_dtype: ir.DataType) -> None:
    """Assign a data type to every node, and insert a Cast wherever two types meet."""
    fp32 = _kept_in_fp32(graph)
    pooling = _pooling_nodes(graph)
    copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in copies:
            copies[value, dtype] = (
                _converted(graph, value, dtype) if value.is_initializer() else _cast(graph, value, dtype)
            )
        return copies[value, dtype]

    for node in list(graph):
        dtype = _FP32 if node in fp32 or node in pooling else compute_dtype
        if node.op_type == "QuantizeLinear":
            dtype = operand(node, 0).dtype or compute_dtype
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_FP32, compute_dtype) and value.dtype != dtype:
                node.replace_input_with(i, typed(value, dtype))
        for output in node.outputs:
            if output.dtype == _FP32:
                output.type = ir.TensorType(dtype)  # not output.dtype: copies of a graph share the type
        if node.op_type == "LayerNormalization":
            # In 16 bits the following layers read the residual twice as fast. The output of the graph stays FP32.
            (output,) = node.outputs
            uses = [use for use in output.uses() if use.node not in pooling]
            for user, index in uses:
                user.replace_input_with(index, typed(output, compute_dtype))
    for i, output in enumerate(graph.outputs):
        if output.dtype == compute_dtype:
            name = output.name
            output.name = f"{name}/{compute_dtype.name}"
            cast = _cast(graph, output, _FP32)
            cast.name, cast.shape = name, output.shape
            graph.outputs[i] = cast


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    source = value.producer()
    assert source is not None  # the graph's own inputs are int64
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/{dtype.name.lower()}")
    node.outputs[0].name, node.outputs[0].dtype = node.name, dtype
    graph.insert_after(source, node)
    return node.outputs[0]


def _converted(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """An initialiser with the values of `value` in another data type, converted when they are read."""
    name = f"{value.name}.{dtype.name.lower()}"
    return graph.initializers.get(name) or initializer(graph, name, rounded_when_read(value, dtype))


def _kept_in_fp32(graph: ir.Graph) -> set[ir.Node]:
    """The nodes in FP32: the mask, the rotation and its tables, gated units, LayerNorms and their residual sums."""
    kept, computed_from_tokens = set(), set[ir.Value]()
    for node in graph:
        table = operand(node, 0) if node.op_type == "Gather" and operand(node, 1).name != POSITIONS else None
        is_embedding = table is not None and table.is_initializer() and table.dtype == _FP32
        if is_embedding or node.op_type == "DequantizeLinear" or computed_from_tokens & set(node.inputs):
            computed_from_tokens.update(node.outputs)
        else:
            kept.add(node)  # it depends only on the mask, tables and shapes
        if node.op_type == "LayerNormalization":
            kept.add(node)
            total = operand(node, 0).producer()
            if total is not None and total.op_type == "Add":
                kept.add(total)
        elif node.op_type in FUNCTIONS:
            kept.add(node)
            products = _products(node)
            kept.update(products)
            if node.op_type == "Sigmoid":  # of SiLU: the first product is that of the gate with its sigmoid
                kept.update(product for silu in products for product in _products(silu))
        elif node.op_type == "Neg":
            kept.update(_rotation(node))
        elif is_quantized(node):
            kept.update(_after_sums(node))
    return kept


def _products(node: ir.Node) -> list[ir.Node]:
    """The nodes that multiply the output of a node."""
    return [use.node for use in node.outputs[0].uses() if use.node.op_type == "Mul"]


def _after_sums(product: ir.Node) -> Iterator[ir.Node]:
    """The nodes that scale the sums of an 8-bit GEMM, add its bias, and move the result."""
    pending = [consumer(product.outputs[0], "Mul")]
    while pending:
        node = pending.pop()
        yield node
        for user in {use.node for output in node.outputs for use in output.uses()}:
            adds_bias = user.op_type == "Add" and any(value and value.is_initializer() for value in user.inputs)
            if adds_bias or user.op_type in _MOVES:
                pending.append(user)


def _rotation(negation: ir.Node) -> Iterator[ir.Node]:
    """The nodes of x * cos + concat(-x[D/2:], x[:D/2]) * sin, and the scale of queries if there is one."""
    upper = producer(negation.inputs[0], "Slice")
    rotated = consumer(negation.outputs[0], "Concat")
    sine = consumer(rotated.outputs[0], "Mul")
    total = consumer(sine.outputs[0], "Add")
    cosine = producer(other_operand(total, sine.outputs[0]), "Mul")
    yield from (upper, producer(rotated.inputs[1], "Slice"), negation, rotated, sine, cosine, total)
    yield from (use.node for use in total.outputs[0].uses() if use.node.op_type == "Mul")


def _pooling_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that compute the sentence embedding from the hidden states."""
    outputs = {value.name: value for value in graph.outputs}
    if "sentence_embedding" not in outputs:
        return set()
    return _ancestors(outputs["sentence_embedding"]) - _ancestors(outputs["last_hidden_state"])


def _ancestors(value: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            pending += [source for source in node.inputs if source is not None]
    return found

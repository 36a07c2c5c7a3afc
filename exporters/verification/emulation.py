"""Rewrites a graph for ONNX Runtime's CPU provider, operator by operator, to compare it without the hardware it is for.

`cpu_emulation` is for graphs for a GPU:

* A value in half precision becomes float32 and is rounded to the half type where a kernel would write it. The results
  are those of kernels that sum in FP32, overflow included. ONNX Runtime keeps these roundings at every optimization
  level; of a graph in FP16 itself, its CPU provider leaves out the roundings between FP16 nodes.
* RemovePadding, PackedMultiHeadAttention and RestorePadding, which only the CUDA provider has, become standard
  operators that follow ONNX Runtime's documentation (docs/ContribOperators.md).

`bf16_emulation` is for an FP32 or INT8 graph that OpenVINO computes in bfloat16, on a CPU that has none.

An emulation cannot show that the kernels themselves are right.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    constant,
    initializer,
    integers,
    operand,
    replace,
    tensor_of,
)
from gte_deploy.exporters.graph.fusion.attention import MASK_COLUMNS, QUERY_COLUMN
from gte_deploy.exporters.graph.half import HALVES, add_cast, rounded_when_read
from gte_deploy.exporters.graph.trace import MASK_BIAS

# Operators that only move data introduce no rounding.
_MOVES = frozenset(
    "Concat Gather GatherND RemovePadding Reshape RestorePadding Slice Split Squeeze Transpose Unsqueeze".split()
)
# GEMMs of 8-bit values multiply the integers and scale the sums in FP32; only the scaled sums are rounded.
_SCALES = frozenset(("QuantizeLinear", "DequantizeLinear"))


def cpu_emulation(graph: Graph) -> Graph:
    """Return a copy of `graph` that computes the same on the CPU provider; `graph` does not change."""
    model = graph.model.clone()
    for dtype in HALVES.values():
        _widen(model.graph, dtype)
    is_packed = any(node.op_type == "RemovePadding" for node in model.graph)
    for node in list(model.graph) if is_packed else ():
        if (rewrite := _REWRITES.get(node.op_type)) is not None:
            values = rewrite(_Builder(Builder(model.graph, node, f"{node.name}/cpu")), node)
            for old, new in zip(node.outputs, values, strict=True):
                replace(old, new)
    _clean(model)
    return dataclasses.replace(graph, model=model)


def bf16_emulation(graph: Graph) -> Graph:
    """Return a copy of `graph`, in FP32 or INT8, whose operators read and write bfloat16 and sum in FP32.

    OpenVINO rounds less: it keeps FP32 inside the kernels that it fuses, and after the last matrix product.
    """
    model, dtype = graph.model.clone(), ir.DataType.BFLOAT16
    for name, value in list(model.graph.initializers.items()):
        users = [use for use in value.uses() if use.node.op_type not in _SCALES]
        if users and value.dtype == ir.DataType.FLOAT:
            tensor = _widened_when_read(rounded_when_read(value, dtype))
            rounded = initializer(model.graph, f"{name}.rounded", tensor)
            for user, index in users:
                user.replace_input_with(index, rounded)
    for node in list(model.graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and node.op_type not in _MOVES | _SCALES:
                _round_output(model.graph, value, dtype)
    _clean(model)
    return dataclasses.replace(graph, model=model)


def _round_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Let all users of the FP32 `value` read it rounded to `dtype`."""
    users = list(value.uses())
    rounded = add_cast(graph, add_cast(graph, value, dtype), ir.DataType.FLOAT)
    for user, index in users:
        user.replace_input_with(index, rounded)
    if value.is_graph_output():
        value.name, rounded.name = f"{value.name}/exact", value.name
        graph.outputs[graph.outputs.index(value)] = rounded


def _clean(model: ir.Model) -> None:
    for clean in (ir_passes.RemoveUnusedNodesPass(), ir_passes.TopologicalSortPass(), ir_passes.NameFixPass()):
        clean(model)


def _widen(graph: ir.Graph, dtype: ir.DataType) -> None:
    for name, value in list(graph.initializers.items()):
        if value.dtype == dtype:
            value.replace_all_uses_with(initializer(graph, f"{name}.wide", _widened_when_read(tensor_of(value))))
            del graph.initializers[name]
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != dtype:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)  # not value.dtype: clones share the type
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            if node.op_type not in _MOVES:
                _round_output(graph, value, dtype)


def _widened_when_read(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


# --- operators that the CPU provider lacks, built from standard operators -------------------------------------------


class _Builder:
    """Inserts nodes with int64, float32 or bool results before a node of the graph."""

    def __init__(self, build: Builder) -> None:
        self._build = build

    def ints(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self._build.op(op_type, *inputs, dtype=ir.DataType.INT64, **attributes)

    def floats(self, op_type: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
        return self._build.op(op_type, *inputs, **options)

    def bools(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return self._build.op(op_type, *inputs, dtype=ir.DataType.BOOL)

    def vector(self, *numbers: int) -> ir.Value:
        return integers(self._build.graph, *numbers)

    def value(self, name: str, contents: np.ndarray) -> ir.Value:
        return constant(self._build.graph, f"cpu/{name}", contents)

    def int32(self, value: ir.Value) -> ir.Value:
        return self._build.op("Cast", value, to=ir.DataType.INT32, dtype=ir.DataType.INT32)

    def int64(self, value: ir.Value) -> ir.Value:
        return self.ints("Cast", value, to=ir.DataType.INT64)

    def count_up(self, end: ir.Value) -> ir.Value:
        """Return 0 … end-1 for an `end` [1]."""
        zero, one = (self.value(f"int64_{n}", np.array(n, np.int64)) for n in (0, 1))
        return self.ints("Range", zero, self.ints("Squeeze", end), one)

    def are_tokens(self, counts: ir.Value, length: ir.Value) -> ir.Value:
        """Return [B, S], whether each position holds a token, from counts [B] and length [1]."""
        return self.bools("Less", self.count_up(length), self.ints("Unsqueeze", counts, self.vector(1)))

    def token_numbers(self, rows: ir.Value, offset: ir.Value) -> ir.Value:
        """Return [T], the numbers of the packed rows [T, …] among the B*S padded rows."""
        flat = self.int64(self._build.op("Reshape", offset, self.vector(-1), dtype=ir.DataType.INT32))
        return self.ints("Slice", flat, self.vector(0), self.ints("Shape", rows, start=0, end=1), self.vector(0))

    def restored(self, rows: ir.Value, offset: ir.Value) -> ir.Value:
        """Return rows [T, H] as [B, S, H], zero at padding."""
        number = self.ints("Reshape", self.ints("Size", offset), self.vector(1))
        width = self.ints("Shape", rows, start=1)
        zeros = self.floats("ConstantOfShape", self.ints("Concat", number, width, axis=0))
        numbers = self.ints("Unsqueeze", self.token_numbers(rows, offset), self.vector(1))
        padded = self.floats("ScatterND", zeros, numbers, rows)
        return self.floats("Reshape", padded, self.ints("Concat", self.ints("Shape", offset), width, axis=0))

    def rows(self, value: ir.Value, numbers: ir.Value) -> ir.Value:
        """Return the rows [T, H] with these numbers, from [B, S, H]."""
        flat = self.ints("Concat", self.vector(-1), self.ints("Shape", value, start=2), axis=0)
        return self.floats("Gather", self.floats("Reshape", value, flat), numbers, axis=0)


def _remove_padding(build: _Builder, node: ir.Node) -> list[ir.Value]:
    """States [B, S, H], counts [B] -> rows [T, H], offset [B, S], cumulated [B + 1], longest [1]."""
    x, counts = operand(node, 0), build.int64(operand(node, 1))
    size = build.ints("Shape", x, start=0, end=2)
    real = build.are_tokens(counts, build.ints("Shape", x, start=1, end=2))
    real = build.bools("Reshape", real, build.vector(-1))
    numbers = build.count_up(build.ints("ReduceProd", size))
    tokens = build.ints("Compress", numbers, real)
    padding = build.ints("Compress", numbers, build.bools("Not", real))
    offset = build.ints("Reshape", build.ints("Concat", tokens, padding, axis=0), size)
    sums = build.ints("CumSum", counts, build.value("int64_0", np.array(0, np.int64)))
    cumulated = build.ints("Concat", build.vector(0), sums, axis=0)
    longest = build.ints("ReduceMax", counts)
    return [build.rows(x, tokens), *(build.int32(value) for value in (offset, cumulated, longest))]


def _restore_padding(build: _Builder, node: ir.Node) -> list[ir.Value]:
    return [build.restored(operand(node, 0), operand(node, 1))]


def _packed_attention(build: _Builder, node: ir.Node) -> list[ir.Value]:
    """Attend within each text: pad the rows again and fold the mask into queries and keys (fusion/attention.py)."""
    heads, scale = node.attributes.get_int("num_heads", 0), node.attributes.get_float("scale", 0.0)
    rows, offset, cumulated = operand(node, 0), operand(node, 4), build.int64(operand(node, 5))
    query, key, value = (build.restored(operand(node, i), offset) for i in range(3))
    ends = build.ints("Slice", cumulated, build.vector(1), build.vector(1 << 31), build.vector(0))
    starts = build.ints("Slice", cumulated, build.vector(0), build.vector(-1), build.vector(0))
    real = build.are_tokens(build.ints("Sub", ends, starts), build.ints("Shape", offset, start=1))
    zero, masked = (np.array(x, np.float32) for x in (0, MASK_BIAS / (QUERY_COLUMN * scale)))
    bias = build.floats("Where", real, build.value("zero", zero), build.value("masked", masked))
    column = build.floats("Unsqueeze", bias, build.vector(2, 3))
    padded = build.floats("Pad", column, build.vector(*[0] * 7, MASK_COLUMNS - 1))
    first = np.zeros((1, 1, heads, MASK_COLUMNS), np.float32)
    first[..., 0] = QUERY_COLUMN
    per_key = build.floats("Expand", padded, build.vector(1, 1, heads, 1))
    per_query = build.floats("Expand", build.value("per_query", first), build.ints("Shape", column))

    def with_mask(value: ir.Value, columns: ir.Value) -> ir.Value:
        apart = build.floats("Reshape", value, build.vector(0, 0, heads, -1))
        return build.floats("Reshape", build.floats("Concat", apart, columns, axis=3), build.vector(0, 0, -1))

    inputs = (with_mask(query, per_query), with_mask(key, per_key), value)
    attended = build.floats("MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=heads, scale=scale)
    return [build.rows(attended, build.token_numbers(rows, offset))]


def _rotary(build: _Builder, node: ir.Node) -> list[ir.Value]:
    """Turn one text of all tokens into texts of one token: the CPU kernel takes no text longer than its tables."""
    texts = build.floats("Transpose", operand(node, 0), perm=(1, 0, 2))
    positions = build.ints("Transpose", operand(node, 1), perm=(1, 0))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    rotated = build.floats("RotaryEmbedding", texts, positions, *node.inputs[2:], domain=CONTRIB, **attributes)
    return [build.floats("Transpose", rotated, perm=(1, 0, 2))]


_REWRITES: Mapping[str, Callable[[_Builder, ir.Node], list[ir.Value]]] = {
    "RemovePadding": _remove_padding,
    "RestorePadding": _restore_padding,
    "PackedMultiHeadAttention": _packed_attention,
    "RotaryEmbedding": _rotary,
}

"""Attention: explicit MatMul, Softmax, MatMul -> com.microsoft MultiHeadAttention, with the mask folded into q and k.

With a mask input ONNX Runtime stores all S*S scores of every head (docs/decisions/mask-folded-into-attention.md). So
the mask becomes 8 more columns of every head: [64, 0, …] for queries, and [bias / (64 * scale), 0, …] for keys:

    scale * (q·k + 64 * bias / (64 * scale)) = scale * q·k + bias

The bias of a real token is 0, so the columns round nothing. Values keep their size. The columns are computed once per
run, from the graph's own bias [B, 1, 1, S], and all layers share them. There are two forms:

* `ATTENTION` always has 8 columns. The passes for CUDA take it.
* `ATTENTION_ON_CPU` has 8 columns in a batch with padding and none in a batch without it, such as every single text.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    array,
    by_name,
    constant,
    consumer,
    dimensions,
    integers,
    operand,
    producer,
    replace,
    require,
    same_constant,
    scope_of,
    split_operands,
)
from gte_deploy.exporters.graph.fusion.heads import HEADS_FIRST, Heads, require_heads, require_permutation

MASK_COLUMNS = 8
MASK_INPUT = "attention_mask"
QUERY_COLUMN = 64.0


@dataclass(frozen=True)
class Attention:
    """softmax(query · key^T * scale + bias) · value, heads joined.

    Args:
        query, key, value: [B, N, S, D].
        scale: the factor of query · key^T.
        bias: the additive mask.
        scores: query · key^T, before the scale.
        product: the MatMul of the attention weights and the values, [B, N, S, D].
        output: the Reshape to [B, S, N*D].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    bias: ir.Value
    scores: ir.Value
    product: ir.Node
    output: ir.Node


def require_attention(softmax: ir.Node) -> Attention:
    """Match the attention around a Softmax, or raise Mismatch."""
    require(softmax.attributes.get_int("axis", -1) in (-1, 3), "the softmax is not over keys")
    scores, bias = split_operands(producer(softmax.inputs[0], "Add"), "Mul")
    product, scale = split_operands(scores, "MatMul")
    key_transpose = producer(product.inputs[1], "Transpose")
    require_permutation(key_transpose, (0, 1, 3, 2))
    weighted = consumer(softmax.outputs[0], "MatMul")
    require(weighted.inputs[0] is softmax.outputs[0], "the weights are not the left factor")
    transpose = consumer(weighted.outputs[0], "Transpose")
    require_permutation(transpose, HEADS_FIRST)
    output = consumer(transpose.outputs[0], "Reshape")
    query, key, value = operand(product, 0), operand(key_transpose, 0), operand(weighted, 1)
    return Attention(query, key, value, float(array(scale).item()), bias, product.outputs[0], weighted, output)


def require_same_heads(attention: Attention, query: Heads, key: Heads, value: Heads) -> None:
    """Raise Mismatch unless all three are split into the same heads, and the output joins these heads."""
    sizes = {(heads.count, heads.size) for heads in (query, key, value)}
    require(len(sizes) == 1, f"queries, keys and values are split into heads differently: {sorted(sizes)}")
    width = value.count * value.size
    require(same_constant(attention.output.inputs[1], [0, 0, width]), f"the heads are not joined to [0, 0, {width}]")


def require_mask_of_keys(bias: ir.Value) -> None:
    """Raise Mismatch unless the additive mask is the same for all queries and heads."""
    shape = dimensions(bias)
    require(
        len(shape) == 4 and shape[1:3] == (1, 1),
        f"the mask {bias.name!r} has shape {list(shape)}, not [batch, 1, 1, sequence]",
    )


def require_mask_columns(value: ir.Value | None) -> ir.Node:
    """Match the Concat of heads [B, S, N, D] and mask columns in queries or keys after this pass, or raise Mismatch."""
    return producer(producer(value, "Reshape").inputs[0], "Concat")


def _rewrite(graph: ir.Graph, softmax: ir.Node, *, only_with_padding: bool) -> None:
    found = require_attention(softmax)
    output, bias = found.output, found.bias
    query, key, value = (require_heads(v) for v in (found.query, found.key, found.value))
    require_same_heads(found, query, key, value)
    require_mask_of_keys(bias)

    build = Builder(graph, output, scope_of(output))
    columns = _width(Builder(graph, output, "mask")) if only_with_padding else None
    query_columns, key_columns = _mask_columns(graph, output, bias, found.scale, query.count, columns)
    width = query.count * (query.size + MASK_COLUMNS) if columns is None else -1
    attended = build.op(
        "MultiHeadAttention",
        _append(build, query, query_columns, width, "query"),
        _append(build, key, key_columns, width, "key"),
        value.projection,
        domain=CONTRIB,
        num_heads=value.count,
        scale=found.scale,
    )
    replace(output.outputs[0], attended)


def _width(build: Builder) -> ir.Value:
    """The number of mask columns of this run, [1] int64: 0 if no text has padding."""
    int64: Any = {"dtype": ir.DataType.INT64}
    smallest = build.op("ReduceMin", by_name(build.graph.inputs, MASK_INPUT), name="smallest", keepdims=0, **int64)
    has_none = build.op("Reshape", smallest, integers(build.graph, 1), name="has_no_padding", **int64)
    has_padding = build.op("Sub", integers(build.graph, 1), has_none, name="has_padding", **int64)
    return build.op("Mul", has_padding, integers(build.graph, MASK_COLUMNS), name="width", **int64)


def _mask_columns(
    graph: ir.Graph, anchor: ir.Node, bias: ir.Value, scale: float, num_heads: int, width: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Columns for queries and for keys, [B, S, N, 8] each, or [B, S, N, width].

    Every layer adds equal nodes, which are merged later.
    """
    build = Builder(graph, anchor, "mask")
    per_key = build.op("Transpose", bias, perm=(0, 3, 1, 2), name="per_key")
    factor = constant(graph, "mask/key_factor", np.array(1.0 / (QUERY_COLUMN * scale), np.float32))
    column = build.op("Mul", per_key, factor, name="column")
    padded = build.op("Pad", column, integers(graph, *[0] * 7, MASK_COLUMNS - 1), name="padded")
    first: NDArray[np.float32] = np.zeros((1, 1, num_heads, MASK_COLUMNS), np.float32)
    first[..., 0] = QUERY_COLUMN
    per_query = constant(graph, "mask/per_query", first)
    if width is not None:
        start, axis = integers(graph, 0), integers(graph, 3)
        padded = build.op("Slice", padded, start, width, axis, name="cut_for_keys")
        per_query = build.op("Slice", per_query, start, width, axis, name="cut_for_queries")
    key_columns = build.op("Expand", padded, integers(graph, 1, 1, num_heads, 1), name="key_columns")
    size = build.op("Shape", per_key, name="size", dtype=ir.DataType.INT64)
    query_columns = build.op("Expand", per_query, size, name="query_columns")
    return query_columns, key_columns


def _append(build: Builder, heads: Heads, columns: ir.Value, width: int, name: str) -> ir.Value:
    widened = build.op("Concat", heads.view.outputs[0], columns, axis=3, name=f"{name}_and_mask")
    target = integers(build.graph, 0, 0, width)
    return build.op("Reshape", widened, target, name=name)


ATTENTION = FusionPass(name="attention", anchor="Softmax", rewrite=functools.partial(_rewrite, only_with_padding=False))
ATTENTION_ON_CPU = FusionPass(
    name="attention", anchor="Softmax", rewrite=functools.partial(_rewrite, only_with_padding=True)
)

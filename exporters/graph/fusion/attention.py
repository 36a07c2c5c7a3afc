"""Attention: explicit MatMul, Softmax, MatMul -> com.microsoft MultiHeadAttention, with the mask folded into q and k.

With a mask input ONNX Runtime holds all S*S scores of every head (docs/decisions/mask-folded-into-attention.md). So
8 columns are appended to every head: queries hold [64, 0, …] there and keys [bias / (64 * scale), 0, …]:

    scale * (q·k + 64 * bias / (64 * scale)) = scale * q·k + bias

For a real token the bias is 0 and nothing is rounded. Values keep their size. The columns are made once per run, from
the graph's own bias [B, 1, 1, S], and shared by the layers.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    array,
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
QUERY_COLUMN = 64.0


@dataclass(frozen=True)
class Attention:
    """softmax(query · key^T * scale + bias) · value, heads joined.

    Args:
        query, key, value: [B, N, S, D].
        scale: of the scores.
        bias: additive mask.
        output: the Reshape that gives [B, S, N*D].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    bias: ir.Value
    output: ir.Node


def require_attention(softmax: ir.Node) -> Attention:
    """The attention around a Softmax, or Mismatch."""
    require(softmax.attributes.get_int("axis", -1) in (-1, 3), "the softmax is not over keys")
    scores, bias = split_operands(producer(softmax.inputs[0], "Add"), "Mul")
    product, scale = split_operands(scores, "MatMul")
    keys_last = producer(product.inputs[1], "Transpose")
    require_permutation(keys_last, (0, 1, 3, 2))
    mixed = consumer(softmax.outputs[0], "MatMul")
    require(mixed.inputs[0] is softmax.outputs[0], "the weights are not the left factor")
    merged = consumer(mixed.outputs[0], "Transpose")
    require_permutation(merged, HEADS_FIRST)
    output = consumer(merged.outputs[0], "Reshape")
    query, key, value = operand(product, 0), operand(keys_last, 0), operand(mixed, 1)
    return Attention(query, key, value, float(array(scale).item()), bias, output)


def require_same_heads(attention: Attention, query: Heads, key: Heads, value: Heads) -> None:
    """Mismatch unless all three are split alike, and joined so again."""
    sizes = {(heads.count, heads.size) for heads in (query, key, value)}
    require(len(sizes) == 1, f"queries, keys and values are split into heads differently: {sorted(sizes)}")
    width = value.count * value.size
    require(same_constant(attention.output.inputs[1], [0, 0, width]), f"the heads are not joined to [0, 0, {width}]")


def _rewrite(graph: ir.Graph, softmax: ir.Node) -> None:
    found = require_attention(softmax)
    output, bias, factor = found.output, found.bias, found.scale
    query, key, value = (require_heads(v) for v in (found.query, found.key, found.value))
    require_same_heads(found, query, key, value)
    shape = dimensions(bias)
    require(
        len(shape) == 4 and shape[1:3] == (1, 1),
        f"the mask {bias.name!r} has shape {list(shape)}, not [batch, 1, 1, sequence]",
    )

    build = Builder(graph, output, scope_of(output))
    query_columns, key_columns = _mask_columns(graph, output, bias, factor, query.count)
    attended = build.op(
        "MultiHeadAttention",
        _append(build, query, query_columns, "query"),
        _append(build, key, key_columns, "key"),
        value.projection,
        domain=CONTRIB,
        num_heads=value.count,
        scale=factor,
    )
    replace(output.outputs[0], attended)


def _mask_columns(
    graph: ir.Graph, anchor: ir.Node, bias: ir.Value, scale: float, num_heads: int
) -> tuple[ir.Value, ir.Value]:
    """Columns for queries and for keys, [B, S, N, 8] each; every layer makes the same, and equal nodes are merged."""
    build = Builder(graph, anchor, "mask")
    per_key = build.op("Transpose", bias, perm=(0, 3, 1, 2), name="per_key")
    factor = constant(graph, "mask/key_factor", np.array(1.0 / (QUERY_COLUMN * scale), np.float32))
    column = build.op("Mul", per_key, factor, name="column")
    padded = build.op("Pad", column, integers(graph, *[0] * 7, MASK_COLUMNS - 1), name="padded")
    key_columns = build.op("Expand", padded, integers(graph, 1, 1, num_heads, 1), name="key_columns")
    per_query = np.zeros((1, 1, num_heads, MASK_COLUMNS), np.float32)
    per_query[..., 0] = QUERY_COLUMN
    size = build.op("Shape", per_key, name="size", dtype=ir.DataType.INT64)
    query_columns = build.op("Expand", constant(graph, "mask/per_query", per_query), size, name="query_columns")
    return query_columns, key_columns


def _append(build: Builder, heads: Heads, columns: ir.Value, name: str) -> ir.Value:
    wider = build.op("Concat", heads.view.outputs[0], columns, axis=3, name=f"{name}_and_mask")
    target = integers(build.graph, 0, 0, heads.count * (heads.size + MASK_COLUMNS))
    return build.op("Reshape", wider, target, name=name)


ATTENTION = FusionPass(name="attention", anchor="Softmax", rewrite=_rewrite)

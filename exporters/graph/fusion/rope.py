"""Rotary position embedding: 4-D slices, negation and products -> one com.microsoft RotaryEmbedding.

    x * cos + concat(-x[D/2:], x[:D/2]) * sin,   x = transpose(reshape(projection, [B, S, N, D]))
 -> transpose(reshape(RotaryEmbedding(projection, 0, cos table, sin table)))

The tables are the trace's own initialisers [max_length, D/2], with PyTorch's values
(docs/decisions/rotation-tables-from-pytorch.md). The positions [B, S] are computed once per run. All layers share both.
A layer has two sites: queries and keys.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    Mismatch,
    array,
    by_name,
    constant,
    consumer,
    operand,
    other_operand,
    producer,
    replace,
    require,
    same_constant,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.heads import HEADS_FIRST, Heads, require_heads
from gte_deploy.exporters.graph.fusion.rows import FIRST_INPUT


@dataclass(frozen=True)
class Rotation:
    """A match of x * cos + concat(-x[D/2:], x[:D/2]) * sin, where x is split into heads.

    Args:
        heads: x, [B, N, S, D].
        cosines, sines: the tables whose slices are cos and sin, initialisers [max_length, D/2].
        cosine, sine: the factors cos and sin, [1, 1, S, D].
        total: the Add of both terms, [B, N, S, D].
    """

    heads: Heads
    cosines: ir.Value
    sines: ir.Value
    cosine: ir.Value
    sine: ir.Value
    total: ir.Node


def require_rotation(negation: ir.Node) -> Rotation:
    """Match the rotation around a Neg, or raise Mismatch."""
    upper = producer(negation.inputs[0], "Slice")
    rotated = consumer(negation.outputs[0], "Concat")
    lower = producer(rotated.inputs[1], "Slice")
    heads = require_heads(upper.inputs[0])
    require(lower.inputs[0] is upper.inputs[0], "the two halves are not of the same tensor")
    require(rotated.inputs[0] is negation.outputs[0], "the upper half does not come first")
    half = heads.size // 2
    require(_slice_bounds(lower) == (0, half), f"the lower half is not [0:{half}]")
    require(_slice_bounds(upper)[0] == half and _slice_bounds(upper)[1] >= heads.size, "the upper half does not fit")

    sine_term = consumer(rotated.outputs[0], "Mul")
    total = consumer(sine_term.outputs[0], "Add")
    sine = other_operand(sine_term, rotated.outputs[0])
    cosine_term = producer(other_operand(total, sine_term.outputs[0]), "Mul")
    cosine = other_operand(cosine_term, operand(upper, 0))
    return Rotation(heads, _table(cosine, half), _table(sine, half), cosine, sine, total)


def _rewrite(graph: ir.Graph, negation: ir.Node) -> None:
    found = require_rotation(negation)
    heads, total = found.heads, found.total

    build = Builder(graph, total, scope_of(total))
    rotated = build.op(
        "RotaryEmbedding",
        heads.projection,
        _positions(build),
        found.cosines,
        found.sines,
        domain=CONTRIB,
        shape=heads.projection.shape,
        interleaved=0,
        num_heads=heads.count,
    )
    split = build.op("Reshape", rotated, heads.view.inputs[1], shape=heads.view.outputs[0].shape, allowzero=0)
    replace(total.outputs[0], build.op("Transpose", split, perm=HEADS_FIRST))


def _positions(build: Builder) -> ir.Value:
    """0 … S-1 in every row, [B, S] int64. Every site adds equal nodes, which are merged later."""
    ids = by_name(build.graph.inputs, FIRST_INPUT)
    build, int64 = build.inside("positions"), {"dtype": ir.DataType.INT64}
    shape = build.op("Shape", ids, name="batch_sequence", **int64)
    length = build.op("Squeeze", build.op("Shape", ids, name="sequence", start=1, **int64), name="length", **int64)
    zero, one = (constant(build.graph, f"int64_scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
    return build.op("Expand", build.op("Range", zero, length, one, name="row", **int64), shape, name="rows", **int64)


def _slice_bounds(node: ir.Node) -> tuple[int, int]:
    starts, ends, axes, steps = (operand(node, i) for i in range(1, 5))
    require(same_constant(axes, [3]) and same_constant(steps, [1]), f"{node.name} does not slice the head axis")
    return int(array(starts).item()), int(array(ends).item())


def _table(value: ir.Value, half: int) -> ir.Value:
    """The initialiser `table` [max_length, D/2] in unsqueeze(concat(table[:S], table[:S]))."""
    while (source := value.producer()) is not None and source.op_type == "Unsqueeze":
        value = operand(source, 0)
    concat = producer(value, "Concat")
    require(len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1], "the table's halves are not the same")
    rows = producer(concat.inputs[0], "Slice")
    table, starts, axes, steps = (operand(rows, i) for i in (0, 1, 3, 4))
    from_zero = same_constant(starts, [0]) and same_constant(axes, [0]) and same_constant(steps, [1])
    require(from_zero, "positions do not start at 0")
    contents = array(table)
    if contents.ndim != 2 or contents.shape[1] != half:
        raise Mismatch(f"the table {table.name!r} has shape {list(contents.shape)}, not [max_length, {half}]")
    return table


ROPE = FusionPass(name="rope", anchor="Neg", rewrite=_rewrite)

"""Rotary position embedding: 4-D slices, negation and products -> one com.microsoft RotaryEmbedding.

    x * cos + concat(-x[D/2:], x[:D/2]) * sin,   x = transpose(reshape(projection, [B, S, N, D]))
 -> transpose(reshape(RotaryEmbedding(projection, 0, cos table, sin table)))

The tables stay the initialisers that the trace took from PyTorch, [max_length, D/2], shared by every layer; positions
are [B, S], made once (docs/decisions/rotation-tables-from-pytorch.md). Queries and
keys are a site each.
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
    """x * cos + concat(-x[D/2:], x[:D/2]) * sin, of x split into heads.

    Args:
        heads: x, [B, N, S, D].
        cosines, sines: the tables that cos and sin are cut from, initialisers [max_length, D/2].
        total: the Add that gives [B, N, S, D].
    """

    heads: Heads
    cosines: ir.Value
    sines: ir.Value
    total: ir.Node


def require_rotation(negation: ir.Node) -> Rotation:
    """The rotation around a Neg, or Mismatch."""
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
    return Rotation(heads, _table(cosine, half), _table(sine, half), total)


def _rewrite(graph: ir.Graph, negation: ir.Node) -> None:
    found = require_rotation(negation)
    heads, total = found.heads, found.total

    build = Builder(graph, total, scope_of(total))
    turned = build.op(
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
    apart = build.op("Reshape", turned, heads.view.inputs[1], shape=heads.view.outputs[0].shape, allowzero=0)
    replace(total.outputs[0], build.op("Transpose", apart, perm=HEADS_FIRST))


def _positions(build: Builder) -> ir.Value:
    """0 … S-1 in every row, [B, S] int64; every site makes the same, and equal nodes are merged."""
    ids = next(value for value in build.graph.inputs if value.name == FIRST_INPUT)
    build, whole = build.inside("positions"), {"dtype": ir.DataType.INT64}
    shape = build.op("Shape", ids, name="batch_sequence", **whole)
    length = build.op("Squeeze", build.op("Shape", ids, name="sequence", start=1, **whole), name="length", **whole)
    zero, one = (constant(build.graph, f"int64_scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
    return build.op("Expand", build.op("Range", zero, length, one, name="row", **whole), shape, name="rows", **whole)


def _slice_bounds(node: ir.Node) -> tuple[int, int]:
    starts, ends, axes, steps = (operand(node, i) for i in range(1, 5))
    require(same_constant(axes, [3]) and same_constant(steps, [1]), f"{node.name} does not slice the head axis")
    return int(array(starts).item()), int(array(ends).item())


def _table(value: ir.Value, half: int) -> ir.Value:
    """The [max_length, D/2] initialiser behind unsqueeze(concat(table[:S], table[:S]))."""
    while (made := value.producer()) is not None and made.op_type == "Unsqueeze":
        value = operand(made, 0)
    twice = producer(value, "Concat")
    require(len(twice.inputs) == 2 and twice.inputs[0] is twice.inputs[1], "the table's halves are not the same")
    part = producer(twice.inputs[0], "Slice")
    table, starts, axes, steps = (operand(part, i) for i in (0, 1, 3, 4))
    from_zero = same_constant(starts, [0]) and same_constant(axes, [0]) and same_constant(steps, [1])
    require(from_zero, "positions do not start at 0")
    contents = array(table)
    if contents.ndim != 2 or contents.shape[1] != half:
        raise Mismatch(f"the table {table.name!r} is {list(contents.shape)}, not [max_length, {half}]")
    return table


ROPE = FusionPass(name="rope", anchor="Neg", rewrite=_rewrite)

"""Matches the distances of tokens, from which the masks of local attention and the biases of ALiBi are computed."""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import Mismatch, array, dimensions, operand, producer, require


def require_distances(value: ir.Value | None) -> ir.Node:
    """Match |i - j| for all pairs of places in a text, [S, S], or raise Mismatch; return the Range of places."""
    difference = producer(producer(value, "Abs").inputs[0], "Sub")
    rows, columns = (producer(each, "Unsqueeze") for each in difference.inputs)
    require(rows.inputs[0] is columns.inputs[0], "the distances are not between places of the same text")
    axes = {int(array(each.inputs[1]).item()) for each in (rows, columns)}
    require(axes == {0, 1}, f"the places are not rows and columns, but on the axes {sorted(axes)}")
    places = producer(rows.inputs[0], "Range")
    require(array(places.inputs[0]).item() == 0, f"the places of {places.name} do not begin at 0")
    require(array(places.inputs[2]).item() == 1, f"the places of {places.name} are not 1 apart")
    return places


def split_padding(bias: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of the two terms of an additive mask, return that of padding, [B, 1, 1, S], and the other; or raise Mismatch."""
    require(bias.producer() is not None, f"the mask {bias.name!r} is not computed from distances")
    total = producer(bias, "Add")
    first, second = operand(total, 0), operand(total, 1)
    for padding, other in ((first, second), (second, first)):
        if padding.shape is not None and len(padding.shape) == 4 and dimensions(padding)[1:3] == (1, 1):
            return padding, other
    raise Mismatch(f"neither term of {bias.name!r} has the shape [batch, 1, 1, sequence]")

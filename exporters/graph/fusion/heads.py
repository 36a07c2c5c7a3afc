"""Matches the split of a projection into heads, which is part of the patterns of RoPE and of attention."""

from dataclasses import dataclass

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import array, operand, producer, require

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Heads:
    """The split transpose(reshape(projection, [B, S, N, D])) -> [B, N, S, D].

    Args:
        projection: the input, [B, S, N*D].
        view: the Reshape to [B, S, N, D].
        count: the number of heads, N.
        size: the size of a head, D.
    """

    projection: ir.Value
    view: ir.Node
    count: int
    size: int


def require_heads(value: ir.Value | None) -> Heads:
    """Match the split that computes `value`, or raise Mismatch."""
    transpose = producer(value, "Transpose")
    require_permutation(transpose, HEADS_FIRST)
    view = producer(transpose.inputs[0], "Reshape")
    target = array(view.inputs[1]).tolist()
    require(
        len(target) == 4 and target[:2] == [0, 0] and min(target[2:]) > 0,
        f"{view.name} reshapes to {target}, not to [0, 0, heads, head size]",
    )
    return Heads(projection=operand(view, 0), view=view, count=target[2], size=target[3])


def require_permutation(node: ir.Node, expected: tuple[int, ...]) -> None:
    """Raise Mismatch unless the Transpose has the permutation `expected`."""
    found = tuple(node.attributes.get_ints("perm", ()))
    require(found == expected, f"{node.name} permutes {found}, not {expected}")

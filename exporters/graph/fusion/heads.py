"""The split of a projection into heads, which RoPE and attention both match."""

from dataclasses import dataclass

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import array, operand, producer, require

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Heads:
    """transpose(reshape(projection, [B, S, N, D])) -> [B, N, S, D].

    Args:
        projection: [B, S, N*D].
        view: the Reshape; its output is [B, S, N, D].
        count: N.
        size: D.
    """

    projection: ir.Value
    view: ir.Node
    count: int
    size: int


def require_heads(value: ir.Value | None) -> Heads:
    """The split that made `value`, or Mismatch."""
    turn = producer(value, "Transpose")
    require_permutation(turn, HEADS_FIRST)
    view = producer(turn.inputs[0], "Reshape")
    target = array(view.inputs[1]).tolist()
    require(
        len(target) == 4 and target[:2] == [0, 0] and min(target[2:]) > 0,
        f"{view.name} reshapes to {target}, not to [0, 0, heads, head size]",
    )
    return Heads(projection=operand(view, 0), view=view, count=target[2], size=target[3])


def require_permutation(node: ir.Node, expected: tuple[int, ...]) -> None:
    """Mismatch unless the Transpose permutes so."""
    found = tuple(node.attributes.get_ints("perm", ()))
    require(found == expected, f"{node.name} permutes {found}, not {expected}")

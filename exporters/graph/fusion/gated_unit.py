"""Matches the gated unit f(gate) * up of an MLP, where f is GELU (GeGLU) or SiLU (SwiGLU): x * sigmoid(x)."""

from dataclasses import dataclass

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import consumer, operand, other_operand, require

FUNCTIONS = ("Gelu", "Sigmoid")
"""The operators that every gated unit has exactly one of."""


@dataclass(frozen=True)
class GateMatch:
    """A match of f(gate) * up.

    Args:
        gate: the input of f.
        up: the other factor.
        product: the Mul of f(gate) and `up`.
    """

    gate: ir.Value
    up: ir.Value
    product: ir.Node


def require_gated_unit(function: ir.Node) -> GateMatch:
    """Match the gated unit around an operator of `FUNCTIONS`, or raise Mismatch."""
    gate, activated = operand(function, 0), function.outputs[0]
    if function.op_type == "Sigmoid":
        silu = consumer(activated, "Mul")
        gate, activated = other_operand(silu, activated), silu.outputs[0]
        require(gate is operand(function, 0), f"{silu.name} does not multiply {function.name} by its own input")
    product = consumer(activated, "Mul")
    return GateMatch(gate, other_operand(product, activated), product)

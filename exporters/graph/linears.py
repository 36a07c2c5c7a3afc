"""The linear layers of a traced or fused graph: what quantization works on."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import array, operand

# Dense modules after the pooling: one row for a text, so that fewer bits would gain nothing there.
_PROJECTION = "sentence_projection."


@dataclass(frozen=True)
class Linear:
    """One product with a constant matrix.

    Args:
        name: of the weight, as the checkpoint has it; the same in every graph of the model.
        node: the MatMul or Gemm.
        x: its input, [..., in].
        weight: the initialiser, [in, out], or [out, in] where `transposed`.
        bias: [out], of a Gemm.
        transposed: whether `weight` is turned in the product.
    """

    name: str
    node: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    transposed: bool

    def matrix(self) -> np.ndarray:
        """The weight as [in, out] float32."""
        contents = array(self.weight)
        return contents.T if self.transposed else contents


def find_linear_layers(model: ir.Model) -> list[Linear]:
    """Every linear layer, in graph order."""
    return [linear for node in model.graph if (linear := linear_of(node)) is not None]


def linear_of(node: ir.Node | None) -> Linear | None:
    """The linear layer that `node` is, or None."""
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.domain:
        return None
    weight = operand(node, 1)
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    if str(weight.name).startswith(_PROJECTION):
        return None
    return Linear(
        name=str(weight.name).removesuffix(".T"),
        node=node,
        x=operand(node, 0),
        weight=weight,
        bias=node.inputs[2] if len(node.inputs) > 2 else None,
        transposed=bool(node.attributes.get_int("transB", 0)),
    )

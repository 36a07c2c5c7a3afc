"""Finds the linear layers of a traced or fused graph, for quantization."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import array, operand

# The Dense modules after pooling see one row per text, so quantizing them would gain nothing. Those of a multi-vector
# model are small beside a layer of the encoder, and their rounding would reach every score.
_DENSE_MODULES = ("sentence_projection.", "token_projection.")


@dataclass(frozen=True)
class LinearLayer:
    """A MatMul or Gemm with a constant matrix.

    Args:
        name: the name of the weight in the checkpoint; the same in every graph of the model.
        node: the MatMul or Gemm.
        x: the input, [..., in].
        weight: the initialiser, [in, out], or [out, in] where `transposed`.
        bias: the bias of a Gemm, [out]; None for a MatMul.
        transposed: whether the Gemm transposes `weight`.
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


def find_linear_layers(model: ir.Model) -> list[LinearLayer]:
    """All linear layers, in the order of the graph."""
    return [layer for node in model.graph if (layer := linear_layer_of(node)) is not None]


def linear_layer_of(node: ir.Node | None) -> LinearLayer | None:
    """The linear layer that consists of `node`; None for another node and for Dense modules."""
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.domain:
        return None
    weight = operand(node, 1)
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    if str(weight.name).startswith(_DENSE_MODULES):
        return None
    return LinearLayer(
        name=str(weight.name).removesuffix(".T"),
        node=node,
        x=operand(node, 0),
        weight=weight,
        bias=node.inputs[2] if len(node.inputs) > 2 else None,
        transposed=bool(node.attributes.get_int("transB", 0)),
    )


def is_quantized(node: ir.Node) -> bool:
    """Whether `node` is a MatMul with a dequantized weight: a GEMM of 8-bit values in TensorRT and OpenVINO."""
    weight = operand(node, 1).producer() if node.op_type == "MatMul" else None
    return weight is not None and weight.op_type == "DequantizeLinear" and operand(weight, 0).is_initializer()

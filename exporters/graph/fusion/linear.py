"""Linear layers x·W (+ b), matched and packed side by side into one GEMM."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    array,
    initializer,
    operand,
    producer,
    require,
    scope_of,
    split_operands,
    tensor_of,
)


@dataclass(frozen=True)
class Linear:
    """x [B, S, in] · weight [in, out] (+ bias [out]), in the module `scope`."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    out: int
    scope: str


def require_linear(value: ir.Value, *, bias: bool) -> Linear:
    """The linear layer that made `value`, or Mismatch."""
    offset: ir.Value | None = None
    if bias:
        product, offset = split_operands(producer(value, "Add"), "MatMul")
    else:
        product = producer(value, "MatMul")
    x, weight = operand(product, 0), operand(product, 1)
    shape = array(weight).shape
    require(len(shape) == 2, f"the weight of {product.name} is not a matrix")
    require(offset is None or array(offset).shape == shape[1:], f"the bias of {product.name} is not [{shape[1]}]")
    return Linear(x=x, weight=weight, bias=offset, out=shape[1], scope=scope_of(product))


def pack(graph: ir.Graph, name: str, values: Sequence[ir.Value | None]) -> ir.Value:
    """One initialiser that holds `values` side by side (last axis); it is assembled only when it is read."""
    tensors = [tensor_of(value) for value in values]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = ir.Shape((*shapes[0][:-1], sum(each[-1] for each in shapes)))

    def assemble() -> ir.Tensor:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), name=name)

    return initializer(graph, name, ir.LazyTensor(assemble, dtype=tensors[0].dtype, shape=shape, name=name))

"""Matches linear layers x·W (+ b) of the trace, and concatenates their weights for a merged GEMM."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
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
class LinearMatch:
    """A match of x [B, S, in] · weight [in, out] (+ bias [out]), in the module `scope`."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    out: int
    scope: str


def require_linear(value: ir.Value) -> LinearMatch:
    """The linear layer that computes `value`: MatMul, or MatMul and Add for one with a bias.

    Raises:
        Mismatch: something else computes `value`.
    """
    offset: ir.Value | None = None
    source = value.producer()
    if source is not None and source.op_type == "Add":
        product, offset = split_operands(source, "MatMul")
    else:
        product = producer(value, "MatMul")
    x, weight = operand(product, 0), operand(product, 1)
    shape = array(weight).shape
    require(len(shape) == 2, f"the weight of {product.name} is not a matrix")
    require(offset is None or array(offset).shape == shape[1:], f"the bias of {product.name} is not [{shape[1]}]")
    return LinearMatch(x=x, weight=weight, bias=offset, out=shape[1], scope=scope_of(product))


def require_shared_input(query: ir.Value, key: ir.Value, value: ir.Value) -> list[LinearMatch]:
    """The linear layers that compute queries, keys and values from the same input, all with a bias or all without.

    Raises:
        Mismatch: something else computes them.
    """
    linears = [require_linear(each) for each in (query, key, value)]
    require(len({linear.x for linear in linears}) == 1, "queries, keys and values do not have the same input")
    require(len({linear.bias is None for linear in linears}) == 1, "some of queries, keys and values have a bias")
    return linears


def project_rows(build: Builder, rows: ir.Value, weight: ir.Value, bias: ir.Value | None, *, out: int) -> ir.Value:
    """A linear layer [in, out] of token rows [B*S, in]: a Gemm, or a MatMul where it has no bias."""
    inputs = (rows, weight) if bias is None else (rows, weight, bias)
    return build.op("MatMul" if bias is None else "Gemm", *inputs, shape=("tokens", out))


def concatenate_biases(graph: ir.Graph, name: str, linears: Sequence[LinearMatch]) -> ir.Value | None:
    """Add one initialiser with the biases of linear layers that all have one; None where they have none."""
    biases = [linear.bias for linear in linears]
    return concatenate_weights(graph, name, biases) if all(bias is not None for bias in biases) else None


def concatenate_weights(graph: ir.Graph, name: str, values: Sequence[ir.Value | None]) -> ir.Value:
    """Add one initialiser with the weights or biases `values` side by side on the last axis.

    The contents are concatenated only when they are read.
    """
    tensors = [tensor_of(value) for value in values]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = ir.Shape((*shapes[0][:-1], sum(each[-1] for each in shapes)))

    def concatenate() -> ir.Tensor:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), name=name)

    return initializer(graph, name, ir.LazyTensor(concatenate, dtype=tensors[0].dtype, shape=shape, name=name))

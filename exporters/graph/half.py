"""An FP32 graph -> the same with FP16 or BF16 weights and activations; inputs and outputs keep their types.

Everything from the word embedding on is made half: tables, weights and what they touch. What never met them (masks,
positions) stays as it is, and so does mean pooling: a sum of thousands of tokens is FP32. The rotation tables are FP32
values that are rounded once, never angles in half precision. LayerNormalization, Gemm and attention keep their sums in
FP32 inside their kernels.
"""

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.editing import initializer, tensor_of

HALVES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_POOLED = "sentence_embedding"


def lower_to_half(model: ir.Model, dtype: ir.DataType) -> int:
    """Rewrite the graph in place; how many initialisers are half now.

    Raises:
        ExportError: when the weights are written, if one is beyond the range of `dtype`.
    """
    graph = model.graph
    halves: dict[ir.Value, ir.Value] = {}
    is_pooled = any(value.name == _POOLED for value in graph.outputs)

    def as_half(value: ir.Value) -> ir.Value:
        if value not in halves:
            halves[value] = (
                initializer(graph, f"{value.name}.half", _rounded_when_read(tensor_of(value), dtype))
                if value.is_initializer()
                else add_cast(graph, value, dtype)
            )
        return halves[value]

    for node in list(graph):
        if not _is_half(node, dtype):
            continue
        if node.op_type == "Gelu":
            node.domain = ""  # on CUDA the standard operator has a kernel for every type; com.microsoft's lacks BF16
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, as_half(value))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(dtype)  # not value.dtype: copies of a graph share the type
                if value.is_graph_output():
                    _give_out(graph, value, all_users=is_pooled)
    ir_passes.TopologicalSortPass()(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    return sum(value.dtype == dtype for value in graph.initializers.values())


def add_cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """`value` as `dtype`; the node is appended, for a later topological sort."""
    name = f"{value.name}/{dtype.name.lower()}"
    node = ir.node("Cast", [value], {"to": dtype}, name=name)
    graph.append(node)
    (cast,) = node.outputs
    cast.name, cast.dtype, cast.shape = name, dtype, value.shape
    return cast


def _is_half(node: ir.Node, dtype: ir.DataType) -> bool:
    if node.op_type in ("Cast", "Shape"):
        return False
    if any(value is not None and value.dtype == dtype for value in node.inputs):
        return True
    table = node.inputs[0] if node.op_type == "Gather" else None
    return table is not None and table.is_initializer() and table.dtype == ir.DataType.FLOAT


def _give_out(graph: ir.Graph, value: ir.Value, *, all_users: bool) -> None:
    """Let an output be FP32 again under its own name; and what else reads it, where it is pooled."""
    users = list(value.uses())
    wide = add_cast(graph, value, ir.DataType.FLOAT)
    value.name, wide.name = f"{value.name}/half", value.name
    graph.outputs[graph.outputs.index(value)] = wide
    for user, index in users if all_users else ():
        user.replace_input_with(index, wide)


def _rounded_when_read(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
    read = functools.partial(_rounded, tensor, dtype)
    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _rounded(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Tensor:
    with np.errstate(over="ignore"):
        contents = tensor.numpy().astype(dtype.numpy())
    if not np.isfinite(contents).all():
        raise ExportError(
            f"{tensor.name} has values that {dtype.name} cannot hold; export with precision bf16 or fp32."
        )
    return ir.Tensor(contents, dtype=dtype, name=tensor.name)

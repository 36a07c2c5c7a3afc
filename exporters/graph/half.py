"""Converts an FP32 graph to FP16 or BF16 weights and activations; its inputs and outputs keep their types.

The embedding tables and all nodes that depend on them are in half precision, with half-precision weights. Nodes that do
not depend on the embeddings (masks, positions) keep their types. Mean pooling stays in FP32, because it sums thousands
of tokens. The rotation tables are FP32 values that are rounded once; no angle is computed in half precision.
LayerNormalization, Gemm and attention accumulate in FP32 inside their kernels.
"""

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.editing import initializer, tensor_of

HALVES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_EMBEDDING = "sentence_embedding"


def lower_to_half(model: ir.Model, dtype: ir.DataType) -> int:
    """Rewrite the graph in place; return the number of initialisers in half precision.

    Raises:
        ExportError: a weight is outside the range of `dtype`. The error comes only when the weights are written.
    """
    graph = model.graph
    halves: dict[ir.Value, ir.Value] = {}
    is_pooled = any(value.name == _EMBEDDING for value in graph.outputs)

    def as_half(value: ir.Value) -> ir.Value:
        if value not in halves:
            halves[value] = (
                initializer(graph, f"{value.name}.half", rounded_when_read(value, dtype))
                if value.is_initializer()
                else add_cast(graph, value, dtype)
            )
        return halves[value]

    for node in list(graph):
        if not _is_half(node, dtype):
            continue
        if node.op_type == "Gelu":
            node.domain = ""  # on CUDA the standard operator has a kernel for each type; com.microsoft's lacks BF16
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, as_half(value))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(dtype)  # not value.dtype: copies of a graph share the type object
                if value.is_graph_output():
                    _output_in_fp32(graph, value, for_all_users=is_pooled)
    ir_passes.TopologicalSortPass()(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    return sum(value.dtype == dtype for value in graph.initializers.values())


def add_cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Add a Cast of `value` to `dtype`. The node is appended, so the graph needs a topological sort afterwards."""
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


def _output_in_fp32(graph: ir.Graph, value: ir.Value, *, for_all_users: bool) -> None:
    """Replace the graph output `value` by its Cast to FP32, which gets the name of the output.

    With `for_all_users` the nodes that read `value` read the FP32 value too. Pooling then sums in FP32.
    """
    users = list(value.uses())
    fp32 = add_cast(graph, value, ir.DataType.FLOAT)
    value.name, fp32.name = f"{value.name}/half", value.name
    graph.outputs[graph.outputs.index(value)] = fp32
    for user, index in users if for_all_users else ():
        user.replace_input_with(index, fp32)


def rounded_when_read(value: ir.Value, dtype: ir.DataType) -> ir.LazyTensor:
    """Return the tensor of the initialiser `value` in another data type, converted when it is read.

    Raises:
        ExportError: a number is outside the range of `dtype`. The error comes only when the tensor is read.
    """
    tensor, name = tensor_of(value), str(value.name)
    read = functools.partial(_rounded, tensor, dtype, name)
    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _rounded(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.Tensor:
    with np.errstate(over="ignore"):
        contents = tensor.numpy().astype(dtype.numpy())
    if not np.isfinite(contents).all():
        raise ExportError(f"{name} has values that {dtype.name} cannot hold; export with precision bf16 or fp32.")
    return ir.Tensor(contents, dtype=dtype, name=name)

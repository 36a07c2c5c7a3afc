"""Rewrites the encoder's graph for Triton's dynamic batcher: every input and output has one row for each text.

The fill-mask graph of a bundle takes (row, token) pairs, which Triton cannot join over requests. The new graph takes
the masked tokens of each row and computes the pairs itself. It also has both poolings as outputs. Weights are not read.

Shapes: B rows, S tokens, M masks of the row with the most, H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from gte_deploy.core.errors import ExportError
from gte_deploy.core.spec import POOLINGS, ModelSpec, TensorSpec

_PREFIX = "triton/"


def write_graph(source: Path, target: Path, spec: ModelSpec) -> None:
    """Write the batchable form of the graph at `source`; both graphs use external data of the same name.

    Inputs, int64: `input_ids`, `attention_mask` and, if the source takes them, `token_type_ids` [B, S]; for fill-mask
    `mask_positions` [B, M], the masked tokens of each row.
    Outputs, float32: `last_hidden_state` [B, S, H], `embedding_mean` and `embedding_cls` [B, H]; `logits` if the task
    has them, [B, M, V] for fill-mask.

    Raises:
        ExportError: the graph computes the fill-mask logits of every token.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    if spec.task == "fill-mask":
        if "mask_positions" not in {value.name for value in graph.input}:
            raise ExportError(
                f"{source} computes the logits of every token, which no server should send. Export the checkpoint with "
                "--logits masked."
            )
        _take_masks_by_row(graph, spec)
    _pool_both_ways(graph, spec)
    onnx.save(model, target)


def _take_masks_by_row(graph: onnx.GraphProto, spec: ModelSpec) -> None:
    for node in graph.node:
        node.input[:] = [_PREFIX + "pairs" if name == "mask_positions" else name for name in node.input]
        node.output[:] = [_PREFIX + "flat_logits" if name == "logits" else name for name in node.output]
    before = [
        _node("Shape", ["mask_positions"], "shape"),
        _node("Gather", ["triton/shape", _integers(graph, "zero", 0)], "num_rows"),
        _node("Range", ["triton/zero", "triton/num_rows", _integers(graph, "one", 1)], "row_numbers"),
        _node("Unsqueeze", ["triton/row_numbers", _integers(graph, "axis_1", [1])], "row_column"),
        _node("Expand", ["triton/row_column", "triton/shape"], "rows"),
        _node("Unsqueeze", ["triton/rows", _integers(graph, "axis_2", [2])], "row_of_pair"),
        _node("Unsqueeze", ["mask_positions", "triton/axis_2"], "token_of_pair"),
        _node("Concat", ["triton/row_of_pair", "triton/token_of_pair"], "pairs_by_row", axis=2),
        _node("Reshape", ["triton/pairs_by_row", _integers(graph, "pairs_shape", [-1, 2])], "pairs"),
    ]
    after = [
        _node("Concat", ["triton/shape", _integers(graph, "vocabulary", [spec.vocab_size])], "logits_shape", axis=0),
        helper.make_node("Reshape", ["triton/flat_logits", "triton/logits_shape"], ["logits"], "triton/logits"),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    _replace(graph.input, _value("mask_positions", TensorProto.INT64, ["batch", "masks"]))
    _replace(graph.output, _value("logits", TensorProto.FLOAT, ["batch", "masks", spec.vocab_size]))


def _pool_both_ways(graph: onnx.GraphProto, spec: ModelSpec) -> None:
    own = "sentence_embedding" in {value.name for value in graph.output}
    for pooling in POOLINGS if spec.embedding_size is None else (spec.pooling,):
        name = f"embedding_{pooling}"
        if own and pooling == spec.pooling:
            graph.node.append(helper.make_node("Identity", ["sentence_embedding"], [name], _PREFIX + name))
        elif pooling == "cls":
            first = _integers(graph, "first", 0)
            graph.node.append(helper.make_node("Gather", ["last_hidden_state", first], [name], _PREFIX + name, axis=1))
        else:
            graph.node.extend(_mean(graph, name))
        graph.output.append(_value(name, TensorProto.FLOAT, ["batch", spec.embedding_width]))
    if own:
        graph.output.remove(next(value for value in graph.output if value.name == "sentence_embedding"))


def _mean(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """The mean of `gte_deploy.tasks.pooling.pool` as [B, 1, S] times [B, S, H] / tokens.

    It is computed in float64, because a float32 sum of 8,192 values loses digits.
    """
    axis = _integers(graph, "mean_axis", [1])
    graph.initializer.append(helper.make_tensor("triton/at_least_one", TensorProto.DOUBLE, [], [1.0]))
    return [
        _node("Cast", ["attention_mask"], "mask", to=TensorProto.DOUBLE),
        _node("Cast", ["last_hidden_state"], "states", to=TensorProto.DOUBLE),
        _node("Unsqueeze", ["triton/mask", axis], "weights"),
        _node("MatMul", ["triton/weights", "triton/states"], "sum_of_row"),
        _node("Squeeze", ["triton/sum_of_row", axis], "sum"),
        _node("ReduceSum", ["triton/mask", axis], "count_or_zero", keepdims=1),
        _node("Max", ["triton/count_or_zero", "triton/at_least_one"], "count"),
        _node("Div", ["triton/sum", "triton/count"], "mean"),
        helper.make_node("Cast", ["triton/mean"], [name], _PREFIX + name, to=TensorProto.FLOAT),
    ]


def _node(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [_PREFIX + output], _PREFIX + output, **attributes)


def _integers(graph: onnx.GraphProto, name: str, value: int | list[int]) -> str:
    """Add a constant: a scalar or a vector."""
    shape, values = ([], [value]) if isinstance(value, int) else ([len(value)], value)
    graph.initializer.append(helper.make_tensor(_PREFIX + name, TensorProto.INT64, shape, values))
    return _PREFIX + name


def _value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _replace(values: Iterable[onnx.ValueInfoProto], new: onnx.ValueInfoProto) -> None:
    next(value for value in values if value.name == new.name).CopyFrom(new)


def tensor_specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of an ONNX file, in order; weights are not read."""
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    return (
        tuple(_spec(value) for value in graph.input if value.name not in stored),
        tuple(_spec(value) for value in graph.output),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)

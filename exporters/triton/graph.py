"""Rewrites the encoder's graph for Triton's dynamic batcher: every input and output has one row for each text.

The fill-mask graph of a bundle takes (row, token) pairs, which Triton cannot join over requests. The new graph takes
the masked tokens of each row and computes the pairs itself. It also has both poolings and the finished embedding as
outputs. Weights are not read.

Clients may send token ids. One wrong id must not fail the other requests of its batch, so ids, types and positions are
clipped to what the model has, and a row with an id outside the vocabulary gets NaN.

Shapes: B rows, S tokens, M masks of the row with the most, H hidden size, D embedding size, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from gte_deploy.core.errors import ExportError
from gte_deploy.core.spec import POOLINGS, ModelSpec, TensorSpec
from gte_deploy.tasks.base import HIDDEN
from gte_deploy.tasks.multi_vector import TOKEN_VECTORS
from gte_deploy.tasks.pooling import NORM_EPSILON
from gte_deploy.tasks.sparse import TOKEN_WEIGHTS

_PREFIX = "triton/"


def write_graph(source: Path, target: Path, spec: ModelSpec) -> None:
    """Write the batchable form of the graph at `source`; both graphs use external data of the same name.

    Inputs, int64: `input_ids`, `attention_mask` and, if the source takes them, `token_type_ids` [B, S]; for fill-mask
    `mask_positions` [B, M], the masked tokens of each row.
    Outputs, float32: `last_hidden_state` [B, S, H]; `embedding_mean` and `embedding_cls` [B, H]; `embedding_finished`
    [B, D], as `Model.encode` returns it without options; `embedding_normalized` [B, D], the same scaled to length 1;
    `logits` if the task has them, [B, M, V] for fill-mask; `token_weights` [B, S, 1] for hybrid. Rows with an id
    outside the vocabulary are NaN in all except `last_hidden_state` and the logits of fill-mask. A multi-vector graph
    has only `token_vectors` [B, S, D].

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
    if spec.task == "multi-vector":
        graph.output.remove(next(value for value in graph.output if value.name == HIDDEN))
        _bound_inputs(graph, spec)
    else:
        _pool_both_ways(graph, spec)
        _bound_inputs(graph, spec)
        _finish(graph, spec)
    onnx.save(model, target)


def _take_masks_by_row(graph: onnx.GraphProto, spec: ModelSpec) -> None:
    for node in graph.node:
        node.input[:] = [_PREFIX + "pairs" if name == "mask_positions" else name for name in node.input]
        node.output[:] = [_PREFIX + "flat_logits" if name == "logits" else name for name in node.output]
    before = [
        _node("Shape", ["input_ids"], "text_shape"),
        _node("Gather", ["triton/text_shape", _integers(graph, "second", 1)], "num_tokens"),
        _node("Sub", ["triton/num_tokens", _integers(graph, "unit", 1)], "last_token"),
        _node("Min", ["mask_positions", "triton/last_token"], "not_behind_the_text"),
        _node("Max", ["triton/not_behind_the_text", _integers(graph, "first_token", 0)], "positions"),
        _node("Shape", ["mask_positions"], "shape"),
        _node("Gather", ["triton/shape", _integers(graph, "zero", 0)], "num_rows"),
        _node("Range", ["triton/zero", "triton/num_rows", _integers(graph, "one", 1)], "row_numbers"),
        _node("Unsqueeze", ["triton/row_numbers", _integers(graph, "axis_1", [1])], "row_column"),
        _node("Expand", ["triton/row_column", "triton/shape"], "rows"),
        _node("Unsqueeze", ["triton/rows", _integers(graph, "axis_2", [2])], "row_of_pair"),
        _node("Unsqueeze", ["triton/positions", "triton/axis_2"], "token_of_pair"),
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


def _finish(graph: onnx.GraphProto, spec: ModelSpec) -> None:
    """Add the embedding that `EmbeddingRequest.finished` gives, as it is and scaled to length 1."""
    name = f"embedding_{spec.pooling}"
    if spec.normalize:
        graph.node.extend(_normalize(graph, name, _PREFIX + "own_norm"))
        name = _PREFIX + "own_norm"
    width = spec.embedding_width
    if spec.truncate_dim is not None and spec.truncate_dim < width:
        width = spec.truncate_dim
        ends = [_integers(graph, "first_dim", [0]), _integers(graph, "kept_dims", [width])]
        graph.node.append(_node("Slice", [name, *ends, _integers(graph, "dim_axis", [1])], "kept"))
        name = _PREFIX + "kept"
    graph.node.append(helper.make_node("Identity", [name], ["embedding_finished"], _PREFIX + "embedding_finished"))
    graph.node.extend(_normalize(graph, "embedding_finished", "embedding_normalized"))
    for output in ("embedding_finished", "embedding_normalized"):
        graph.output.append(_value(output, TensorProto.FLOAT, ["batch", width]))


def _normalize(graph: onnx.GraphProto, source: str, target: str) -> list[onnx.NodeProto]:
    """The nodes of `gte_deploy.tasks.pooling.l2_normalize` of rows [B, D]."""
    part = f"{target.removeprefix(_PREFIX)}_"
    graph.initializer.append(helper.make_tensor(_PREFIX + part + "least", TensorProto.FLOAT, [], [NORM_EPSILON]))
    return [
        _node("Mul", [source, source], part + "squares"),
        _node("ReduceSum", [_PREFIX + part + "squares", _integers(graph, part + "axis", [1])], part + "square"),
        _node("Sqrt", [_PREFIX + part + "square"], part + "length"),
        _node("Max", [_PREFIX + part + "length", _PREFIX + part + "least"], part + "divisor"),
        helper.make_node("Div", [source, _PREFIX + part + "divisor"], [target], target.removeprefix(_PREFIX)),
    ]


def _bound_inputs(graph: onnx.GraphProto, spec: ModelSpec) -> None:
    """Clip the integer inputs to what the model has, and give NaN to the rows with an id outside the vocabulary."""
    limits = {"input_ids": spec.vocab_size, "token_type_ids": spec.type_vocab_size}
    given = {value.name for value in graph.input}
    zero = _integers(graph, "least_id", 0)
    before: list[onnx.NodeProto] = []
    for name, size in limits.items():
        if name in given:
            for node in graph.node:
                node.input[:] = [_PREFIX + name if each == name else each for each in node.input]
            most = _integers(graph, f"most_{name}", size - 1)
            before.append(helper.make_node("Clip", [name, zero, most], [_PREFIX + name], f"{_PREFIX}clip_{name}"))
    before += [
        _node("Equal", ["input_ids", _PREFIX + "input_ids"], "id_is_known"),
        _node("Not", [_PREFIX + "id_is_known"], "id_is_wrong"),
        _node("Cast", [_PREFIX + "id_is_wrong"], "wrong_ids", to=TensorProto.FLOAT),
        _node("ReduceSum", [_PREFIX + "wrong_ids", _integers(graph, "id_axis", [1])], "wrong_in_row", keepdims=1),
        _node("Cast", [_PREFIX + "wrong_in_row"], "row_is_wrong", to=TensorProto.BOOL),
        _node("Unsqueeze", [_PREFIX + "row_is_wrong", _integers(graph, "token_axis", [2])], "row_of_tokens_is_wrong"),
    ]
    graph.initializer.append(helper.make_tensor(_PREFIX + "nan", TensorProto.FLOAT, [], [math.nan]))
    checked = {"embedding_mean", "embedding_cls", "sparse_embedding", TOKEN_WEIGHTS, TOKEN_VECTORS} | (
        {"logits"} - _unchecked(spec)
    )
    after: list[onnx.NodeProto] = []
    for output in graph.output:
        if output.name in checked:
            for node in graph.node:
                node.output[:] = [f"{_PREFIX}{name}" if name == output.name else name for name in node.output]
            wrong = "row_is_wrong" if len(output.type.tensor_type.shape.dim) == 2 else "row_of_tokens_is_wrong"
            inputs = [_PREFIX + wrong, _PREFIX + "nan", _PREFIX + output.name]
            after.append(helper.make_node("Where", inputs, [output.name], f"{_PREFIX}check_{output.name}"))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _unchecked(spec: ModelSpec) -> set[str]:
    """The logits of masks stay as they are: gte_fill_mask_output, which has the ids, refuses wrong ones."""
    return {"logits"} if spec.task == "fill-mask" else set()


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

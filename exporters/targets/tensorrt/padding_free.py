"""Rewrites a plain FP32 graph on padded texts [B, S] to the tokens of all texts [T], one after another (packed).

All operations except attention work on each token separately. Attention becomes an operator of TensorRT, TRT_Attention,
in its packed form. Ordinary TensorRT has kernels for it from 11.1 on:
https://github.com/onnx/onnx-tensorrt/blob/main/docs (TensorRT Custom Operator Schemas)
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html

Inputs, in place of [batch, sequence] and its mask:

* `input_ids` [tokens] int64; `position_ids` [tokens] int64, the position of each token in its own text;
  `token_type_ids` [tokens] int64 if the model takes them;
* `query_lengths` and `kv_lengths` [batch + 1] int32, the beginning of each text and the end of the last: 0, n0,
  n0 + n1, … Both have the same values. They are two tensors because TensorRT was reported to crash if one tensor feeds
  both inputs of the operator;
* `mask_positions` [num_masks] int64 (fill-mask), indices of tokens among all T.

Outputs by token are [tokens, …] instead of [batch, sequence, …]. The others stay unchanged. The runtime packs and
unpacks (`gte_deploy.backends.tensorrt.padding_free`), so no shape in the graph depends on data.

Shapes: B texts, T tokens of all texts, N heads, D head size, H hidden size.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from gte_deploy.backends.tensorrt.variants import KV_LENGTHS, POSITIONS, QUERY_LENGTHS
from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    Mismatch,
    array,
    by_name,
    constant,
    consumer,
    dimensions,
    integers,
    operand,
    producer,
    replace,
    require,
    same_constant,
    scope_of,
)
from gte_deploy.exporters.graph.fusion import fuse_graph
from gte_deploy.exporters.graph.fusion.padding import rewriting
from gte_deploy.exporters.graph.fusion.rows import FIRST_INPUT
from gte_deploy.exporters.targets.base import PADDING_FREE_PASS
from gte_deploy.exporters.targets.tensorrt.qkv import joined_projection, require_projections, split_heads

TRT_DOMAIN = "trt"
TRT_ATTENTION = "TRT_Attention"

_MASK, _TOKEN_TYPES, _MASK_POSITIONS, _HIDDEN, _EMBEDDING, _LOGITS = (
    "attention_mask",
    "token_type_ids",
    "mask_positions",
    "last_hidden_state",
    "sentence_embedding",
    "logits",
)
_TOKENS, _BATCH_AND_ONE = "tokens", "batch_and_one"
_INT64, _INT32 = ir.DataType.INT64, ir.DataType.INT32
# The end of a Slice that goes to the end of its axis.
_TO_END = (1 << 31) - 1


def make_padding_free(model: ir.Model, *, sites: Mapping[str, int]) -> dict[str, int]:
    """Rewrite a plain graph in place; return pass -> number of matches.

    `sites` is the argument of `fuse_graph`.

    Raises:
        ExportError: the graph does not have the expected form.
    """
    graph = model.graph
    _add_inputs(graph)
    counts = fuse_graph(model, sites=sites, passes=(PADDING_FREE_ATTENTION,))
    with rewriting(model):
        require(PADDING_FREE_PASS in counts, "the attention of its family has no padding-free form")
        _flatten_embedding(graph)
        _rewrite_heads(graph)
    graph.inputs.remove(by_name(graph.inputs, _MASK))
    _set_shapes(graph)
    return counts


def _add_inputs(graph: ir.Graph) -> None:
    for name, dtype, axis in (
        (POSITIONS, _INT64, _TOKENS),
        (QUERY_LENGTHS, _INT32, _BATCH_AND_ONE),
        (KV_LENGTHS, _INT32, _BATCH_AND_ONE),
    ):
        graph.inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape((axis,))))


def _rewrite_attention(graph: ir.Graph, softmax: ir.Node) -> None:
    """Replace MatMul, Softmax and MatMul on [B, N, S, …] by TRT_Attention on [T, N, D]."""
    found = require_projections(softmax)
    output, heads = found.attention.output, found.heads
    if found.rotation is None:
        raise Mismatch("queries are not rotated")
    build = Builder(graph, output, scope_of(output))
    cosine, sine = (_rows_of_tokens(build, table) for table in (found.rotation.cosines, found.rotation.sines))
    split = integers(graph, -1, 3, heads.count, heads.size)
    x = build.op("Reshape", joined_projection(build, found), split, name="parts")
    attended = build.op(
        TRT_ATTENTION,
        *split_heads(build, x, found, (cosine, sine), rank=4),  # the operator has no scale of its own
        None,  # no mask: a token attends only to its own text, and there is no padding
        by_name(graph.inputs, QUERY_LENGTHS),
        by_name(graph.inputs, KV_LENGTHS),
        domain=TRT_DOMAIN,
        query_form="packed_nhd",
        kv_form="packed_nhd",
        causal_kind="none",
        TRT_decomposable=0,
    )
    joined = build.op("Reshape", attended, integers(graph, -1, heads.count * heads.size), name="joined")
    replace(output.outputs[0], joined)


def _rows_of_tokens(build: Builder, table: ir.Value) -> ir.Value:
    """The row of a table [max_length, D/2] for each token, [T, 1, 1, D]. Every layer adds equal nodes, merged later."""
    build = build.inside(str(table.name))
    rows = build.op("Gather", table, by_name(build.graph.inputs, POSITIONS), axis=0, name="rows")
    twice = build.op("Concat", rows, rows, axis=-1, name="twice")
    return build.op("Unsqueeze", twice, integers(build.graph, 1, 2), name="of_heads")


PADDING_FREE_ATTENTION = FusionPass(name=PADDING_FREE_PASS, anchor="Softmax", rewrite=_rewrite_attention)


def _flatten_embedding(graph: ir.Graph) -> None:
    """Reshape constants that are added to every token, such as the row of token type 0, from [1, 1, H] to [H]."""
    embedding = next(use.node for use in by_name(graph.inputs, FIRST_INPUT).uses() if use.node.op_type == "Gather")
    for use in list(embedding.outputs[0].uses()):
        for i, value in enumerate(use.node.inputs):
            if value is not None and value.is_initializer() and (row := array(value)).ndim > 1:
                require(row.size == row.shape[-1], f"{value.name!r} has the shape {row.shape}, not that of one token")
                use.node.replace_input_with(i, constant(graph, f"{value.name}.row", row.reshape(-1)))


def _rewrite_heads(graph: ir.Graph) -> None:
    """Make the nodes that index hidden states by (text, position) index them by token."""
    hidden = by_name(graph.outputs, _HIDDEN)
    for node in [use.node for use in hidden.uses()]:
        build = Builder(graph, node, "texts")
        match node.op_type:
            case "GatherND":
                replace(node.outputs[0], build.op("Gather", hidden, operand(node, 1), axis=0, name="masked"))
            case "Slice":  # before a Gather of the first token of each text
                first = consumer(node.outputs[0], "Gather")
                require(first.attributes.get_int("axis", 0) == 1, f"{first.name} does not take tokens")
                require(same_constant(first.inputs[1], [0]), f"{first.name} does not take the first token")
                replace(first.outputs[0], build.op("Gather", hidden, _starts(build), axis=0, name="first"))
            case "MatMul" if node.inputs[1] is hidden:
                replace(by_name(graph.outputs, _EMBEDDING), _mean(build, hidden))
            case "MatMul":
                pass  # a head that computes each token separately
            case "Reshape":
                node.outputs[0].replace_all_uses_with(hidden)
                logits = by_name(graph.outputs, _LOGITS)
                replace(logits, operand(producer(logits, "Reshape"), 0))
            case other:
                raise Mismatch(
                    f"{node.name} reads the hidden states, but is {other}, not GatherND, Slice, MatMul or Reshape"
                )


def _starts(build: Builder) -> ir.Value:
    """[B]: the index of the first token of each text."""
    first, last, axis = (integers(build.graph, n) for n in (0, -1, 0))
    return build.op("Slice", by_name(build.graph.inputs, QUERY_LENGTHS), first, last, axis, name="starts", dtype=_INT32)


def _ends(build: Builder) -> ir.Value:
    """[B]: the index after the last token of each text."""
    first, last, axis = (integers(build.graph, n) for n in (1, _TO_END, 0))
    return build.op("Slice", by_name(build.graph.inputs, QUERY_LENGTHS), first, last, axis, name="ends", dtype=_INT32)


def _mean(build: Builder, hidden: ir.Value) -> ir.Value:
    """The mean of the tokens of each text, [B, H], in FP32: a product with a matrix [B, T] of ones and zeros."""
    graph = build.graph
    ids = by_name(graph.inputs, FIRST_INPUT)
    column, row = integers(graph, 1), integers(graph, 0)
    starts, ends = _starts(build), _ends(build)
    zero, one = (constant(graph, f"int64_scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
    size = build.op("Squeeze", build.op("Shape", ids, name="size", dtype=_INT64), row, name="count", dtype=_INT64)
    indices = build.op("Range", zero, size, one, name="numbers", dtype=_INT64)
    indices = build.op("Cast", indices, to=_INT32, name="small_numbers", dtype=_INT32)
    indices = build.op("Unsqueeze", indices, row, name="number_row", dtype=_INT32)

    def before(limits: ir.Value, name: str) -> ir.Value:
        limits = build.op("Unsqueeze", limits, column, name=f"{name}_column", dtype=_INT32)
        found = build.op("Less", indices, limits, name=f"before_{name}", dtype=ir.DataType.BOOL)
        return build.op("Cast", found, to=ir.DataType.FLOAT, name=f"is_before_{name}")

    is_inside = build.op("Sub", before(ends, "ends"), before(starts, "starts"), name="inside")
    lengths = build.op("Sub", ends, starts, name="lengths", dtype=_INT32)
    lengths = build.op("Cast", lengths, to=ir.DataType.FLOAT, name="float_lengths")
    # A text without tokens gets the zero vector, not 0/0.
    lengths = build.op("Max", lengths, constant(graph, "float_one", np.array(1, np.float32)), name="at_least_one")
    total = build.op("MatMul", is_inside, hidden, name="total")
    return build.op("Div", total, build.op("Unsqueeze", lengths, column, name="length_column"), name="mean")


def _set_shapes(graph: ir.Graph) -> None:
    """Set the shapes of the graph's inputs and outputs."""
    for value in graph.inputs:
        if value.name in (FIRST_INPUT, _TOKEN_TYPES, _MASK_POSITIONS):
            value.shape = ir.Shape((dimensions(value)[0] if value.name == _MASK_POSITIONS else _TOKENS,))
    for value in graph.outputs:
        shape = dimensions(value)
        value.shape = ir.Shape((_TOKENS, shape[-1]) if len(shape) == 3 else shape)

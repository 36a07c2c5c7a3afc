"""Padding-free attention for CUDA: the layers of a fused graph compute only the real tokens of a batch.

    hidden [B, S, H] -> RemovePadding -> layers on rows [T, H], PackedMultiHeadAttention -> RestorePadding -> [B, S, H]

ONNX Runtime has these three com.microsoft operators only on CUDA, for float32 and float16. They take the number of
tokens of each text, so padding must be on the right. RoPE gets the position of each token in its own text. After
RestorePadding, the hidden states of padding are zero.

Shapes: B texts, S tokens of a padded text, T real tokens of all texts, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    Mismatch,
    by_name,
    clean_up,
    consumer,
    dimensions,
    integers,
    operand,
    producer,
    replace,
    scope_of,
    tensor_of,
)
from gte_deploy.exporters.graph.fusion.attention import MASK_INPUT, require_mask_columns
from gte_deploy.exporters.graph.fusion.rows import FIRST_INPUT
from gte_deploy.tasks.base import HIDDEN


def remove_padding(model: ir.Model) -> int:
    """Remove padding from a graph in place, after `fuse_graph` with the pass QKV; return the number of attentions.

    Raises:
        ExportError: the graph does not have this form.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention"]
    with rewriting(model):
        packed = _insert_remove_padding(graph, attentions[0])
        for attention in attentions:
            _pack_attention(graph, attention, packed)
        _insert_restore_padding(graph, packed)
    return len(attentions)


@contextmanager
def rewriting(model: ir.Model) -> Iterator[None]:
    """Turn a Mismatch inside the context into an ExportError, or clean the graph up after the rewriting.

    Raises:
        ExportError: the graph does not have the expected form.
    """
    try:
        yield
    except Mismatch as mismatch:
        raise ExportError(
            f"padding cannot be removed from this graph: {mismatch}. "
            "Export with padding='keep', and check the versions of transformers and torch."
        ) from mismatch
    clean_up(model)


class _PackedInputs:
    """The inputs that all attentions share: `offset` [B, S] and `cumulated` [B + 1] int32, `positions` [1, T] int64."""

    def __init__(self, build: Builder, rows: ir.Value, offset: ir.Value, cumulated: ir.Value) -> None:
        self.offset, self.cumulated = offset, cumulated
        int64, int32 = {"dtype": ir.DataType.INT64}, {"dtype": ir.DataType.INT32}
        graph = build.graph
        ids = by_name(graph.inputs, FIRST_INPUT)
        flat = build.op("Reshape", offset, integers(graph, -1), name="offsets", **int32)
        count = build.op("Shape", rows, name="count", start=0, end=1, **int64)
        real = build.op("Slice", flat, integers(graph, 0), count, integers(graph, 0), name="of_tokens", **int32)
        length = build.op("Shape", ids, name="length", start=1, **int64)
        place = build.op("Mod", real, build.op("Cast", length, to=ir.DataType.INT32, **int32), name="place", **int32)
        positions = build.op("Cast", place, to=ir.DataType.INT64, name="positions", **int64)
        self.positions = build.op("Reshape", positions, integers(graph, 1, -1), name="position_ids", **int64)


def _insert_remove_padding(graph: ir.Graph, first: ir.Node) -> _PackedInputs:
    """Insert RemovePadding where the first layer reshapes the embeddings to rows."""
    projected = producer(operand(_rotary(operand(first, 0)), 0), "Reshape")
    linear = operand(producer(operand(projected, 0), "Split"), 0).producer()
    if linear is None or linear.op_type not in ("Gemm", "MatMul"):
        raise Mismatch(f"{projected.name} does not split the output of a linear layer")
    to_rows = producer(operand(linear, 0), "Reshape")

    build = Builder(graph, to_rows, "packing")
    sums = build.op(
        "ReduceSum",
        by_name(graph.inputs, MASK_INPUT),
        integers(graph, 1),
        name="sums",
        keepdims=0,
        dtype=ir.DataType.INT64,
    )
    counts = build.op("Cast", sums, to=ir.DataType.INT32, name="counts", dtype=ir.DataType.INT32)
    rows, offset, cumulated, _ = build.node(
        "RemovePadding", [operand(to_rows, 0), counts], domain=CONTRIB, outputs=4, dtype=ir.DataType.INT32
    )
    rows.dtype = ir.DataType.FLOAT
    to_rows.outputs[0].replace_all_uses_with(rows)
    return _PackedInputs(build, rows, offset, cumulated)


def _pack_attention(graph: ir.Graph, attention: ir.Node, packed: _PackedInputs) -> None:
    """Replace MultiHeadAttention with a folded mask on [B, S, …] by PackedMultiHeadAttention on rows [T, …]."""
    build = Builder(graph, attention, scope_of(attention))
    query, key = (_rotated(build, _rotary(operand(attention, i)), packed) for i in range(2))
    value = operand(producer(operand(attention, 2), "Reshape"), 0)
    attended = build.op(
        "PackedMultiHeadAttention",
        query,
        key,
        value,
        None,
        packed.offset,
        packed.cumulated,
        domain=CONTRIB,
        num_heads=attention.attributes.get_int("num_heads", 0),
        scale=attention.attributes.get_float("scale", 0.0),
    )
    replace(consumer(attention.outputs[0], "Reshape").outputs[0], attended)


def _rotated(build: Builder, rotary: ir.Node, packed: _PackedInputs) -> ir.Value:
    """RoPE on rows: all texts are one row of T tokens, whose positions begin again at 0 with every text."""
    rows = operand(producer(operand(rotary, 0), "Reshape"), 0)
    half = tensor_of(operand(rotary, 2)).shape.numpy()[1]
    width = rotary.attributes.get_int("num_heads", 0) * 2 * half
    one = build.op("Reshape", rows, integers(build.graph, 1, -1, width), name="one_text")
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in rotary.attributes.items()}
    rotated = build.op("RotaryEmbedding", one, packed.positions, *rotary.inputs[2:], domain=CONTRIB, **attributes)
    return build.op("Reshape", rotated, integers(build.graph, -1, width), name="rows")


def _insert_restore_padding(graph: ir.Graph, packed: _PackedInputs) -> None:
    """Insert RestorePadding after the last layer. Other nodes that read the layer's rows get padded rows."""
    hidden = by_name(graph.outputs, HIDDEN)
    from_rows = producer(hidden, "Reshape")
    rows = operand(from_rows, 0)
    build = Builder(graph, from_rows, "packing")
    others = [use for use in rows.uses() if use.node is not from_rows]
    restored = build.op("RestorePadding", rows, packed.offset, domain=CONTRIB, shape=hidden.shape)
    if others:
        width = dimensions(hidden)[-1]
        if not isinstance(width, int):
            raise Mismatch(f"the width of the hidden states is {width}")
        padded = build.op("Reshape", restored, integers(graph, -1, width), name="padded_rows")
        for user, index in others:
            user.replace_input_with(index, padded)
    replace(from_rows.outputs[0], restored)


def _rotary(value: ir.Value) -> ir.Node:
    with_mask = require_mask_columns(value)
    return producer(producer(with_mask.inputs[0], "Reshape").inputs[0], "RotaryEmbedding")

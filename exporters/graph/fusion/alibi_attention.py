"""Attention with ALiBi: the score of two tokens is lowered by their distance times a slope of the head.

The trace adds biases [B, N, S, S] to the scores: 3.2 GB for one text of 8,192 tokens and 12 heads, and the scores are
as large. The two passes of this module never store a tensor of this size (docs/decisions/alibi-in-chunks.md):

* `ALIBI_ATTENTION_ON_CPU`, for ONNX Runtime: a Scan over chunks of queries. Its body computes the biases of a chunk
  and com.microsoft MultiHeadAttention of the chunk with all keys.
* `ALIBI_ATTENTION`, for OpenVINO: the same scores from operators whose other operand has no axis of heads or none of
  tokens. OpenVINO computes all of them inside its attention kernel, which works in blocks:

      q·k * scale - slope * |i - j| + padding  =  (q·k * scale / slope - |i - j|) * slope + padding

Both are for slopes above 0. Shapes: B texts, S tokens, N heads, D head size; C chunks of Q queries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    array,
    constant,
    integers,
    operand,
    producer,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.attention import require_attention, require_same_heads
from gte_deploy.exporters.graph.fusion.distances import require_distances, split_padding
from gte_deploy.exporters.graph.fusion.heads import require_heads

CHUNK = 128
"""The most queries of a chunk. Twice as many are not faster, and the scores of a chunk take twice the memory."""

_INT64: Any = {"dtype": ir.DataType.INT64}


@dataclass(frozen=True)
class AlibiMask:
    """padding - slopes * |i - j|, for queries i and keys j.

    Args:
        padding: the additive mask of padding, [B, 1, 1, S].
        slopes: [N] float32, all above 0.
        places: 0 … S-1, int64.
        length: S, a scalar.
    """

    padding: ir.Value
    slopes: NDArray[np.float32]
    places: ir.Value
    length: ir.Value


def require_alibi_mask(bias: ir.Value) -> AlibiMask:
    """Match the computation of an additive mask [B, N, S, S], or raise Mismatch."""
    padding, term = split_padding(bias)
    product = producer(producer(term, "Unsqueeze").inputs[0], "Mul")
    first, second = operand(product, 0), operand(product, 1)
    factors, distances = (first, second) if first.is_initializer() else (second, first)
    slopes = -array(factors).astype(np.float32)
    require(slopes.shape == (slopes.size, 1, 1), f"the slopes have shape {list(slopes.shape)}, not [heads, 1, 1]")
    source = distances.producer()
    while source is not None and source.op_type in ("Cast", "Neg"):
        slopes = -slopes if source.op_type == "Neg" else slopes
        distances = operand(source, 0)
        source = distances.producer()
    places = require_distances(distances)
    require(bool((slopes > 0).all()), "a slope is not above 0, so scores do not fall with the distance")
    return AlibiMask(padding, slopes.ravel(), places.outputs[0], operand(places, 1))


def _in_chunks(graph: ir.Graph, softmax: ir.Node) -> None:
    found = require_attention(softmax)
    query, key, value = (require_heads(each) for each in (found.query, found.key, found.value))
    require_same_heads(found, query, key, value)
    mask = require_alibi_mask(found.bias)
    require(mask.slopes.size == query.count, f"there are {mask.slopes.size} slopes for {query.count} heads")

    output = found.output
    build = Builder(graph, output, scope_of(output))
    shared = Builder(graph, output, "alibi")
    slopes = constant(graph, "alibi/minus_slopes", -mask.slopes[None, :, None, None])
    columns = shared.op("Cast", mask.places, name="columns", to=ir.DataType.FLOAT)

    chunk = ir.Value(name=f"{build.scope}/chunk", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(("queries",)))
    last = ir.Node("", "Identity", [None], num_outputs=1, name=f"{build.scope}/chunk/attended")
    last.outputs[0].name, last.outputs[0].dtype = last.name, ir.DataType.FLOAT
    body = ir.Graph([chunk], list(last.outputs), nodes=[last], name=f"{build.scope}/chunk")
    inside = Builder(body, last, f"{build.scope}/chunk")
    one = integers(graph, 1)
    rows = inside.op("Unsqueeze", inside.op("Cast", chunk, name="places", to=ir.DataType.FLOAT), one, name="rows")
    distances = inside.op("Abs", inside.op("Sub", rows, columns, name="differences"), name="distances")
    bias = inside.op("Add", inside.op("Mul", distances, slopes, name="alibi"), mask.padding, name="bias")
    queries = inside.op("Gather", query.projection, chunk, name="query", axis=1)
    inputs = (queries, key.projection, value.projection, None, None, bias)
    options: dict[str, Any] = {"domain": CONTRIB, "num_heads": query.count, "scale": found.scale}
    last.replace_input_with(0, inside.op("MultiHeadAttention", *inputs, **options))
    graph.opset_imports.setdefault(CONTRIB, 1)

    chunks = build.op("Scan", _chunks(shared, mask.length), name="chunks", body=body, num_scan_inputs=1)
    by_text = build.op("Transpose", chunks, perm=(1, 0, 2, 3), name="by_text")  # [C, B, Q, N*D] -> [B, C, Q, N*D]
    joined = build.op("Reshape", by_text, integers(graph, 0, -1, query.count * query.size), name="joined")
    length = shared.op("Unsqueeze", mask.length, integers(graph, 0), name="length", **_INT64)
    replace(output.outputs[0], build.op("Slice", joined, integers(graph, 0), length, one, name="attended"))


def _chunks(build: Builder, length: ir.Value) -> ir.Value:
    """Places of queries in chunks of equal size, [C, Q] int64; the last one repeats the last token.

    Every layer adds equal nodes, which are merged later.
    """
    graph = build.graph

    def number(value: int) -> ir.Value:
        return constant(graph, f"int64_scalar_{value}", np.array(value, np.int64))

    def ints(op_type: str, *inputs: ir.Value, name: str) -> ir.Value:
        return build.op(op_type, *inputs, name=name, **_INT64)

    zero, one = number(0), number(1)
    count = ints("Div", ints("Add", length, number(CHUNK - 1), name="up"), number(CHUNK), name="count")
    rest = ints("Sub", ints("Add", length, count, name="rounded"), one, name="rounded_up")
    size = ints("Div", rest, count, name="size")
    begins = ints("Mul", ints("Range", zero, count, one, name="numbers"), size, name="begins")
    begin = ints("Unsqueeze", begins, integers(graph, 1), name="begin")
    places = ints("Add", begin, ints("Range", zero, size, one, name="in_chunk"), name="query_places")
    return ints("Min", places, ints("Sub", length, one, name="last"), name="queries")


def _in_one_kernel(graph: ir.Graph, softmax: ir.Node) -> None:
    found = require_attention(softmax)
    mask = require_alibi_mask(found.bias)

    build = Builder(graph, softmax, scope_of(softmax))
    shared = Builder(graph, softmax, "alibi")
    slopes = mask.slopes[None, :, None, None]
    steeper = constant(graph, "alibi/scale_by_slope", (found.scale / slopes.astype(np.float64)).astype(np.float32))
    places = shared.op("Cast", mask.places, name="places", to=ir.DataType.FLOAT)
    rows, columns = (
        shared.op("Unsqueeze", places, integers(graph, *axes), name=name)
        for axes, name in (((0, 1, 3), "rows"), ((0, 1, 2), "columns"))
    )
    distances = shared.op("Abs", shared.op("Sub", rows, columns, name="differences"), name="distances")
    nearness = shared.op("Neg", distances, name="nearness")  # [1, 1, S, S]
    scaled = build.op("Mul", found.scores, steeper, name="scaled")
    biased = build.op("Add", scaled, nearness, name="biased")
    flatter = build.op("Mul", biased, constant(graph, "alibi/slopes", slopes), name="by_slope")
    softmax.replace_input_with(0, build.op("Add", flatter, mask.padding, name="masked"))


ALIBI_ATTENTION_ON_CPU = FusionPass(name="alibi_attention", anchor="Softmax", rewrite=_in_chunks)
ALIBI_ATTENTION = FusionPass(name="alibi_attention", anchor="Softmax", rewrite=_in_one_kernel)

"""Local attention: each token attends to the tokens near it, so blocks of queries need only the keys around them.

The trace computes the scores of all tokens and hides those that are more than `window` places away. This pass computes
each block of queries with the keys of its window alone. Time and memory then grow with S, not with S * S
(docs/decisions/local-attention-in-blocks.md). All operators are standard ones, so every engine for CPUs runs them.

Shapes: B texts, S tokens, N heads, D head size; C blocks of Q queries, each with K keys:

    C = max(1, (S - 1) // (2 * window)),  Q = ceil(S / C),  K = min(S, Q + 2 * window)

A text of up to 4 * window tokens is one block with all keys, which is what the trace computes. Otherwise blocks have
2 * window to 4 * window queries. Every key of a block exists, because blocks at the ends move inward; queries that do
not exist repeat the last token, and their rows are dropped. The places and the mask of the blocks are computed once per
run, and all layers share them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    Mismatch,
    array,
    constant,
    dimensions,
    integers,
    operand,
    producer,
    replace,
    require,
    scope_of,
    split_operands,
)
from gte_deploy.exporters.graph.fusion.attention import require_attention
from gte_deploy.exporters.graph.fusion.distances import require_distances, split_padding

_INT64: Any = {"dtype": ir.DataType.INT64}


@dataclass(frozen=True)
class LocalMask:
    """padding + (|i - j| > window) * factor, for queries i and keys j.

    Args:
        padding: the additive mask of padding, [B, 1, 1, S].
        window: the largest distance that is not hidden.
        factor: what is added to the scores of tokens that are farther away, a scalar initialiser.
        length: S, a scalar.
    """

    padding: ir.Value
    window: int
    factor: ir.Value
    length: ir.Value


def require_local_mask(bias: ir.Value) -> LocalMask:
    """Match the computation of an additive mask [B, 1, S, S], or raise Mismatch."""
    padding, term = split_padding(bias)
    cast, factor = split_operands(producer(term, "Mul"), "Cast")
    require(array(factor).size == 1, f"{factor.name!r} is not one number")
    is_far = producer(cast.inputs[0], "Greater")
    window = int(array(is_far.inputs[1]).item())
    places = require_distances(is_far.inputs[0])
    return LocalMask(padding, window, factor, operand(places, 1))


@dataclass(frozen=True)
class _Blocks:
    """Places of queries [C, Q] and of keys [C, K], and the additive mask [B, 1, C, Q, K]."""

    queries: ir.Value
    keys: ir.Value
    bias: ir.Value


def _rewrite(graph: ir.Graph, softmax: ir.Node) -> None:
    found = require_attention(softmax)
    mask = require_local_mask(found.bias)
    size = dimensions(found.value)[-1]
    if not isinstance(size, int):
        raise Mismatch(f"the head size of {found.value.name!r} is {size}, not a number")

    product = found.product
    build = Builder(graph, product, f"{scope_of(product)}/blocks")
    blocks = _blocks(Builder(graph, product, "blocks"), mask)
    query = build.op("Gather", found.query, blocks.queries, name="query", axis=2)
    key = build.op("Gather", found.key, blocks.keys, name="key", axis=2)
    value = build.op("Gather", found.value, blocks.keys, name="value", axis=2)
    scores = build.op("MatMul", query, build.op("Transpose", key, perm=(0, 1, 2, 4, 3)), name="scores")
    scale = constant(graph, f"{build.scope}/scale", np.array(found.scale, np.float32))
    scaled = build.op("Mul", scores, scale, name="scaled")
    weights = build.op("Softmax", build.op("Add", scaled, blocks.bias, name="masked"), name="weights", axis=-1)
    attended = build.op("MatMul", weights, value, name="attended")
    joined = build.op("Reshape", attended, integers(graph, 0, 0, -1, size), name="joined")
    length = build.inside("blocks").op("Unsqueeze", mask.length, integers(graph, 0), name="length", **_INT64)
    cut = build.op("Slice", joined, integers(graph, 0), length, integers(graph, 2), name="cut")
    replace(product.outputs[0], cut)


def _blocks(build: Builder, mask: LocalMask) -> _Blocks:
    """The blocks of a run. Every layer adds equal nodes, which are merged later."""
    graph, length, window = build.graph, mask.length, mask.window

    def number(value: int) -> ir.Value:
        return constant(graph, f"int64_scalar_{value}", np.array(value, np.int64))

    def ints(op_type: str, *inputs: ir.Value, name: str) -> ir.Value:
        return build.op(op_type, *inputs, name=name, **_INT64)

    zero, one, around = number(0), number(1), number(2 * window)
    last = ints("Sub", length, one, name="last")
    count = ints("Max", ints("Div", last, around, name="full"), one, name="count")
    size = ints("Div", ints("Sub", ints("Add", length, count, name="rounded"), one, name="up"), count, name="size")
    span = ints("Min", ints("Add", size, around, name="wide"), length, name="span")
    begins = ints("Mul", ints("Range", zero, count, one, name="numbers"), size, name="begins")
    begins = ints("Unsqueeze", begins, integers(graph, 1), name="begin")
    queries = ints("Add", begins, ints("Range", zero, size, one, name="in_block"), name="query_places")
    queries = ints("Min", queries, last, name="queries")
    latest = ints("Sub", length, span, name="latest")
    first = ints("Min", ints("Sub", begins, number(window), name="before"), latest, name="first_or_less")
    first = ints("Max", first, zero, name="first")
    keys = ints("Add", first, ints("Range", zero, span, one, name="in_span"), name="keys")

    rows = ints("Unsqueeze", queries, integers(graph, 2), name="rows")
    columns = ints("Unsqueeze", keys, integers(graph, 1), name="columns")
    distances = ints("Abs", ints("Sub", rows, columns, name="differences"), name="distances")
    is_far = build.op("Greater", distances, number(window), name="is_far", dtype=ir.DataType.BOOL)
    far = build.op("Mul", build.op("Cast", is_far, name="ones", to=ir.DataType.FLOAT), mask.factor, name="far")
    padding = build.op("Gather", mask.padding, keys, name="padding_of_keys", axis=3)
    per_block = build.op("Transpose", padding, perm=(0, 1, 3, 2, 4), name="padding")
    return _Blocks(queries, keys, build.op("Add", per_block, far, name="bias"))


LOCAL_ATTENTION = FusionPass(name="local_attention", anchor="Softmax", rewrite=_rewrite)

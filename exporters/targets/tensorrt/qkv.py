"""Joins queries, keys and values, so that TensorRT computes them in one GEMM and prepares them in one kernel.

    [q k v] = split(x · [Wq Wk Wv] + [bq bk bv]);      [q k] = rotate([q k]) * [scale 1]

The trace projects, rotates and transposes the three tensors separately. TensorRT joins the GEMMs by itself, but then
launches three elementwise kernels in each layer: the rotation of queries, the rotation of keys, and a copy of values in
the layout of the attention kernel. If the three are one tensor until the end of this work, TensorRT launches one.

The queries are scaled before the product with the keys, as TensorRT's documentation of fused attention requires. The
scale is a factor in FP32 right after the rotation.

Shapes: B rows, S tokens, T tokens of all rows, N heads, D head size, H = N*D.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    Mismatch,
    array,
    constant,
    consumer,
    integers,
    operand,
    producer,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion import fuse_graph
from gte_deploy.exporters.graph.fusion.attention import (
    Attention,
    require_attention,
    require_mask_of_keys,
    require_same_heads,
)
from gte_deploy.exporters.graph.fusion.heads import Heads, require_heads
from gte_deploy.exporters.graph.fusion.linear import (
    LinearMatch,
    concatenate_biases,
    concatenate_weights,
    require_shared_input,
)
from gte_deploy.exporters.graph.fusion.rope import Rotation, require_rotation
from gte_deploy.exporters.graph.linear_layers import LinearLayer

_PARTS = "parts"
# The axis of [B, 3, N, S, D] and of [T, 3, N, D] on which queries, keys and values lie side by side.
_PART_AXIS = 1


@dataclass(frozen=True)
class Projections:
    """The projections of one attention, with the rotation of queries and keys.

    Args:
        attention: the attention.
        linears: the linear layers of queries, keys and values, which have the same input.
        heads: how each projection is split into heads.
        rotation: the rotation of the queries; the keys have the same cosines and sines. None for other positions.
    """

    attention: Attention
    linears: Sequence[LinearMatch]
    heads: Heads
    rotation: Rotation | None


def join_projections(model: ir.Model, *, sites: Mapping[str, int]) -> dict[str, int]:
    """Join the projections of every layer of a padded graph in place; return pass -> number of matches.

    Raises:
        ExportError: a layer does not have the expected form; `sites` is the argument of `fuse_graph`.
    """
    return fuse_graph(model, sites=sites, passes=(JOINED_QKV,))


def require_projections(softmax: ir.Node) -> Projections:
    """Match the attention around a Softmax with its projections, or raise Mismatch."""
    found = require_attention(softmax)
    value = require_heads(found.value)
    if _is_rotated(found.query):
        rotations = [require_rotation(_negation(rotated)) for rotated in (found.query, found.key)]
        require(len({(each.cosine, each.sine) for each in rotations}) == 1, "queries and keys are rotated differently")
        query, key, rotation = rotations[0].heads, rotations[1].heads, rotations[0]
    else:
        query, key, rotation = require_heads(found.query), require_heads(found.key), None
    require_same_heads(found, query, key, value)
    linears = require_shared_input(query.projection, key.projection, value.projection)
    return Projections(found, linears, value, rotation)


def joined_projection(build: Builder, found: Projections) -> ir.Value:
    """Compute x · [Wq Wk Wv] + [bq bk bv], [B, S, 3*H] or [T, 3*H]."""
    graph, name = build.graph, f"{build.scope}.qkv_proj"
    weight = concatenate_weights(graph, f"{name}.weight.T", [linear.weight for linear in found.linears])
    weight.meta[_PARTS] = frozenset(str(linear.weight.name).removesuffix(".T") for linear in found.linears)
    bias = concatenate_biases(graph, f"{name}.bias", found.linears)
    build = build.inside(name)
    product = build.op("MatMul", found.linears[0].x, weight)
    return product if bias is None else build.op("Add", product, bias)


def joined_parts(linear: LinearLayer) -> frozenset[str]:
    """The names of the weights that a linear layer joins; its own name if it joins none."""
    return linear.weight.meta.get(_PARTS, frozenset((linear.name,)))


def split_heads(
    build: Builder, x: ir.Value, found: Projections, factors: tuple[ir.Value, ir.Value] | None, *, rank: int
) -> list[ir.Value]:
    """Split [B, 3, N, S, D] or [T, 3, N, D] into scaled and rotated queries, rotated keys, and values.

    Args:
        build: inserts the nodes.
        x: the heads of all three.
        found: the projections.
        factors: cosines and sines that broadcast to `x`; None without rotation.
        rank: the number of dimensions of `x`.
    """
    graph, scale = build.graph, found.attention.scale
    two, values = build.node("Split", [x, integers(graph, 2, 1)], name="two_and_one", axis=_PART_AXIS, outputs=2)
    if factors is not None:
        two = _rotated(build, two, factors, found.heads.size)
    scales = np.array([scale, 1], np.float32).reshape(2, *[1] * (rank - 1 - _PART_AXIS))
    factor = constant(graph, "query_scale", scales)
    require(array(factor).tobytes() == scales.tobytes(), "the layers' scores are scaled differently")
    two = build.op("Mul", two, factor, name="scaled")
    query, key = build.node("Split", [two, integers(graph, 1, 1)], name="turned", axis=_PART_AXIS, outputs=2)
    return [
        build.op("Squeeze", part, integers(graph, _PART_AXIS), name=name)
        for part, name in ((query, "query"), (key, "key"), (values, "value"))
    ]


def _rotated(build: Builder, x: ir.Value, factors: tuple[ir.Value, ir.Value], size: int) -> ir.Value:
    """Compute x * cos + concat(-x[D/2:], x[:D/2]) * sin, like the trace."""
    cosine, sine = factors
    start, middle, end, axis = (integers(build.graph, n) for n in (0, size // 2, size, -1))
    lower = build.op("Slice", x, start, middle, axis, name="lower")
    upper = build.op("Slice", x, middle, end, axis, name="upper")
    crossed = build.op("Concat", build.op("Neg", upper, name="negated"), lower, axis=-1, name="crossed")
    terms = build.op("Mul", x, cosine, name="cosine"), build.op("Mul", crossed, sine, name="sine")
    return build.op("Add", *terms, name="rotated")


def _rewrite(graph: ir.Graph, softmax: ir.Node) -> None:
    """Feed the attention on [B, N, S, D] from the joined projection, and scale its queries instead of its scores."""
    found = require_projections(softmax)
    require_mask_of_keys(found.attention.bias)
    product = consumer(found.attention.query, "MatMul")
    scores = consumer(product.outputs[0], "Mul")
    build = Builder(graph, product, scope_of(product))
    split = integers(graph, 0, 0, 3, found.heads.count, found.heads.size)
    heads = build.op("Reshape", joined_projection(build, found), split, name="parts")
    heads = build.op("Transpose", heads, perm=(0, 2, 3, 1, 4), name="parts_first")
    factors = None if found.rotation is None else (found.rotation.cosine, found.rotation.sine)
    old = (found.attention.query, found.attention.key, found.attention.value)
    for value, new in zip(old, split_heads(build, heads, found, factors, rank=5), strict=True):
        replace(value, new)
    replace(scores.outputs[0], product.outputs[0])


JOINED_QKV = FusionPass(name="qkv", anchor="Softmax", rewrite=_rewrite)


def _is_rotated(value: ir.Value) -> bool:
    source = value.producer()
    return source is not None and source.op_type == "Add"


def _negation(rotated: ir.Value) -> ir.Node:
    """The Neg of the rotation whose result is `rotated`."""
    for term in producer(rotated, "Add").inputs:
        for factor in producer(term, "Mul").inputs:
            source = None if factor is None else factor.producer()
            if source is not None and source.op_type == "Concat" and (node := operand(source, 0).producer()):
                if node.op_type == "Neg":
                    return node
    raise Mismatch(f"{rotated.name!r} is not a rotation")

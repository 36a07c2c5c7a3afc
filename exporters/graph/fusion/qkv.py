"""Queries, keys and values, three linear layers of the same input, as Gemms with bias on token rows.

`QKV` packs them into one and splits its result; `PROJECTIONS` leaves them apart, without the copies of the split.
"""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    integers,
    operand,
    producer,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.linear import Linear, pack, require_linear
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows

KINDS = ("query", "key", "value")


def _pack(graph: ir.Graph, attention: ir.Node) -> None:
    projections, linears = _matched(attention)
    build = Builder(graph, attention, scope_of(attention))
    rows = to_rows(build, linears[0].x)
    name = f"{build.scope}.qkv_proj"
    weight = pack(graph, f"{name}.weight.T", [linear.weight for linear in linears])
    bias = pack(graph, f"{name}.bias", [linear.bias for linear in linears])
    sizes = [linear.out for linear in linears]
    packed = build.inside(name).op("Gemm", rows, weight, bias, shape=("tokens", sum(sizes)))
    parts = build.node("Split", [packed, integers(graph, *sizes)], name="qkv", axis=1, outputs=3)
    for projection, part, size, kind in zip(projections, parts, sizes, KINDS, strict=True):
        part.shape = ir.Shape(("tokens", size))
        replace(projection, from_rows(build, part, name=f"{kind}_proj"))


def _keep_apart(graph: ir.Graph, attention: ir.Node) -> None:
    projections, linears = _matched(attention)
    build = Builder(graph, attention, scope_of(attention))
    rows = to_rows(build, linears[0].x)
    for projection, linear, kind in zip(projections, linears, KINDS, strict=True):
        width = ("tokens", linear.out)
        projected = build.inside(linear.scope).op("Gemm", rows, linear.weight, linear.bias, shape=width)
        replace(projection, from_rows(build, projected, name=f"{kind}_proj"))


def _matched(attention: ir.Node) -> tuple[list[ir.Value], list[Linear]]:
    query, key, value = (operand(attention, i) for i in range(3))
    projections = [_projection(query), _projection(key), value]
    linears = [require_linear(projection, bias=True) for projection in projections]
    require(len({linear.x for linear in linears}) == 1, "queries, keys and values are not made from the same input")
    return projections, linears


def _projection(value: ir.Value) -> ir.Value:
    """The projection of queries or keys, before any rotation and without the mask's columns."""
    with_mask = producer(producer(value, "Reshape").inputs[0], "Concat")
    projected = operand(producer(with_mask.inputs[0], "Reshape"), 0)
    made = projected.producer()
    return operand(made, 0) if made is not None and made.op_type == "RotaryEmbedding" else projected


QKV = FusionPass(name="qkv", anchor="MultiHeadAttention", rewrite=_pack)
PROJECTIONS = FusionPass(name="projections", anchor="MultiHeadAttention", rewrite=_keep_apart)

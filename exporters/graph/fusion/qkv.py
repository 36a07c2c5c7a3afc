"""The query, key and value projections, three linear layers of one input, as Gemms with bias on token rows.

`QKV` merges the three into one Gemm and a Split. `PROJECTIONS` keeps three Gemms, which saves the copies of the Split.
Layers without a bias are MatMuls.
"""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    integers,
    operand,
    producer,
    replace,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.attention import require_mask_columns
from gte_deploy.exporters.graph.fusion.linear import (
    LinearMatch,
    concatenate_biases,
    concatenate_weights,
    project_rows,
    require_shared_input,
)
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows

KINDS = ("query", "key", "value")


def _merge(graph: ir.Graph, attention: ir.Node) -> None:
    projections, linears = _matched(attention)
    build = Builder(graph, attention, scope_of(attention))
    rows = to_rows(build, linears[0].x)
    name = f"{build.scope}.qkv_proj"
    weight = concatenate_weights(graph, f"{name}.weight.T", [linear.weight for linear in linears])
    bias = concatenate_biases(graph, f"{name}.bias", linears)
    sizes = [linear.out for linear in linears]
    merged = project_rows(build.inside(name), rows, weight, bias, out=sum(sizes))
    parts = build.node("Split", [merged, integers(graph, *sizes)], name="qkv", axis=1, outputs=3)
    for projection, part, size, kind in zip(projections, parts, sizes, KINDS, strict=True):
        part.shape = ir.Shape(("tokens", size))
        replace(projection, from_rows(build, part, name=f"{kind}_proj"))


def _keep_separate(graph: ir.Graph, attention: ir.Node) -> None:
    projections, linears = _matched(attention)
    build = Builder(graph, attention, scope_of(attention))
    rows = to_rows(build, linears[0].x)
    for projection, linear, kind in zip(projections, linears, KINDS, strict=True):
        projected = project_rows(build.inside(linear.scope), rows, linear.weight, linear.bias, out=linear.out)
        replace(projection, from_rows(build, projected, name=f"{kind}_proj"))


def _matched(attention: ir.Node) -> tuple[list[ir.Value], list[LinearMatch]]:
    query, key, value = (operand(attention, i) for i in range(3))
    projections = [_projection(query), _projection(key), value]
    return projections, require_shared_input(*projections)


def _projection(value: ir.Value) -> ir.Value:
    """The projection of queries or keys, before the rotation if there is one, and before the mask columns."""
    with_mask = require_mask_columns(value)
    projected = operand(producer(with_mask.inputs[0], "Reshape"), 0)
    source = projected.producer()
    return operand(source, 0) if source is not None and source.op_type == "RotaryEmbedding" else projected


QKV = FusionPass(name="qkv", anchor="MultiHeadAttention", rewrite=_merge)
PROJECTIONS = FusionPass(name="projections", anchor="MultiHeadAttention", rewrite=_keep_separate)

"""The gated MLP's first half: up and gate matrices side by side, [up; gate], in one MatMul on token rows."""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    consumer,
    integers,
    operand,
    other_operand,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.linear import pack, require_linear
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows


def _rewrite(graph: ir.Graph, gelu: ir.Node) -> None:
    product = consumer(gelu.outputs[0], "Mul")
    gate = operand(gelu, 0)
    up = other_operand(product, gelu.outputs[0])
    linears = [require_linear(value, bias=False) for value in (up, gate)]
    require(linears[0].x is linears[1].x, "up and gate are not made from the same input")

    build = Builder(graph, gelu, scope_of(product))
    name = f"{build.scope}.up_gate_proj"
    weight = pack(graph, f"{name}.weight.T", [linear.weight for linear in linears])
    sizes = [linear.out for linear in linears]
    rows = to_rows(build, linears[0].x)
    packed = build.inside(name).op("MatMul", rows, weight, shape=("tokens", sum(sizes)))
    parts = build.node("Split", [packed, integers(graph, *sizes)], name="up_gate", axis=1, outputs=2)
    for old, part, size, kind in zip((up, gate), parts, sizes, ("up", "gate"), strict=True):
        part.shape = ir.Shape(("tokens", size))
        replace(old, from_rows(build, part, name=f"{kind}_proj"))


UP_GATE = FusionPass(name="up_gate", anchor="Gelu", rewrite=_rewrite)

"""The gated linear unit f(gate) * up on token rows, where f is the exact (erf) GELU or SiLU, x * sigmoid(x)."""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    operand,
    producer,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.gated_unit import FUNCTIONS, require_gated_unit
from gte_deploy.exporters.graph.fusion.rows import from_rows


def _rewrite(graph: ir.Graph, function: ir.Node) -> None:
    approximate = function.attributes.get_string("approximate", "none")
    require(approximate == "none", f"the GELU is {approximate!r}, not exact")
    unit = require_gated_unit(function)
    gate_rows, up_rows = (operand(producer(value, "Reshape"), 0) for value in (unit.gate, unit.up))
    split = producer(gate_rows, "Split")
    halves = list(split.outputs) == [up_rows, gate_rows]
    require(halves, "gate and up are not the two halves of one [up; gate] GEMM")

    build = Builder(graph, unit.product, scope_of(unit.product))
    if function.op_type == "Gelu":
        activated = build.op("Gelu", gate_rows, domain=CONTRIB, shape=gate_rows.shape)
    else:
        activated = build.op("Mul", gate_rows, build.op("Sigmoid", gate_rows), name="SiLU", shape=gate_rows.shape)
    gated = build.op("Mul", activated, up_rows, name="glu", shape=gate_rows.shape)
    replace(unit.product.outputs[0], from_rows(build, gated))


GLU = FusionPass(name="glu", anchor=FUNCTIONS, rewrite=_rewrite)

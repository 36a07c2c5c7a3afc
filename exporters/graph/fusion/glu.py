"""The gated linear unit gelu(gate) * up on token rows, with the exact (erf) GELU."""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    consumer,
    operand,
    other_operand,
    producer,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.rows import from_rows


def _rewrite(graph: ir.Graph, gelu: ir.Node) -> None:
    approximate = gelu.attributes.get_string("approximate", "none")
    require(approximate == "none", f"the GELU is {approximate!r}, not exact")
    product = consumer(gelu.outputs[0], "Mul")
    up = other_operand(product, gelu.outputs[0])
    gate_rows, up_rows = (operand(producer(value, "Reshape"), 0) for value in (operand(gelu, 0), up))
    split = producer(gate_rows, "Split")
    halves = list(split.outputs) == [up_rows, gate_rows]
    require(halves, "gate and up are not the two halves of one [up; gate] GEMM")

    build = Builder(graph, product, scope_of(product))
    activated = build.op("Gelu", gate_rows, domain=CONTRIB, shape=gate_rows.shape)
    gated = build.op("Mul", activated, up_rows, name="glu", shape=gate_rows.shape)
    replace(product.outputs[0], from_rows(build, gated))


GLU = FusionPass(name="glu", anchor="Gelu", rewrite=_rewrite)

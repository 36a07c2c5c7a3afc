"""The up and gate projections of a gated MLP: two MatMuls of one input -> one MatMul and a Split.

The merged weight has the columns [up, gate]. There is one pass for each form that the target needs:

* `UP_GATE_ON_ROWS` computes on token rows [B*S, H], like the other passes for CUDA.
* `UP_GATE` keeps the shape of the input, [B, S, H] or [T, H], for TensorRT.
"""

import functools

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
from gte_deploy.exporters.graph.fusion.linear import concatenate_weights, require_linear
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows


def merged_name(up: str) -> str:
    """The name of the weight that holds the up projection `up` and its gate projection."""
    return up.replace("up_proj", "up_gate_proj")


def _rewrite(graph: ir.Graph, gelu: ir.Node, *, on_rows: bool) -> None:
    product = consumer(gelu.outputs[0], "Mul")
    gate = operand(gelu, 0)
    up = other_operand(product, gelu.outputs[0])
    linears = [require_linear(value, bias=False) for value in (up, gate)]
    require(linears[0].x is linears[1].x, "up and gate do not have the same input")

    build = Builder(graph, gelu, scope_of(product))
    name = merged_name(str(linears[0].weight.name))
    weight = concatenate_weights(graph, name, [linear.weight for linear in linears])
    x, axis = (to_rows(build, linears[0].x), 1) if on_rows else (linears[0].x, -1)
    merged = build.inside(f"{build.scope}.up_gate_proj").op("MatMul", x, weight)
    sizes = [linear.out for linear in linears]
    parts = build.node("Split", [merged, integers(graph, *sizes)], name="up_gate", axis=axis, outputs=2)
    for old, part, size, kind in zip((up, gate), parts, sizes, ("up", "gate"), strict=True):
        if on_rows:
            part.shape = ir.Shape(("tokens", size))
            part = from_rows(build, part, name=f"{kind}_proj")
        replace(old, part)


UP_GATE_ON_ROWS = FusionPass(name="up_gate", anchor="Gelu", rewrite=functools.partial(_rewrite, on_rows=True))
UP_GATE = FusionPass(name="up_gate", anchor="Gelu", rewrite=functools.partial(_rewrite, on_rows=False))

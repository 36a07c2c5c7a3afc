"""The up and gate projections of a gated MLP: two MatMuls of one input -> one MatMul and a Split.

The merged weight has the columns [up, gate]. There is one pass for each form that the target needs:

* `UP_GATE_ON_ROWS` computes on token rows [B*S, H], like the other passes for CUDA.
* `UP_GATE` keeps the shape of the input, [B, S, H] or [T, H], for TensorRT.
"""

import functools
import re

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    integers,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.gated_unit import FUNCTIONS, require_gated_unit
from gte_deploy.exporters.graph.fusion.linear import (
    concatenate_biases,
    concatenate_weights,
    project_rows,
    require_linear,
)
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows


def merged_name(up: str) -> str:
    """The name of the weight that holds the up projection `up` and its gate projection."""
    # Where the model's own matrix holds both, the trace numbered its parts.
    return re.sub(r"\.[01](\.weight(?:\.T)?)$", r"\1", up.replace("up_proj", "up_gate_proj"))


def _rewrite(graph: ir.Graph, function: ir.Node, *, on_rows: bool) -> None:
    unit = require_gated_unit(function)
    linears = [require_linear(value) for value in (unit.up, unit.gate)]
    require(linears[0].x is linears[1].x, "up and gate do not have the same input")
    require(len({linear.bias is None for linear in linears}) == 1, "one of up and gate alone has a bias")

    build = Builder(graph, function, scope_of(unit.product))
    name = merged_name(str(linears[0].weight.name))
    weight = concatenate_weights(graph, name, [linear.weight for linear in linears])
    bias = concatenate_biases(graph, f"{build.scope}.up_gate_proj.bias", linears)
    sizes = [linear.out for linear in linears]
    within = build.inside(f"{build.scope}.up_gate_proj")
    if on_rows:
        merged = project_rows(within, to_rows(build, linears[0].x), weight, bias, out=sum(sizes))
    else:
        merged = within.op("MatMul", linears[0].x, weight)
        merged = merged if bias is None else within.op("Add", merged, bias)
    axis = 1 if on_rows else -1
    parts = build.node("Split", [merged, integers(graph, *sizes)], name="up_gate", axis=axis, outputs=2)
    for old, part, size, kind in zip((unit.up, unit.gate), parts, sizes, ("up", "gate"), strict=True):
        if on_rows:
            part.shape = ir.Shape(("tokens", size))
            part = from_rows(build, part, name=f"{kind}_proj")
        replace(old, part)


UP_GATE_ON_ROWS = FusionPass(name="up_gate", anchor=FUNCTIONS, rewrite=functools.partial(_rewrite, on_rows=True))
UP_GATE = FusionPass(name="up_gate", anchor=FUNCTIONS, rewrite=functools.partial(_rewrite, on_rows=False))

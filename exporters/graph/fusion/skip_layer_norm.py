"""The residual step LayerNorm(skip + linear(x)) as Gemm with bias, Add and LayerNormalization on token rows.

The sum may also be the next residual, as in layers that begin with their LayerNorm.

It is not com.microsoft SkipLayerNormalization, because the CPU kernel of that operator is slower
(docs/decisions/residual-and-layernorm-apart.md).
"""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    Builder,
    FusionPass,
    Mismatch,
    operand,
    producer,
    replace,
    require,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.linear import LinearMatch, project_rows, require_linear
from gte_deploy.exporters.graph.fusion.rows import from_rows, to_rows


def _rewrite(graph: ir.Graph, norm: ir.Node) -> None:
    total = producer(norm.inputs[0], "Add")
    linear, skip = _residual(total)
    require(norm.attributes.get_int("axis", -1) in (-1, 2), f"{norm.name} does not normalise the last axis")

    build = Builder(graph, norm, scope_of(norm))
    rows = to_rows(build, linear.x)
    width = ("tokens", linear.out)
    projected = project_rows(build.inside(linear.scope), rows, linear.weight, linear.bias, out=linear.out)
    summed = build.op("Add", projected, to_rows(build, skip), name="residual", shape=width)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    normed = build.op("LayerNormalization", summed, *norm.inputs[1:], shape=width, axis=-1, epsilon=epsilon)
    replace(norm.outputs[0], from_rows(build, normed))
    if any(use.node is not norm for use in total.outputs[0].uses()):  # where norms come first, the next sum reads it
        replace(total.outputs[0], from_rows(build, summed, name="residual_from_rows"))


def _residual(total: ir.Node) -> tuple[LinearMatch, ir.Value]:
    """Match the operand that is a linear layer, the first if both are; return it and the other operand."""
    first, second = operand(total, 0), operand(total, 1)
    for value, skip in ((first, second), (second, first)):
        try:
            return require_linear(value), skip
        except Mismatch as mismatch:
            reason = mismatch
    raise Mismatch(f"neither operand of {total.name} is a linear layer ({reason})")


SKIP_LAYER_NORM = FusionPass(name="skip_layer_norm", anchor="LayerNormalization", rewrite=_rewrite)

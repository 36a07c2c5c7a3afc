"""Token rows: operations on single tokens compute on [B*S, width] instead of [B, S, width].

On rows, a linear layer with a bias is one Gemm. Rows also keep ONNX Runtime from fusing Add and LayerNormalization into
its CPU SkipLayerNormalization (docs/decisions/residual-and-layernorm-apart.md). Every pass that uses rows reshapes its
result back to [B, S, width]. Where the result of one pass is the input of another, `join_rows` removes both Reshapes.
"""

import onnx_ir as ir

from gte_deploy.exporters.graph.editing import Builder, Mismatch, by_name, dimensions, integers, operand, producer

FIRST_INPUT = "input_ids"


def to_rows(build: Builder, value: ir.Value) -> ir.Value:
    """[B, S, width] -> [B*S, width]."""
    shape = dimensions(value)
    width = shape[-1]
    if len(shape) != 3 or not isinstance(width, int):
        raise Mismatch(f"{value.name!r} has shape {list(shape)}, not [batch, sequence, a fixed width]")
    return build.op("Reshape", value, integers(build.graph, -1, width), name="to_rows", shape=("tokens", width))


def from_rows(build: Builder, value: ir.Value, *, name: str = "from_rows") -> ir.Value:
    """[B*S, width] -> [B, S, width]."""
    ids = by_name(build.graph.inputs, FIRST_INPUT)
    tokens = build.inside("tokens")
    size = tokens.op("Shape", ids, name="batch_sequence", dtype=ir.DataType.INT64, shape=(2,))
    target = tokens.op(
        "Concat", size, integers(build.graph, -1), name="target", axis=0, dtype=ir.DataType.INT64, shape=(3,)
    )
    return build.op("Reshape", value, target, name=name, shape=(*dimensions(ids), dimensions(value)[-1]))


def join_rows(graph: ir.Graph) -> int:
    """Remove all pairs of Reshapes [B*S, width] -> [B, S, width] -> [B*S, width]; return their number."""
    joined = 0
    for node in [node for node in graph if node.op_type == "Reshape"]:
        try:
            rows = operand(producer(node.inputs[0], "Reshape"), 0)
            before, after = dimensions(rows), dimensions(node.outputs[0])
        except Mismatch:
            continue
        if len(before) == len(after) == 2 and before[1] == after[1]:
            node.outputs[0].replace_all_uses_with(rows)
            joined += 1
    return joined

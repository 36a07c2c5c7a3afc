"""For CUDA: makes the values of attention with a folded mask as wide as its queries and keys.

ONNX Runtime's CUDA flash kernel accepts no mask input, and needs heads of one size. So values also get the mask's
columns, filled with zeros, and a Slice after the attention removes these columns. Where the flash kernel does not apply
(GPUs before Ampere, FP32), another kernel runs the same graph: memory-efficient attention, or a kernel that stores the
scores of short texts.
"""

import numpy as np
import onnx_ir as ir

from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    FusionPass,
    Mismatch,
    constant,
    dimensions,
    integers,
    operand,
    producer,
    replace,
    scope_of,
)
from gte_deploy.exporters.graph.fusion.attention import MASK_COLUMNS, require_mask_columns


def _rewrite(graph: ir.Graph, attention: ir.Node) -> None:
    query, key, value = (operand(attention, i) for i in range(3))
    with_mask = require_mask_columns(query)
    per_query = producer(with_mask.inputs[1], "Expand")
    heads, scale = attention.attributes.get_int("num_heads", 0), attention.attributes.get_float("scale", 0.0)
    width = dimensions(value)[-1]
    if not isinstance(width, int):
        raise Mismatch(f"the width of {value.name!r} is {width}")
    size = width // heads

    build = Builder(graph, attention, scope_of(attention))
    zeros = constant(graph, "mask/per_value", np.zeros((1, 1, heads, MASK_COLUMNS), np.float32))
    columns = build.inside("mask").op("Expand", zeros, per_query.inputs[1], name="value_columns")
    split = build.op("Reshape", value, integers(graph, 0, 0, heads, size), name="value_heads", allowzero=0)
    widened = build.op("Concat", split, columns, axis=3, name="value_and_mask")
    target = integers(graph, 0, 0, heads * (size + MASK_COLUMNS))
    value = build.op("Reshape", widened, target, name="value", allowzero=0)
    attended = build.op(
        "MultiHeadAttention", query, key, value, name="flash", domain=CONTRIB, num_heads=heads, scale=scale
    )
    split = build.op("Reshape", attended, integers(graph, 0, 0, heads, size + MASK_COLUMNS), name="heads", allowzero=0)
    start, end, axis = (integers(graph, n) for n in (0, size, 3))
    without_mask = build.op("Slice", split, start, end, axis, name="without_mask")
    joined = build.op("Reshape", without_mask, integers(graph, 0, 0, width), name="joined", allowzero=0)
    replace(attention.outputs[0], joined)


FLASH = FusionPass(name="flash", anchor="MultiHeadAttention", rewrite=_rewrite)

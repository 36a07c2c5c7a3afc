"""Attention with folded masks -> the same with values as wide as queries and keys, for CUDA.

ONNX Runtime's CUDA flash kernel wants no mask input and heads of one size. So values get the mask's columns too, as
zeros, and lose them again behind the attention. Where the flash kernel is not for a GPU (before Ampere, or FP32),
others take the same graph: memory-efficient attention, or one that holds the scores of short texts.
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
from gte_deploy.exporters.graph.fusion.attention import MASK_COLUMNS


def _rewrite(graph: ir.Graph, attention: ir.Node) -> None:
    query, key, value = (operand(attention, i) for i in range(3))
    with_mask = producer(producer(query, "Reshape").inputs[0], "Concat")
    per_query = producer(with_mask.inputs[1], "Expand")
    heads, scale = attention.attributes.get_int("num_heads", 0), attention.attributes.get_float("scale", 0.0)
    width = dimensions(value)[-1]
    if not isinstance(width, int):
        raise Mismatch(f"the width of {value.name!r} is {width}")
    size = width // heads

    build = Builder(graph, attention, scope_of(attention))
    zeros = constant(graph, "mask/per_value", np.zeros((1, 1, heads, MASK_COLUMNS), np.float32))
    columns = build.inside("mask").op("Expand", zeros, per_query.inputs[1], name="value_columns")
    apart = build.op("Reshape", value, integers(graph, 0, 0, heads, size), name="value_heads", allowzero=0)
    wide = build.op("Concat", apart, columns, axis=3, name="value_and_mask")
    joined = integers(graph, 0, 0, heads * (size + MASK_COLUMNS))
    value = build.op("Reshape", wide, joined, name="value", allowzero=0)
    attended = build.op(
        "MultiHeadAttention", query, key, value, name="flash", domain=CONTRIB, num_heads=heads, scale=scale
    )
    apart = build.op("Reshape", attended, integers(graph, 0, 0, heads, size + MASK_COLUMNS), name="heads", allowzero=0)
    start, end, axis = (integers(graph, n) for n in (0, size, 3))
    kept = build.op("Slice", apart, start, end, axis, name="without_mask")
    replace(attention.outputs[0], build.op("Reshape", kept, integers(graph, 0, 0, width), name="joined", allowzero=0))


FLASH = FusionPass(name="flash", anchor="MultiHeadAttention", rewrite=_rewrite)

"""Graphs and listings of TensorRT engines, for tests of 8-bit sums."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.graph.editing import array, initializer, operand, replace
from gte_deploy.exporters.graph.linear_layers import is_quantized

_LAYER = re.compile(
    r"Name: (.*?), LayerType: \w+, Inputs: (\[.*\]), Constants: (\[.*\]), Outputs: (\[.*\]), TacticName:"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: .*?, Datatype: (\w+)")


@dataclasses.dataclass(frozen=True)
class EightBitGemm:
    """A GEMM of 8-bit values in TensorRT-RTX's listing of an engine.

    `is_scaled` is whether it multiplies its sums before it stores them. Its first constant is its weights, the second
    the factor of its sums. The listing gives no values, but a name that ends in "_alpha": this is the default, 1.
    """

    name: str
    output: str
    is_scaled: bool


def eight_bit_gemms(listing: Sequence[str]) -> list[EightBitGemm]:
    """The GEMMs of 8-bit values, once for each profile and GPU."""
    found = []
    for layer in filter(None, map(_LAYER.match, listing)):
        name, *parts = layer.groups()
        inputs, constants, outputs = (_TENSOR.findall(part) for part in parts)
        if inputs and inputs[0][1] in ("Int8", "FP8") and len(constants) > 1 and constants[0][1] == inputs[0][1]:
            factor = re.sub(r"_myl\d+$", "", constants[1][0])
            found.append(EightBitGemm(name, outputs[0][1], not factor.endswith("_alpha")))
    return found


def scales_in_dequantization(graph: Graph) -> Graph:
    """A copy of an 8-bit graph whose scales are operands of DequantizeLinear, where a quantizer usually puts them."""
    model = graph.model.clone()
    unit = initializer(model.graph, "one", ir.tensor(np.array(1, np.float16)))
    for product in [node for node in model.graph if is_quantized(node)]:
        ((wide, _),) = product.outputs[0].uses()
        ((scaled, _),) = wide.outputs[0].uses()
        assert (wide.op_type, scaled.op_type) == ("Cast", "Mul")
        x, weight = (operand(product, i).producer() for i in (0, 1))
        sum_scale = 2.0 ** -int(str(operand(x, 1).name).removesuffix(".float16").rpartition("_")[2])
        scales = (array(operand(scaled, 1)) * sum_scale).astype(np.float16)
        weight.replace_input_with(1, initializer(model.graph, f"{weight.name}/scales", ir.tensor(scales)))
        weight.attributes["axis"] = ir.AttrInt64("axis", 1)
        replace(scaled.outputs[0], wide.outputs[0])
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        for use in node.outputs[0].uses():
            use.node.replace_input_with(1, unit)
    ir_passes.RemoveUnusedNodesPass()(model)
    return dataclasses.replace(graph, model=model)

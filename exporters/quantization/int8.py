"""Quantizes an FP32 graph to INT8: weights per output channel, activations per tensor, dynamic or static.

    W[:, j] ~ scale[j] * Q[:, j],  Q int8 in -127 … 127;      x ~ scale * (q - zero point),  q uint8

There are two forms of the same arithmetic, because each engine runs only one of them as an integer GEMM:

* ONNX Runtime: QuantizeLinear or DynamicQuantizeLinear, once for all layers that share an input, and com.microsoft
  MatMulIntegerToFloat, which includes the bias;
* OpenVINO (and TensorRT): QuantizeLinear and DequantizeLinear on both operands of a MatMul.

The inputs are smoothed first, see the module `smoothing`. Word embeddings become int8 rows with one scale each.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as ir_passes

from gte_deploy.core.spec import Engine
from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    array,
    constant,
    initializer,
    operand,
    replace,
    scope_of,
)
from gte_deploy.exporters.graph.linear_layers import LinearLayer, find_linear_layers
from gte_deploy.exporters.quantization.calibration import Range
from gte_deploy.exporters.quantization.rounding import MAX_INT8, activation_scale, quantize_columns
from gte_deploy.exporters.quantization.smoothing import Sample, choose_smoothing, is_large, smooth

Activations = Literal["dynamic", "static"]

# CPUs without VNNI add pairs of products in 16 bits; with half the range they cannot overflow.
_MAX_INT8_REDUCED = 63


@dataclass(frozen=True)
class Int8Scheme:
    """Which layers are quantized and how. One scheme serves the graphs of all engines.

    Args:
        ranges: weight's name -> range of the layer's input on calibration texts, before smoothing.
        smoothing: weight's name -> divisors s [in] of the layer's input, float32.
        multiplied: weights in `smoothing` whose input needs a multiplication of its own.
        excluded: names of weights that stay FP32. They always include heads that see few rows, which take no time. A
            table of embeddings has the name of `table_name`.
        reduce_range: whether weights are in -63 … 63, for CPUs without VNNI.
    """

    ranges: Mapping[str, Range]
    smoothing: Mapping[str, NDArray[np.float32]]
    multiplied: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    reduce_range: bool = False

    def excluding(self, names: Collection[str]) -> "Int8Scheme":
        """The same scheme with these weights in FP32 as well. An FP32 layer needs no multiplication of its input."""
        excluded = self.excluded | frozenset(names)
        unneeded = self.multiplied & excluded
        smoothing = {name: s for name, s in self.smoothing.items() if name not in unneeded}
        return dataclasses.replace(self, smoothing=smoothing, excluded=excluded)


def int8_scheme(
    model: ir.Model, ranges: Mapping[str, Range], *, sample: Sample | None = None, reduce_range: bool = False
) -> Int8Scheme:
    """The scheme for a model, from any of its FP32 graphs; `sample` as in `choose_smoothing`."""
    smoothing = choose_smoothing(model, ranges, sample)
    return Int8Scheme(
        ranges=ranges,
        smoothing=smoothing.divisors,
        multiplied=smoothing.multiplied,
        excluded=frozenset(linear.name for linear in find_linear_layers(model) if not is_large(linear.name)),
        reduce_range=reduce_range,
    )


def table_name(table: ir.Value) -> str:
    """The name of a table of embeddings among excluded weights. A tied decoder has the name of the table itself."""
    return f"{table.name}.rows"


def quantize_int8(model: ir.Model, scheme: Int8Scheme, *, engine: Engine, activations: Activations) -> dict[str, int]:
    """Rewrite an FP32 graph in place; return the numbers of quantized and of FP32 linear layers and embeddings.

    OpenVINO's graph is always static, because the engine has no integer kernel for dynamic activations.
    """
    graph = model.graph
    smooth(model, scheme.smoothing)
    linears = find_linear_layers(model)
    chosen = [linear for linear in linears if linear.name not in scheme.excluded]
    for linear in chosen:
        build = Builder(graph, linear.node, scope_of(linear.node))
        product = _integer_product if engine == "onnxruntime" else _dequantized_product
        replace(linear.node.outputs[0], product(build, linear, scheme, activations))
    ir_passes.RemoveUnusedNodesPass()(model)  # nodes of a tied decoder would keep the FP32 embeddings alive
    embeddings = quantize_embeddings(graph, scheme.excluded)
    ir_passes.CommonSubexpressionEliminationPass()(model)  # layers that share an input quantize it once
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.TopologicalSortPass()(model)
    return {"int8_linears": len(chosen), "fp32_linears": len(linears) - len(chosen), "int8_embeddings": embeddings}


def _integer_product(build: Builder, linear: LinearLayer, scheme: Int8Scheme, activations: Activations) -> ir.Value:
    if activations == "dynamic":
        quantized, scale, zero = build.node("DynamicQuantizeLinear", [linear.x], outputs=3, dtype=ir.DataType.UINT8)
        scale.dtype = ir.DataType.FLOAT
    else:
        quantized, scale, zero = _quantized_input(build, linear, scheme)
    weight, weight_scale = _quantized_weight(build.graph, linear, scheme)
    inputs = [quantized, weight, scale, weight_scale, zero, None, linear.bias]
    return build.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)[0]


def _dequantized_product(build: Builder, linear: LinearLayer, scheme: Int8Scheme, activations: Activations) -> ir.Value:
    quantized, scale, zero = _quantized_input(build, linear, scheme)
    x = build.op("DequantizeLinear", quantized, scale, zero, name="input")
    weight = build.op("DequantizeLinear", *_quantized_weight(build.graph, linear, scheme), name="weight", axis=1)
    product = build.op("MatMul", x, weight)
    return product if linear.bias is None else build.op("Add", product, linear.bias)


def _quantized_input(build: Builder, linear: LinearLayer, scheme: Int8Scheme) -> tuple[ir.Value, ir.Value, ir.Value]:
    found, smoothing = scheme.ranges[linear.name], scheme.smoothing.get(linear.name, np.float32(1))
    scale, zero = activation_scale(float((found.low / smoothing).min()), float((found.high / smoothing).max()))
    name = f"{linear.x.name}/quantized"  # shared by all layers that take this input
    constants = (
        constant(build.graph, f"{name}.scale", np.array(scale)),
        constant(build.graph, f"{name}.zero", np.array(zero)),
    )
    quantized = build.op("QuantizeLinear", linear.x, *constants, name="quantized", dtype=ir.DataType.UINT8)
    return quantized, *constants


def _quantized_weight(graph: ir.Graph, linear: LinearLayer, scheme: Int8Scheme) -> tuple[ir.Value, ir.Value]:
    largest = _MAX_INT8_REDUCED if scheme.reduce_range else MAX_INT8
    quantized, scale = quantize_columns(linear.matrix(), largest)
    return (
        initializer(graph, f"{linear.name}.int8", ir.tensor(quantized)),
        initializer(graph, f"{linear.name}.scale", ir.tensor(scale)),
    )


def quantize_embeddings(graph: ir.Graph, excluded: Collection[str] = ()) -> int:
    """Quantize each embedding table [rows, H] that only one Gather reads, with one scale a row; return their number."""
    count = 0
    for node in embedding_lookups(graph):
        table, ids = operand(node, 0), operand(node, 1)
        if table.name in excluded or table_name(table) in excluded or len(table.uses()) > 1:
            continue
        quantized, scale = quantize_columns(array(table).T)
        build = Builder(graph, node, scope_of(node))
        rows = initializer(graph, f"{table.name}.rows.int8", ir.tensor(np.ascontiguousarray(quantized.T)))
        scales = initializer(graph, f"{table.name}.rows.scale", ir.tensor(scale[:, None]))
        gathered = build.op("Gather", rows, ids, name="int8_rows", dtype=ir.DataType.INT8)
        in_fp32 = build.op("Cast", gathered, name="rows", to=ir.DataType.FLOAT)
        replace(
            node.outputs[0], build.op("Mul", in_fp32, build.op("Gather", scales, ids, name="scales"), name="scaled")
        )
        count += 1
    return count


def embedding_lookups(graph: ir.Graph) -> list[ir.Node]:
    """The Gathers of rows of FP32 tables, without the few rows of token types, which would save nothing."""
    found = []
    for node in graph:
        if node.op_type == "Gather" and operand(node, 1).name != "token_type_ids":
            tensor = operand(node, 0).const_value
            is_table = tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT
            if is_table and node.attributes.get_int("axis") in (None, 0):
                found.append(node)
    return found

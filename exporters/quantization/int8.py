"""Quantizes an FP32 graph to INT8: weights per output channel, activations per tensor, dynamic or static.

    W[:, j] ~ scale[j] * Q[:, j],  Q int8 in -127 … 127;      x ~ scale * (q - zero point),  q uint8

There are two forms of the same arithmetic, because each engine runs only one of them as an integer GEMM:

* ONNX Runtime: QuantizeLinear or DynamicQuantizeLinear, once for all layers that share an input, and com.microsoft
  MatMulIntegerToFloat, which includes the bias;
* OpenVINO (and TensorRT): QuantizeLinear and DequantizeLinear on both operands of a MatMul.

In the gated MLP's product gelu(gate) * up, some channels are hundreds of times as large as the others, so one scale
does not fit all. Smoothing first evens the channels out (SmoothQuant, Xiao et al. 2023, eq. 4). It costs nothing at run
time:

    (up / s) · (s * down) = up · down,   s_j = max|x_j|^a / max|down_j|^(1 - a)

The weights of the up projection include the division. Word embeddings become int8 rows with one scale each.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as ir_passes

from gte_deploy.core.errors import ExportError
from gte_deploy.core.spec import Engine
from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    array,
    constant,
    initializer,
    is_in_layer,
    operand,
    replace,
    scope_of,
)
from gte_deploy.exporters.graph.linear_layers import LinearLayer, find_linear_layers, linear_layer_of
from gte_deploy.exporters.quantization.calibration import Range

Activations = Literal["dynamic", "static"]

SMOOTHING = 0.7
"""The exponent a. On gte-en-mlm-tiny 0.6 to 0.8 give similar results. Without smoothing, fill-mask's best answer is
PyTorch's in 94 % of the cases; with it, in 98 %."""

_MAX_INT8 = 127
# CPUs without VNNI add pairs of products in 16 bits; with half the range they cannot overflow.
_MAX_INT8_REDUCED = 63
_MIN_MAGNITUDE = 1e-5


@dataclass(frozen=True)
class Int8Scheme:
    """Which layers are quantized and how. One scheme serves the graphs of all engines.

    Args:
        ranges: weight's name -> range of the layer's input on calibration texts, before smoothing.
        smoothing: down projection's weight -> s [in], float32.
        excluded: names of weights that stay FP32. They always include heads that see few rows, which take no time.
        reduce_range: whether weights are in -63 … 63, for CPUs without VNNI.
    """

    ranges: Mapping[str, Range]
    smoothing: Mapping[str, NDArray[np.float32]]
    excluded: frozenset[str] = frozenset()
    reduce_range: bool = False

    def excluding(self, names: Collection[str]) -> "Int8Scheme":
        """The same scheme with these weights in FP32 as well."""
        return dataclasses.replace(self, excluded=self.excluded | frozenset(names))


def int8_scheme(model: ir.Model, ranges: Mapping[str, Range], *, reduce_range: bool = False) -> Int8Scheme:
    """The scheme for a model, from any of its FP32 graphs."""
    linears = find_linear_layers(model)
    return Int8Scheme(
        ranges=ranges,
        smoothing={
            down.name: _smoothing_scales(down.matrix(), ranges[down.name])
            for down in linears
            if _up_projection(down) is not None
        },
        excluded=frozenset(linear.name for linear in linears if not is_large(linear.name)),
        reduce_range=reduce_range,
    )


def is_large(weight: str) -> bool:
    """Whether this matrix belongs to a layer or to the vocabulary. Other matrices gain nothing from INT8."""
    return is_in_layer(weight) or "decoder" in weight


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


def smooth(model: ir.Model, smoothing: Mapping[str, NDArray[np.float32]]) -> None:
    """Even out the inputs of the down projections in `smoothing`, in place."""
    for down in find_linear_layers(model):
        if (scales := smoothing.get(down.name)) is not None:
            _smooth(down, scales)


def quantize_columns(matrix: NDArray[np.float32], largest: int = _MAX_INT8) -> tuple[np.ndarray, np.ndarray]:
    """Quantize [in, out] float32 to int8 of the same shape and scales [out] float32. A column of zeros has scale 1."""
    amax = np.abs(matrix).max(axis=0)
    scale = np.where(amax > 0, amax / largest, 1).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """The scale and zero point of uint8 for a range. The range is widened to include 0, so that 0 is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny)) if high > low else 1.0
    return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255))


def _smoothing_scales(matrix: NDArray[np.float32], found: Range) -> NDArray[np.float32]:
    input_amax = np.maximum(np.maximum(np.abs(found.low), np.abs(found.high)), _MIN_MAGNITUDE)
    weight_amax = np.maximum(np.abs(matrix).max(axis=1), _MIN_MAGNITUDE)
    scales = input_amax**SMOOTHING / weight_amax ** (1 - SMOOTHING)
    return (scales / np.exp(np.log(scales).mean())).astype(np.float32)


def _up_projection(down: LinearLayer) -> LinearLayer | None:
    """The up projection, whose output times the activated gate is the input of `down`; None without such a product."""
    value = down.x
    while (source := value.producer()) is not None and source.op_type == "Reshape":
        value = operand(source, 0)
    if source is None or source.op_type != "Mul":
        return None
    return next((up for side in source.inputs if side and (up := linear_layer_of(side.producer()))), None)


def _smooth(down: LinearLayer, scales: NDArray[np.float32]) -> None:
    up = _up_projection(down)
    if up is None or up.bias is not None:
        raise ExportError(
            f"{down.name} follows no gated unit in this graph, but it does in the graph that the scheme is for"
        )
    for linear, matrix in ((up, up.matrix() / scales), (down, down.matrix() * scales[:, None])):
        linear.weight.const_value = ir.tensor(matrix, name=linear.weight.name)


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
    largest = _MAX_INT8_REDUCED if scheme.reduce_range else _MAX_INT8
    quantized, scale = quantize_columns(linear.matrix(), largest)
    return (
        initializer(graph, f"{linear.name}.int8", ir.tensor(quantized)),
        initializer(graph, f"{linear.name}.scale", ir.tensor(scale)),
    )


def quantize_embeddings(graph: ir.Graph, excluded: Collection[str] = ()) -> int:
    """Quantize each embedding table [rows, H] that only one Gather reads, with one scale a row; return their number."""
    count = 0
    for node in [node for node in graph if node.op_type == "Gather"]:
        table, ids = operand(node, 0), operand(node, 1)
        tensor = table.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
            continue
        if table.name in excluded or len(table.uses()) > 1 or node.attributes.get_int("axis") not in (None, 0):
            continue
        if ids.name == "token_type_ids":  # the few rows of token types would save nothing
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

"""Evens out the channels of the inputs of linear layers, so that one 8-bit scale serves all channels.

A linear layer stays the same function when each channel of its input is divided by s and the row of its weight is
multiplied by s (SmoothQuant, Xiao et al. 2023, eq. 4):

    (x / s) · (s * W) = x · W,   s_j = max|x_j|^a / max|W_j|^(1 - a)

There are two cases:

* The input of a down projection is a gated product, gelu(gate) * up. The weights of the up projection include the
  division, which costs nothing at run time. Every down projection is smoothed.
* The other inputs are outputs of a LayerNorm or of attention. An own multiplication divides them, once for all layers
  with the same input. The output of the LayerNorm itself must not change, because the next residual sum needs it too.
  These inputs are smoothed only if they have outlier channels; other models pay nothing.

A model with outlier channels gets its exponent a for every input by measurement: the one with the smallest error of the
layer's output on sampled rows.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.exporters.graph.editing import Builder, initializer, is_in_layer, operand
from gte_deploy.exporters.graph.linear_layers import LinearLayer, find_linear_layers, linear_layer_of
from gte_deploy.exporters.quantization.calibration import Range
from gte_deploy.exporters.quantization.rounding import activation_scale, quantize_columns

Samples = Mapping[str, NDArray[np.float32]]
"""Weight's name -> rows of the layer's input, [rows, in]."""
Sample = Callable[[Collection[str]], Samples]
"""Returns sampled input rows of the layers with these weights."""

EXPONENT = 0.7
"""The exponent a of models without outlier channels. On gte-en-mlm-tiny 0.6 to 0.8 give similar results. Without
smoothing, fill-mask's best answer is PyTorch's in 94 % of the cases; with it, in 98 %."""
OUTLIER_RATIO = 8.0
"""An input has outlier channels if its largest channel is this many times the median channel. The inputs of the
built-in model's projections have ratios up to 3.2; the inputs of a model with two LayerNorm gammas × 20 have 20 to 200.
"""

_EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9)
_MIN_MAGNITUDE = 1e-5
_MAX_COLUMNS = 4096
"""The most columns of a weight, such as a vocabulary's, whose error is measured."""


@dataclass(frozen=True)
class Smoothing:
    """The smoothed layers of a model.

    Args:
        divisors: weight's name -> s [in] of the layer's input, float32.
        multiplied: the weights in `divisors` whose input needs a multiplication of its own.
    """

    divisors: Mapping[str, NDArray[np.float32]]
    multiplied: frozenset[str]


def is_large(weight: str) -> bool:
    """Whether this matrix belongs to a layer or to the vocabulary. Other matrices gain nothing from INT8."""
    return is_in_layer(weight) or "decoder" in weight


def outlier_ratio(found: Range) -> float:
    """The largest channel's magnitude over that of the median channel."""
    amax = np.maximum(found.amax, _MIN_MAGNITUDE)
    return float(amax.max() / np.median(amax))


def choose_smoothing(model: ir.Model, ranges: Mapping[str, Range], sample: Sample | None = None) -> Smoothing:
    """Choose the inputs to smooth and their divisors.

    Args:
        model: any FP32 graph of the model; it stays unchanged.
        ranges: weight's name -> range of the layer's input.
        sample: called only for a model with outlier channels. None takes `EXPONENT` for every input.
    """
    gated: list[list[LinearLayer]] = []
    outliers: list[list[LinearLayer]] = []
    for layers in _by_input(model):
        if up_projection(layers[0]) is not None:
            gated.append(layers)
        elif outlier_ratio(ranges[layers[0].name]) > OUTLIER_RATIO:
            outliers.append(layers)
    samples = sample([layers[0].name for layers in gated + outliers]) if sample and outliers else {}

    def divisors(groups: Sequence[Sequence[LinearLayer]]) -> dict[str, NDArray[np.float32]]:
        found = {}
        for layers in groups:
            name = layers[0].name
            s = _divisors(layers, ranges[name], samples.get(name))
            found.update({layer.name: s for layer in layers})
        return found

    multiplied = divisors(outliers)
    return Smoothing({**divisors(gated), **multiplied}, frozenset(multiplied))


def smooth(model: ir.Model, smoothing: Mapping[str, NDArray[np.float32]]) -> None:
    """Smooth the inputs of the layers in `smoothing` (weight's name -> s), in place."""
    divided: dict[ir.Value, ir.Value] = {}
    for layer in find_linear_layers(model):
        if (s := smoothing.get(layer.name)) is None:
            continue
        up = up_projection(layer)
        if up is not None:
            _set_matrix(model.graph, up, up.matrix() / s)
        else:
            if layer.x not in divided:
                divided[layer.x] = _divided(model.graph, layer, s)
            layer.node.replace_input_with(0, divided[layer.x])
        _set_matrix(model.graph, layer, layer.matrix() * s[:, None])


def up_projection(down: LinearLayer) -> LinearLayer | None:
    """The up projection, whose output times the activated gate is the input of `down`.

    None without such a product, and for an up projection with a bias, which could not be divided with its weight.
    """
    value = down.x
    while (source := value.producer()) is not None and source.op_type == "Reshape":
        value = operand(source, 0)
    if source is None or source.op_type != "Mul":
        return None
    up = next((up for side in source.inputs if side and (up := linear_layer_of(side.producer()))), None)
    return None if up is None or up.bias is not None else up


def _by_input(model: ir.Model) -> list[list[LinearLayer]]:
    """The large linear layers, those with the same input together."""
    groups: dict[ir.Value, list[LinearLayer]] = {}
    for layer in find_linear_layers(model):
        if is_large(layer.name):
            groups.setdefault(layer.x, []).append(layer)
    return list(groups.values())


def _divisors(layers: Sequence[LinearLayer], found: Range, rows: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The divisors s [in] with the best exponent for these rows [rows, in]; with `EXPONENT` if there are none."""
    weight_amax = np.max([np.abs(layer.matrix()).max(axis=1) for layer in layers], axis=0)
    weight_amax = np.maximum(weight_amax, _MIN_MAGNITUDE)
    input_amax = np.maximum(found.amax, _MIN_MAGNITUDE)

    def with_exponent(exponent: float) -> NDArray[np.float32]:
        s = input_amax**exponent / weight_amax ** (1 - exponent)
        return (s / np.exp(np.log(s).mean())).astype(np.float32)

    if rows is None:
        return with_exponent(EXPONENT)
    matrix = np.concatenate([layer.matrix() for layer in layers], axis=1)
    matrix = matrix[:, :: -(-matrix.shape[1] // _MAX_COLUMNS)]
    candidates = [with_exponent(exponent) for exponent in _EXPONENTS]
    return min(candidates, key=lambda s: _error(rows, matrix, found, s))


def _error(rows: NDArray[np.float32], matrix: NDArray[np.float32], found: Range, s: NDArray[np.float32]) -> float:
    """The squared error of rows [rows, in] · matrix [in, out] with both in 8 bits, smoothed by s [in]."""
    scale, zero = activation_scale(float((found.low / s).min()), float((found.high / s).max()))
    x = (np.clip(np.rint(rows / s / scale) + zero, 0, 255) - zero) * scale
    quantized, scales = quantize_columns(matrix * s[:, None])
    return float(np.square(x @ (quantized * scales) - rows @ matrix).sum())


def _divided(graph: ir.Graph, layer: LinearLayer, s: NDArray[np.float32]) -> ir.Value:
    reciprocal = initializer(graph, f"{layer.x.name}/smoothing", ir.tensor((1 / s).astype(np.float32)))
    return Builder(graph, layer.node, str(layer.x.name)).op("Mul", layer.x, reciprocal, name="smoothed")


def _set_matrix(graph: ir.Graph, layer: LinearLayer, matrix: np.ndarray) -> None:
    """Set the matrix [in, out] of a layer. A matrix that is also read elsewhere, such as the embeddings, is copied."""
    weight = layer.weight
    stored = np.ascontiguousarray(matrix.T if layer.transposed else matrix)
    if len(weight.uses()) == 1:
        weight.const_value = ir.tensor(stored, name=weight.name)
        return
    # The two names that `LinearLayer.name` takes for the same weight.
    name = f"{layer.name}.T" if weight.name == layer.name else layer.name
    layer.node.replace_input_with(1, initializer(graph, name, ir.tensor(stored, name=name)))

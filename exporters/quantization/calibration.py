"""Measures the input range of every linear layer on real text, with the FP32 graph in ONNX Runtime."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph, save_graph
from gte_deploy.exporters.graph.editing import integers
from gte_deploy.exporters.graph.linear_layers import find_linear_layers

Calibrator = Literal["max", "percentile", "entropy"]

_PERCENTILE = 0.9999
_BINS = 2048
_LEVELS = 128
_SAMPLED_ROWS = 512


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of each channel of a tensor, both [channels] float32."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @property
    def amax(self) -> NDArray[np.float32]:
        """The largest magnitude of each channel, [channels]."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def measure_ranges(graph: Graph, spec: ModelSpec, batches: Sequence[Batch]) -> dict[str, Range]:
    """Run `batches` through the FP32 `graph`; return weight's name -> range of the linear layer's input.

    Padding counts as well, because a quantized graph also computes it.
    """
    model = graph.model.clone()
    linears = find_linear_layers(model)
    inputs = {linear.name: linear.x for linear in linears}
    widths = {linear.x: linear.matrix().shape[0] for linear in linears}
    outputs = {x: _range_outputs(model.graph, x, channels) for x, channels in widths.items()}
    found: dict[ir.Value, Range] = {}
    with running(dataclasses.replace(graph, model=model), spec) as backend:
        for batch in batches:
            values = backend.run(batch, [name for pair in outputs.values() for name in pair])
            for value, (low, high) in outputs.items():
                before = found.get(value, Range(values[low], values[high]))
                found[value] = Range(np.minimum(before.low, values[low]), np.maximum(before.high, values[high]))
    return {name: found[value] for name, value in inputs.items()}


def _range_outputs(graph: ir.Graph, value: ir.Value, channels: int) -> tuple[str, str]:
    """Add outputs with the smallest and largest value of each channel of `value`; return their names."""
    rows = ir.node("Reshape", [value, integers(graph, -1, channels)], name=f"{value.name}/rows")
    graph.append(rows)
    names = []
    for operator in ("ReduceMin", "ReduceMax"):
        node = ir.node(
            operator, [rows.outputs[0], integers(graph, 0)], {"keepdims": 0}, name=f"{value.name}/{operator}"
        )
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.FLOAT
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        names.append(str(node.name))
    return names[0], names[1]


def sample_rows(
    graph: Graph, spec: ModelSpec, batches: Sequence[Batch], names: Collection[str]
) -> dict[str, NDArray[np.float32]]:
    """Weight's name -> about `_SAMPLED_ROWS` rows [rows, in] of the linear layer's input, spread over all batches."""
    share = _SAMPLED_ROWS / max(1, sum(batch.input_ids.size for batch in batches))
    found: dict[str, list[NDArray[np.float32]]] = {}
    for name, values in _input_values(graph, spec, batches, names):
        rows = values.reshape(-1, values.shape[-1])
        kept = np.linspace(0, len(rows) - 1, max(1, round(len(rows) * share))).astype(np.int64)
        found.setdefault(name, []).append(rows[kept])
    return {name: np.concatenate(rows) for name, rows in found.items()}


def _input_values(
    graph: Graph, spec: ModelSpec, batches: Sequence[Batch], names: Collection[str]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield, for each batch, each weight's name in `names` and the input [..., in] of its linear layer."""
    model = graph.model.clone()
    inputs = {linear.name: linear.x for linear in find_linear_layers(model) if linear.name in names}
    for value in dict.fromkeys(inputs.values()):
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    with running(dataclasses.replace(graph, model=model), spec) as backend:
        for batch in batches:
            values = backend.run(batch, list(dict.fromkeys(str(value.name) for value in inputs.values())))
            yield from ((name, values[str(value.name)]) for name, value in inputs.items())


def measure_amax(
    graph: Graph,
    spec: ModelSpec,
    batches: Sequence[Batch],
    ranges: Mapping[str, Range],
    *,
    smoothing: Mapping[str, NDArray[np.float32]],
    calibrator: Calibrator,
) -> dict[str, float]:
    """Weight's name -> amax: the magnitude above which the linear layer's input is clipped, after smoothing.

    Args:
        graph: the FP32 graph whose `ranges` were measured.
        spec: the facts about the model.
        batches: the batches of `measure_ranges`.
        ranges: the ranges of the linear layers to quantize.
        smoothing: weight's name -> divisor of its input, [channels].
        calibrator: "max" clips no measured value; "percentile" clips one value in ten thousand; "entropy" clips where
            the distribution over 128 levels diverges least from the measured one, as TensorRT's calibrator did.
    """
    one = np.float32(1)
    amax = {name: float((found.amax / smoothing.get(name, one)).max()) for name, found in ranges.items()}
    if calibrator == "max":
        return amax
    histograms = _histograms(graph, spec, batches, amax, smoothing)
    share_of = _percentile if calibrator == "percentile" else _least_divergence
    return {name: amax[name] * share_of(histogram) for name, histogram in histograms.items()}


def _histograms(
    graph: Graph,
    spec: ModelSpec,
    batches: Sequence[Batch],
    amax: Mapping[str, float],
    smoothing: Mapping[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.int64]]:
    """Weight's name -> histogram of the magnitudes of its input, in `_BINS` bins over 0 … amax."""
    found = {name: np.zeros(_BINS, np.int64) for name in amax}
    for name, values in _input_values(graph, spec, batches, amax):
        magnitudes = np.abs(values)
        if name in smoothing:
            magnitudes = magnitudes / smoothing[name]
        found[name] += np.histogram(magnitudes, _BINS, (0, amax[name] or 1))[0]
    return found


def _percentile(histogram: NDArray[np.int64]) -> float:
    total = np.cumsum(histogram)
    return float(np.searchsorted(total, total[-1] * _PERCENTILE) + 1) / _BINS


def _least_divergence(histogram: NDArray[np.int64]) -> float:
    """The share of the range whose distribution over 128 levels diverges least from the measured one.

    See Migacz, 8-bit inference with TensorRT, 2017. The first bin does not count, because zeros are exact at any scale.
    """
    counts = histogram.astype(np.float64)
    counts[0] = 0
    best, least = _BINS, np.inf
    for bins in range(_LEVELS, _BINS + 1, _LEVELS // 16):
        clipped = counts[:bins].copy()
        clipped[-1] += counts[bins:].sum()
        level = np.arange(bins) * _LEVELS // bins
        nonempty = counts[:bins] > 0
        sums = np.bincount(level, counts[:bins], _LEVELS)
        sizes = np.bincount(level, nonempty, _LEVELS)
        quantized = np.where(nonempty, (sums / np.maximum(sizes, 1))[level], 0)
        if clipped.sum() == 0 or quantized.sum() == 0:
            continue
        p, q = clipped / clipped.sum(), quantized / quantized.sum()
        if np.any((p > 0) & (q == 0)):
            continue  # all clipped values would fall into an empty bin
        inside = p > 0
        divergence = float((p[inside] * np.log(p[inside] / q[inside])).sum())
        if divergence < least:
            best, least = bins, divergence
    return best / _BINS


@contextlib.contextmanager
def running(graph: Graph, spec: ModelSpec) -> Iterator[OnnxBackend]:
    """Open the graph in ONNX Runtime from a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_graph(graph, file)
        with contextlib.closing(OnnxBackend(file, spec)) as backend:
            yield backend

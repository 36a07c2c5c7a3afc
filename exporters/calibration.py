"""The range of every linear layer's input over real text, measured on the FP32 graph by ONNX Runtime."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.onnx_backend import OnnxBackend
from gte_deploy.exporters.fusion.editing import integers
from gte_deploy.exporters.graph import Graph, save_graph
from gte_deploy.exporters.linears import find_linears
from gte_deploy.spec import ModelSpec


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of each channel of one tensor, both [channels] float32."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


def measure_ranges(graph: Graph, spec: ModelSpec, batches: Sequence[Batch]) -> dict[str, Range]:
    """Run `batches` through the FP32 `graph`; weight's name -> range of what the linear layer takes.

    Padding counts as well: a graph that is quantized per tensor meets it too.
    """
    model = graph.model.clone()
    linears = find_linears(model)
    inputs = {linear.name: linear.x for linear in linears}
    widths = {linear.x: linear.matrix().shape[0] for linear in linears}
    outputs = {x: _range_outputs(model.graph, x, channels) for x, channels in widths.items()}
    found: dict[ir.Value, Range] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranges.onnx"
        save_graph(dataclasses.replace(graph, model=model), file)
        with contextlib.closing(OnnxBackend(file, spec)) as backend:
            for batch in batches:
                values = backend.run(batch, [name for pair in outputs.values() for name in pair])
                for value, (low, high) in outputs.items():
                    before = found.get(value, Range(values[low], values[high]))
                    found[value] = Range(np.minimum(before.low, values[low]), np.maximum(before.high, values[high]))
    return {name: found[value] for name, value in inputs.items()}


def _range_outputs(graph: ir.Graph, value: ir.Value, channels: int) -> tuple[str, str]:
    """Add the smallest and the largest of each channel of `value` to the outputs; their names."""
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

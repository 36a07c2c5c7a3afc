"""The emulation of half precision on a CPU: ONNX Runtime must keep every rounding, overflow included."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

import numpy as np  # noqa: E402
import onnxruntime as ort  # noqa: E402

from gte_deploy.exporters.graph.build import graph_of  # noqa: E402
from gte_deploy.exporters.verification.emulation import cpu_emulation  # noqa: E402

FP32, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
# ORT_DISABLE_ALL is the level that the project uses on a CPU; more optimization must not remove a rounding either.
LEVELS = [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]


def two_operators(dtype: ir.DataType, first: str, second: str) -> ir.Model:
    """A graph that computes (a `first` b) `second` c of FP32 inputs [1] in `dtype`; the result y is FP32."""
    inputs = [ir.Value(name=name, type=ir.TensorType(FP32), shape=ir.Shape([1])) for name in "abc"]
    nodes = [ir.node("Cast", [value], {"to": dtype}) for value in inputs]
    a, b, c = (node.outputs[0] for node in nodes)
    nodes.append(ir.node(first, [a, b]))
    nodes.append(ir.node(second, [nodes[-1].outputs[0], c]))
    for node in nodes:
        node.outputs[0].dtype = dtype
    nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": FP32}))
    result = nodes[-1].outputs[0]
    result.name, result.dtype, result.shape = "y", FP32, ir.Shape([1])
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports={"": 20}, name="two")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, level: ort.GraphOptimizationLevel, *numbers: float) -> float:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: np.array([number], np.float32) for name, number in zip("abc", numbers, strict=True)}
    return float(session.run(["y"], feed)[0][0])


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "operators", "numbers", "expected"),
    [
        (FP16, ("Mul", "Div"), (300, 300, 300), np.inf),
        (FP16, ("Add", "Sub"), (1000, 0.1, 1000), 0),
        (BF16, ("Mul", "Div"), (300, 300, 300), 300),
        (BF16, ("Add", "Sub"), (1000, 0.1, 1000), 0),
        (BF16, ("Mul", "Div"), (3e38, 3, 3), np.inf),
    ],
)
def test_every_rounding_is_kept(level, dtype, operators, numbers, expected):
    emulation = cpu_emulation(graph_of(two_operators(dtype, *operators), {}, 20))
    assert run(emulation.model, level, *numbers) == expected


def test_onnx_runtime_alone_leaves_roundings_out():
    """If this fails, ONNX Runtime has learned to compute in FP16, and the emulation may be simplified."""
    assert run(two_operators(FP16, "Mul", "Div"), LEVELS[0], 300, 300, 300) == 300

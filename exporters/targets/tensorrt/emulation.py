"""Emulates a TensorRT engine on the CPU: ONNX Runtime runs the graph that TensorRT compiles, with its roundings.

The export compares this emulation with PyTorch. ONNX Runtime alone would not show an overflow: on a CPU it computes
FP16 nodes in FP32 and leaves out the roundings between them, so 300 · 300 / 300 "in FP16" is 300, not infinite. It has
no kernels for BF16. So the emulation rewrites a copy of the graph, in up to three steps:

* `engine_arithmetic` multiplies the 8-bit values themselves, rounds each sum to the type in which the engine's GEMM
  stores it, and makes every 16-bit tensor an FP32 tensor that is rounded to 16 bits after each operator.
* `EmulatedOnnx` computes attention one head after the other, for inputs whose scores would not fit into memory.
* ONNX Runtime has no TRT_Attention. In a padding-free graph, `packed_emulation` replaces it by the computation that
  TensorRT's documentation describes; the same code packs the batches as for an engine.

An engine may round less than the emulation: it computes attention, and each chain of elementwise operators, in one
kernel, whose inner values may be in FP32.

Shapes: B rows, S tokens, N heads, D head size; in a padding-free graph, T tokens of all rows.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as ir_passes

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.padding_free import PaddingFreeLayout
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.spec import ModelSpec, Profile
from gte_deploy.exporters.graph.build import Graph, save_graph
from gte_deploy.exporters.graph.editing import (
    CONTRIB,
    Builder,
    array,
    constant,
    initializer,
    integers,
    operand,
    replace,
    scope_of,
)
from gte_deploy.exporters.graph.linear_layers import is_quantized
from gte_deploy.exporters.targets.tensorrt.padding_free import TRT_ATTENTION
from gte_deploy.exporters.targets.tensorrt.profiles import mask_profile
from gte_deploy.exporters.verification.emulated_onnx import EmulatedOnnx
from gte_deploy.exporters.verification.emulation import cpu_emulation


class PaddedOnnx(EmulatedOnnx):
    """Runs a padded graph for TensorRT in ONNX Runtime, in the form that each batch needs."""

    def __init__(self, graph: Graph, spec: ModelSpec, *, num_heads: int) -> None:
        """Open the emulation of `graph`."""
        super().__init__(engine_arithmetic(graph), spec, num_heads=num_heads)


def engine_arithmetic(graph: Graph) -> Graph:
    """Return a copy of `graph` that computes on the CPU like TensorRT's kernels, overflow included."""
    model = graph.model.clone()
    for node in [node for node in model.graph if is_quantized(node)]:
        _multiply_eight_bits(model.graph, node)
    ir_passes.RemoveUnusedNodesPass()(model)
    return cpu_emulation(dataclasses.replace(graph, model=model))


def _multiply_eight_bits(graph: ir.Graph, product: ir.Node) -> None:
    """Sum the products of the 8-bit values in FP32, and store the sums in the type of the MatMul `product`.

    The kernel multiplies its sums by one FP32 number before it stores them. With a scale for each output that number is
    1, and the next kernel multiplies by the scales; so it is for GEMMs with different scales that are joined because
    they have the same input. The listings of engines that TensorRT-RTX 1.7 built show both.
    """
    build = Builder(graph, product, scope_of(product))
    dtype = _dtype(product.outputs[0])
    x, weight = (_dequantization(product, i) for i in (0, 1))
    joined = [use.node for use in x.outputs[0].uses() if is_quantized(use.node)]
    has_one_scale = len({array(operand(_dequantization(node, 1), 1)).tobytes() for node in joined}) == 1
    scale = array(operand(x, 1)).astype(np.float32) * array(operand(weight, 1)).astype(np.float32)
    is_scaled = scale.size == 1 and has_one_scale
    kind = ir.DataType.FLOAT if is_scaled else dtype
    scales = initializer(graph, f"{build.scope}/scales", ir.tensor(scale.astype(kind.numpy())))
    values = [build.op("Cast", operand(node, 0), to=ir.DataType.FLOAT) for node in (x, weight)]
    sums = build.op("MatMul", *values, name="sums", dtype=kind)
    stored = build.op("Mul", sums, scales, name="stored", dtype=dtype)
    replace(product.outputs[0], stored)


def _dequantization(product: ir.Node, index: int) -> ir.Node:
    """The DequantizeLinear of an operand of an 8-bit GEMM."""
    node = operand(product, index).producer()
    assert node is not None
    return node


class PaddingFreeOnnx:
    """Runs a padding-free graph for TensorRT in ONNX Runtime, with batches packed as for an engine."""

    def __init__(self, graph: Graph, spec: ModelSpec, *, profiles: Sequence[Profile], num_heads: int) -> None:
        """Open the emulation of `graph`, for batches in these profiles."""
        import onnxruntime

        self._spec, self._profiles = spec, profiles
        self._layout = PaddingFreeLayout({tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)})
        self._dtypes = {tensor.name: tensor.dtype for tensor in graph.inputs}
        masks = "mask_positions" in self._dtypes
        ends = [mask_profile(profile) for profile in profiles]
        self._masks = [(fewest, most) for fewest, _, most in ends] if masks else None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cpus()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_pattern = False
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "packed.onnx"
            save_graph(packed_emulation(graph, num_heads=num_heads), file)
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        results = self._layout.results(batch, outputs)
        for sub_batch in self._layout.split(batch, self._profiles, self._masks):
            shapes = self._layout.shapes(sub_batch.shape, sub_batch.num_masks)
            feed = {name: np.empty(shapes[name], dtype) for name, dtype in self._dtypes.items()}
            self._layout.write(batch, sub_batch, feed, pad_token_id=self._spec.pad_token_id)
            for name, values in zip(outputs, self._session.run(list(outputs), feed), strict=True):
                self._layout.place(name, values, sub_batch, results[name])
        return results

    def close(self) -> None:
        """Close the session."""
        self._session = None


def packed_emulation(graph: Graph, *, num_heads: int) -> Graph:
    """The `engine_arithmetic` of a padding-free graph, with attention computed text by text."""
    emulation = engine_arithmetic(graph)
    model = emulation.model
    for node in [node for node in model.graph if node.op_type == TRT_ATTENTION]:
        replace(node.outputs[0], _text_by_text(Builder(model.graph, node, scope_of(node)), node, num_heads))
    for clean in (ir_passes.RemoveUnusedNodesPass(), ir_passes.NameFixPass()):
        clean(model)
    return emulation


def _text_by_text(build: Builder, node: ir.Node, num_heads: int) -> ir.Value:
    """Replace TRT_Attention(q, k, v [T, N, D], …, query_lengths, kv_lengths [B + 1]) by a Loop over the texts."""
    graph = build.graph
    int64, int32, scalar = ir.DataType.INT64, ir.DataType.INT32, ir.Shape(())
    index = ir.Value(name=f"{node.name}/index", type=ir.TensorType(int64), shape=scalar)
    keep = ir.Value(name=f"{node.name}/keep", type=ir.TensorType(ir.DataType.BOOL), shape=scalar)
    previous = ir.Value(name=f"{node.name}/previous", type=ir.TensorType(ir.DataType.FLOAT))
    next_keep = ir.node("Identity", [keep], name=f"{node.name}/next_keep")
    body = ir.Graph([index, keep, previous], [*next_keep.outputs], nodes=[next_keep], name=f"{node.name}/text")
    text = Builder(body, next_keep, f"{node.name}/text")
    zero, one = (integers(graph, n) for n in (0, 1))
    axis = constant(graph, "int32_0", np.zeros(1, np.int32))
    begin = text.op("Unsqueeze", index, zero, name="begin", dtype=int64)
    end = text.op("Add", begin, one, name="end", dtype=int64)
    parts = []
    for name, tensor, lengths in (("query", 0, 4), ("key", 1, 5), ("value", 2, 5)):  # operands of TRT_Attention
        limits = operand(node, lengths)
        bounds = [text.op("Gather", limits, i, name=f"{name}_bound", dtype=int32) for i in (begin, end)]
        parts.append(text.op("Slice", operand(node, tensor), *bounds, axis, name=name))
    rows = [text.op("Unsqueeze", text.op("Flatten", part, axis=1), zero) for part in parts]
    attended = text.op("MultiHeadAttention", *rows, domain=CONTRIB, num_heads=num_heads, scale=1.0)
    split = text.op("Reshape", attended, text.op("Shape", parts[0], dtype=int64))
    body.outputs.append(text.op("Concat", previous, split, axis=0))
    graph.opset_imports.setdefault(CONTRIB, 1)
    count = build.op("Sub", build.op("Size", operand(node, 4), dtype=int64), one, dtype=int64)
    empty = build.op("Slice", operand(node, 0), zero, zero, zero)
    return build.op("Loop", count, constant(graph, "true", np.array(True)), empty, name="texts", body=body)


def _dtype(value: ir.Value | None) -> ir.DataType:
    assert value is not None and value.dtype is not None
    return value.dtype

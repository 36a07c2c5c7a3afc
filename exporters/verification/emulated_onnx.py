"""Runs emulated graphs in ONNX Runtime on the CPU, attention head by head where its scores would not fit into memory.

Shapes: B rows, S tokens, N heads.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as ir_passes

from gte_deploy.backends.base import Batch
from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.core.errors import ExportError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph, save_graph
from gte_deploy.exporters.graph.editing import Builder, integers, operand, replace, scope_of

_MAX_SCORES = 1 << 27
"""The most scores, B · N · S · S, of one run. ONNX Runtime holds about five FP32 and FP16 copies of them at once."""

_ROUNDINGS = frozenset(("Cast", "QuantizeLinear", "DequantizeLinear"))


class EmulatedOnnx:
    """Runs an emulation in ONNX Runtime, as a whole or with attention head by head, as the size of each batch needs."""

    def __init__(self, emulation: Graph, spec: ModelSpec, *, num_heads: int) -> None:
        """Open `emulation`, a padded graph that a CPU computes; see `gte_deploy.exporters.verification.emulation`."""
        self._num_heads, self._spec = num_heads, spec
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._graph = emulation
        self._whole = self._open(self._save("whole.onnx", self._graph))
        self._by_head: OnnxBackend | None = None

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        rows, length = batch.input_ids.shape
        if rows * self._num_heads * length**2 <= _MAX_SCORES:
            return self._whole.run(batch, outputs)
        if self._by_head is None:
            self._by_head = self._open(self._save("by_head.onnx", head_by_head(self._graph)))
        return self._by_head.run(batch, outputs)

    def close(self) -> None:
        """Close the sessions and delete their files."""
        self._stack.close()

    def _save(self, name: str, graph: Graph) -> Path:
        save_graph(graph, self._folder / name)
        return self._folder / name

    def _open(self, file: Path) -> OnnxBackend:
        return self._stack.enter_context(contextlib.closing(OnnxBackend(file, self._spec)))


def head_by_head(graph: Graph) -> Graph:
    """The same graph with the MatMul, Mul, Add, Softmax and MatMul of each attention in a Scan over the heads."""
    model = graph.model.clone()
    ir_passes.ShapeInferencePass()(model)  # tells masks and factors of all heads from those with an axis of heads
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        _scan_heads(model.graph, softmax)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.TopologicalSortPass()(model)
    return dataclasses.replace(graph, model=model)


def _scan_heads(graph: ir.Graph, softmax: ir.Node) -> None:
    """Rewrite softmax(q·k * scale + bias)·v on [B, N, …] to the same nodes on [B, …], one head after the other."""
    chain = [_last_product(softmax)]
    while chain[-1] is chain[0] or chain[-1].op_type != "MatMul":
        chain.append(_producer_of_scores(chain[-1]))
    chain.reverse()
    first, last = chain[0], chain[-1]
    build = Builder(graph, last, scope_of(last))
    sliced = [operand(first, 0), operand(first, 1), operand(last, 1)]
    others = dict.fromkeys(value for node in chain for value in node.inputs if value is not None)
    sliced += [value for value in others if _differs_by_head(value, chain)]
    inside = {value: ir.Value(name=f"{value.name}/head", type=value.type) for value in sliced}
    mapped = dict(inside)  # value of the graph -> its value for one head
    body = []
    for node in chain:
        inputs = [mapped.get(value, value) if value is not None else None for value in node.inputs]
        if node.op_type in ("Add", "Mul"):  # the mask, [B, 1, 1, S] -> [B, 1, S]
            inputs = [
                value
                if value in mapped.values() or _is_scalar(value)
                else build.op("Squeeze", value, integers(graph, 1), dtype=_dtype(value))
                for value in inputs
            ]
        copy = ir.Node("", node.op_type, inputs, node.attributes.values(), num_outputs=1, name=f"{node.name}/head")
        copy.outputs[0].name, copy.outputs[0].dtype = f"{node.outputs[0].name}/head", _dtype(node.outputs[0])
        mapped[node.outputs[0]] = copy.outputs[0]
        body.append(copy)
    one_head = ir.Graph(list(inside.values()), [mapped[last.outputs[0]]], nodes=body, name=f"{build.scope}/one_head")
    attended = build.op(
        "Scan",
        *sliced,
        name="heads",
        dtype=_dtype(last.outputs[0]),
        body=one_head,
        num_scan_inputs=len(sliced),
        scan_input_axes=[1] * len(sliced),
        scan_output_axes=[1],
    )
    replace(last.outputs[0], attended)


def _differs_by_head(value: ir.Value, chain: Sequence[ir.Node]) -> bool:
    """Whether `value` is an operand that a node of the chain adds or multiplies, with more than one head on axis 1."""
    if value.producer() in chain or value.shape is None or len(value.shape) != 4:
        return False
    return value.shape[1] != 1 and any(use.node in chain and use.node.op_type in ("Add", "Mul") for use in value.uses())


def _is_scalar(value: ir.Value | None) -> bool:
    return value is None or (value.shape is not None and value.shape.rank() == 0)


def _last_product(softmax: ir.Node) -> ir.Node:
    """The MatMul of attention weights and values; in an emulated graph it follows the rounding of the weights."""
    node = softmax
    while node.op_type != "MatMul":
        ((node, _),) = node.outputs[0].uses()
    return node


def _producer_of_scores(node: ir.Node) -> ir.Node:
    """The node before `node` on the path from q·k. The other inputs of `node` are constants or the mask."""
    candidates = node.inputs[:1] if node.op_type == "MatMul" else node.inputs
    for value in candidates:
        before = source = None if value is None else value.producer()
        while source is not None and source.op_type in _ROUNDINGS:
            source = operand(source, 0).producer()
        if before is not None and source is not None and source.op_type in ("MatMul", "Mul", "Add", "Softmax"):
            return before
    raise ExportError(f"{node.name} is not part of softmax(q·k * scale + mask)·v")


def _dtype(value: ir.Value | None) -> ir.DataType:
    assert value is not None and value.dtype is not None
    return value.dtype

"""Builds the ONNX graphs of a bundle, one for each engine, and writes them with one weights file that they share.

Inputs, all int64: `input_ids` and `attention_mask` [batch, sequence]. Fill-mask also has `mask_positions`
[num_masks, 2], pairs of (row, token), which may be empty. Graphs with token types also have `token_type_ids`
[batch, sequence].

Outputs, float32, in the order of `Task.outputs`: `last_hidden_state` [batch, sequence, hidden], and
`sentence_embedding` [batch, embedding] (embed, after any Dense modules) or `logits`: [num_masks, vocabulary]
(fill-mask), [batch, sequence, vocabulary] (fill-mask with all logits), [batch, labels] (classify),
[batch, sequence, labels] (token-classify); or `sparse_embedding` [batch, vocabulary] (sparse), pooled and activated;
or `sentence_embedding` and `token_weights` [batch, sequence, 1] (hybrid).
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from gte_deploy.core.files import sync_directory, sync_file
from gte_deploy.core.spec import Engine, SparseSpec, TensorSpec
from gte_deploy.exporters.graph.editing import dimensions, tensor_of
from gte_deploy.exporters.graph.fusion import STANDARD_PASSES, fuse_graph
from gte_deploy.exporters.graph.trace import trace
from gte_deploy.models.families import fusion_sites

DEFAULT_OPSET = 20

# Smaller tensors stay in the graph file, because ONNX Runtime infers shapes only from tensors there.
_MIN_EXTERNAL_BYTES = 256
_ALIGNMENT = 4096
"""Bytes. Each tensor begins on a page, so that engines can map it."""


@dataclass(frozen=True)
class Graph:
    """A graph for one engine, with a description of its inputs and outputs.

    Args:
        model: the graph with its weights as initialisers; they may be views of the PyTorch model's parameters.
        fusions: fusion pass -> number of matches, in the order of the passes; empty for a graph of standard operators.
        opset: the version of the standard operators.
        inputs: the inputs, in graph order.
        outputs: the outputs, in graph order.
    """

    model: ir.Model
    fusions: dict[str, int]
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build_graphs(
    model: PreTrainedModel,
    *,
    task: str,
    max_length: int,
    pooling: str | None = None,
    logits: str = "masked",
    opset: int = DEFAULT_OPSET,
    token_types: bool = False,
    sparse: SparseSpec | None = None,
) -> dict[Engine, Graph]:
    """Trace `model` once, and build a graph for each engine; the graphs share the model's weights.

    ONNX Runtime gets the fused graph. OpenVINO gets standard operators with explicit attention, because its own fusions
    are better: one text of 8,192 tokens takes 25 s and 1.9 GB with the base model; the fused graph takes 31 s and
    2.6 GB. Targets for OpenVINO rewrite it once more, see `openvino_graph`.

    Args:
        model: a float32 model of the task's class; its state is restored after the trace, see `trace`.
        task: one of gte_deploy.core.spec.TASK_NAMES.
        max_length: the longest sequence that the graphs take, at most the model's max_position_embeddings.
        pooling: "mean" or "cls", for embed and hybrid.
        logits: "masked" or "all", for fill-mask.
        opset: the version of the standard operators.
        token_types: whether the graphs have the input `token_type_ids`; without it, every token has type 0.
        sparse: how embeddings are pooled, for sparse and hybrid.

    Raises:
        ExportError: the model does not support an argument, or a fusion pass did not match as often as it must.
    """
    plain = trace(
        model,
        task=task,
        max_length=max_length,
        pooling=pooling,
        logits=logits,
        opset=opset,
        token_types=token_types,
        sparse=sparse,
    )
    fused = plain.clone()
    fusions = fuse_graph(fused, sites=fusion_sites(model))
    return {"onnxruntime": graph_of(fused, fusions, opset), "openvino": graph_of(plain, {}, opset)}


def openvino_graph(plain: Graph, sites: Mapping[str, int]) -> Graph:
    """The graph that OpenVINO runs: a copy of the plain graph with `STANDARD_PASSES`, or `plain` if none has sites.

    Args:
        plain: the graph of standard operators, see `build_graphs`.
        sites: how often each fusion pass must fire.

    Raises:
        ExportError: a pass did not match as often as it must.
    """
    if not any(each.name in sites for each in STANDARD_PASSES):
        return plain
    model = plain.model.clone()
    return graph_of(model, fuse_graph(model, sites=sites, passes=STANDARD_PASSES), plain.opset)


def save_graph(graph: Graph, path: Path) -> list[Path]:
    """Write one graph to `path` and its weights to `path`_data; return the files. See `save_graphs`."""
    return save_graphs({path: graph}, path.with_name(f"{path.name}_data"))


def save_graphs(graphs: Mapping[Path, Graph], data: Path) -> list[Path]:
    """Write each graph to its path, and the weights of all graphs to `data` in the same folder; return the files.

    Equal weights are written once. Each file is written to a temporary folder, synced and renamed. The same graphs give
    the same bytes.
    """
    with tempfile.TemporaryDirectory(dir=data.parent, prefix=f".{data.name}.", suffix=".tmp") as temporary:
        store = _WeightStore(Path(temporary) / data.name)
        with store.path.open("wb") as file:
            models = {path.name: _with_external_weights(graph.model, store, file) for path, graph in graphs.items()}
        for name, model in models.items():
            ir.save(model, Path(temporary) / name)
        written = [data, *graphs]  # the data before the graphs that refer to it
        for path in written:
            sync_file(Path(temporary) / path.name)
            os.replace(Path(temporary) / path.name, path)
    sync_directory(data.parent)
    return sorted(written)


@dataclass
class _WeightStore:
    """A file of tensors in which equal contents are stored once."""

    path: Path
    offsets: dict[bytes, int] = field(default_factory=dict)
    written: list[tuple[np.ndarray, int]] = field(default_factory=list)
    """Arrays and their offsets. These references keep the memory of an array from being reused for another one.

    An array whose contents are there already is not kept: every part of a graph computes its own merged weights.
    """

    def add(self, tensor: ir.TensorProtocol, name: str, file: BinaryIO) -> ir.ExternalTensor:
        """Append the tensor, unless the file has its contents already; return its location in the file."""
        array = tensor.numpy()
        offset = self._offset_of_view(array)
        if offset is None:
            contents = tensor.tobytes()
            digest = hashlib.sha256(contents).digest()
            if digest not in self.offsets:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                self.offsets[digest] = file.tell()
                file.write(contents)
                self.written.append((array, self.offsets[digest]))
            offset = self.offsets[digest]
        return ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self.path.parent,
        )

    def _offset_of_view(self, array: np.ndarray) -> int | None:
        """The offset of an array that is a view of rows of a stored matrix, such as a part of a tied vocabulary."""
        if not array.flags.c_contiguous:
            return None
        for whole, offset in self.written:
            before = array.ctypes.data - whole.ctypes.data
            if whole.flags.c_contiguous and 0 <= before and before + array.nbytes <= whole.nbytes:
                return offset + before
        return None


def _with_external_weights(model: ir.Model, store: _WeightStore, file: BinaryIO) -> ir.Model:
    model = model.clone()
    # Large tensors first: a matrix comes before the views of its rows.
    for name, value in sorted(model.graph.initializers.items(), key=lambda item: -tensor_of(item[1]).nbytes):
        tensor = tensor_of(value)
        if tensor.nbytes >= _MIN_EXTERNAL_BYTES:
            value.const_value = store.add(tensor, name, file)
    return model


def graph_of(model: ir.Model, fusions: dict[str, int], opset: int) -> Graph:
    """The `Graph` of `model`, described by its present inputs and outputs."""
    return Graph(
        model=model,
        fusions=fusions,
        opset=opset,
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
    )


def _spec(value: ir.Value) -> TensorSpec:
    dtype = value.dtype or ir.DataType.UNDEFINED
    shape = tuple(size if isinstance(size, int) else str(size) for size in dimensions(value))
    return TensorSpec(name=str(value.name), dtype=dtype.numpy().name, shape=shape)

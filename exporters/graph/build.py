"""A model and a task -> the ONNX graphs of a bundle, one for each engine, and the weights file that they share.

Inputs, all int64: `input_ids` and `attention_mask` [batch, sequence]; fill-mask also `mask_positions` [num_masks, 2] of
(row, token), which may be empty; where the model is fed token types also `token_type_ids` [batch, sequence].

Outputs, float32: `last_hidden_state` [batch, sequence, hidden]; then `sentence_embedding` [batch, embedding] (embed,
after any Dense modules) or `logits`: [num_masks, vocabulary] (fill-mask), [batch, sequence, vocabulary] (fill-mask with
all logits), [batch, labels] (classify), [batch, sequence, labels] (token-classify);
or `sparse_embedding` [batch, vocabulary] (sparse), pooled and activated.
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
from gte_deploy.exporters.graph.fusion import fuse_graph
from gte_deploy.exporters.graph.trace import trace
from gte_deploy.models.families import fusion_sites

DEFAULT_OPSET = 20

# Smaller tensors stay in the graph: ONNX Runtime infers shapes from those only.
_MIN_EXTERNAL_BYTES = 256
_ALIGNMENT = 4096
"""Bytes. Each tensor begins on a page, so that engines can map it."""


@dataclass(frozen=True)
class Graph:
    """A graph for one engine and what it takes and gives.

    Args:
        model: with its weights as initialisers; they may be views of the PyTorch model's parameters.
        fusions: pass -> how often it fired, in the order in which they ran; empty for a graph of standard operators.
        opset: of the standard operators.
        inputs: in graph order.
        outputs: in graph order.
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
    """Trace `model` once; a graph for each engine, sharing its weights.

    ONNX Runtime gets the fused graph. OpenVINO gets standard operators with explicit attention, which it fuses better
    itself: one text of 8,192 tokens through the base model takes 25 s and 1.9 GB so, 31 s and 2.6 GB fused.

    Args:
        model: of the task's class, float32; it comes back as it was. See `trace`.
        task: one of gte_deploy.core.spec.TASKS.
        max_length: longest sequence that the graphs take, up to the model's max_position_embeddings.
        pooling: "mean" or "cls", for embed.
        logits: "masked" or "all", for fill-mask.
        opset: version of the standard operators.
        token_types: whether the graphs take `token_type_ids`; without, every token has type 0.
        sparse: how to pool, for sparse.

    Raises:
        ExportError: an argument that the model cannot honour, or a fusion pass that did not fire as it must.
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


def save_graph(graph: Graph, path: Path) -> list[Path]:
    """Write one graph to `path` and its weights to `path`.data; see `save_graphs`."""
    return save_graphs({path: graph}, path.with_name(f"{path.name}.data"))


def save_graphs(graphs: Mapping[Path, Graph], data: Path) -> list[Path]:
    """Write each graph to its path and the weights of all, each once, to `data` in the same folder; the files written.

    Each file is written aside, synced and renamed, readable by other users. The same graphs give the same bytes.
    """
    with tempfile.TemporaryDirectory(dir=data.parent, prefix=f".{data.name}.", suffix=".tmp") as aside:
        store = _WeightStore(Path(aside) / data.name)
        with store.path.open("wb") as file:
            models = {path.name: _with_external_weights(graph.model, store, file) for path, graph in graphs.items()}
        for name, model in models.items():
            ir.save(model, Path(aside) / name)
        written = [data, *graphs]  # the data before the graphs that refer to it
        for path in written:
            sync_file(Path(aside) / path.name)
            os.replace(Path(aside) / path.name, path)
    sync_directory(data.parent)
    return sorted(written)


@dataclass
class _WeightStore:
    """A file of tensors in which equal contents are stored once."""

    path: Path
    offsets: dict[bytes, int] = field(default_factory=dict)
    written: list[tuple[np.ndarray, int]] = field(default_factory=list)
    """Arrays and where they stand; held, so that no other gets their memory meanwhile."""

    def add(self, tensor: ir.TensorProtocol, name: str, file: BinaryIO) -> ir.ExternalTensor:
        """The tensor's place in the file; what is not there yet is appended."""
        array = tensor.numpy()
        offset = self._place_of_part(array)
        if offset is None:
            contents = tensor.tobytes()
            digest = hashlib.sha256(contents).digest()
            if digest not in self.offsets:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                self.offsets[digest] = file.tell()
                file.write(contents)
            offset = self.offsets[digest]
            self.written.append((array, offset))
        return ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self.path.parent,
        )

    def _place_of_part(self, array: np.ndarray) -> int | None:
        """Where some rows of a stored matrix stand, such as a part of a tied vocabulary's."""
        if not array.flags.c_contiguous:
            return None
        for whole, offset in self.written:
            before = array.ctypes.data - whole.ctypes.data
            if whole.flags.c_contiguous and 0 <= before and before + array.nbytes <= whole.nbytes:
                return offset + before
        return None


def _with_external_weights(model: ir.Model, store: _WeightStore, file: BinaryIO) -> ir.Model:
    model = model.clone()
    # Matrices before the parts of them.
    for name, value in sorted(model.graph.initializers.items(), key=lambda item: -tensor_of(item[1]).nbytes):
        tensor = tensor_of(value)
        if tensor.nbytes >= _MIN_EXTERNAL_BYTES:
            value.const_value = store.add(tensor, name, file)
    return model


def graph_of(model: ir.Model, fusions: dict[str, int], opset: int) -> Graph:
    """A model with its inputs and outputs as they are now."""
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

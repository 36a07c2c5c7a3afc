"""A model and a task -> the ONNX graph that every target starts from.

Inputs, all int64: `input_ids` and `attention_mask` [batch, sequence]; fill-mask also `mask_positions` [num_masks, 2] of
(row, token), which may be empty. Outputs, all float32: `last_hidden_state` [batch, sequence, hidden]; then
`sentence_embedding` [batch, hidden] (embed) or `logits`: [num_masks, vocabulary] (fill-mask), [batch, sequence,
vocabulary] (fill-mask with logits="all"), [batch, labels] (classify), [batch, sequence, labels] (token-classify).
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel

from gte_deploy.exporters.fusion import fuse_graph
from gte_deploy.exporters.fusion.editing import dimensions, tensor_of
from gte_deploy.exporters.trace import trace
from gte_deploy.files import sync_directory, sync_file
from gte_deploy.spec import TensorSpec

DEFAULT_OPSET = 20

MAX_INLINE_BYTES = 256_000_000
"""Weights beyond this go to a second file. Protobuf cannot hold 2 GB; long before that, ONNX Runtime maps a second file
where it copies a first one (base model, loaded: 687 MB resident against 832 MB)."""


@dataclass(frozen=True)
class Graph:
    """An optimised graph and what it takes and gives.

    Args:
        model: with its weights as initialisers; they may be views of the PyTorch model's parameters.
        fusions: pass -> how often it fired, in the order in which they ran; empty for a plain graph.
        opset: of the standard operators.
        inputs: in graph order.
        outputs: in graph order.
    """

    model: ir.Model
    fusions: dict[str, int]
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build_graph(
    model: PreTrainedModel,
    *,
    task: str,
    max_length: int,
    pooling: str | None = None,
    logits: str = "masked",
    opset: int = DEFAULT_OPSET,
    fuse: bool = True,
) -> Graph:
    """Trace `model` and fuse it.

    Args:
        model: of the task's class, float32; it comes back as it was. See `trace`.
        task: one of gte_deploy.spec.TASKS.
        max_length: longest sequence that the graph takes, up to the model's max_position_embeddings.
        pooling: "mean" or "cls", for embed.
        logits: "masked" or "all", for fill-mask.
        opset: version of the standard operators.
        fuse: False leaves standard operators only, with explicit attention.

    Raises:
        ExportError: an argument that the model cannot honour, or a fusion pass that did not fire as it must.
    """
    traced = trace(model, task=task, max_length=max_length, pooling=pooling, logits=logits, opset=opset)
    fusions = fuse_graph(traced, num_layers=model.config.num_hidden_layers) if fuse else {}
    return Graph(
        model=traced,
        fusions=fusions,
        opset=opset,
        inputs=tuple(_spec(value) for value in traced.graph.inputs),
        outputs=tuple(_spec(value) for value in traced.graph.outputs),
    )


def save_graph(graph: Graph, path: Path) -> list[Path]:
    """Write `path`, and `path`.data beside it where the weights exceed MAX_INLINE_BYTES; the files written.

    Each file is written aside, synced and renamed, readable by other users. The same graph gives the same bytes.
    """
    weights = sum(tensor_of(value).nbytes for value in graph.model.graph.initializers.values())
    external = f"{path.name}.data" if weights > MAX_INLINE_BYTES else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as aside:
        ir.save(graph.model, Path(aside) / path.name, external_data=external)
        written = sorted(Path(aside).iterdir(), reverse=True)  # the data before the graph that refers to it
        for file in written:
            sync_file(file)
            os.replace(file, path.with_name(file.name))
    sync_directory(path.parent)
    return sorted(path.with_name(file.name) for file in written)


def _spec(value: ir.Value) -> TensorSpec:
    dtype = value.dtype or ir.DataType.UNDEFINED
    shape = tuple(size if isinstance(size, int) else str(size) for size in dimensions(value))
    return TensorSpec(name=str(value.name), dtype=dtype.numpy().name, shape=shape)

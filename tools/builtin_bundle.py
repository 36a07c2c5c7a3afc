"""Writes the bundle of the built-in model: graphs that read their weights from the checkpoint's own file.

    python tools/builtin_bundle.py             # write models/builtin, and compare it with PyTorch
    python tools/builtin_bundle.py OUTPUT      # write to another folder, which gets a copy of the checkpoint, too

Run it after a change to the checkpoint, to the fusion or to the format of bundles; it takes as long as an export. A
test compares what it writes with what is committed. docs/decisions/one-file-of-weights.md says why it is made so.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.backends.base import Backend
from gte_deploy.backends.graphs import graph_files
from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.backends.openvino import OpenVinoBackend
from gte_deploy.bundle.manifest import MANIFEST_NAME, FileEntry, GraphEntry, GraphPart, Manifest, read_manifest
from gte_deploy.core.files import sha256_file, write_bytes, write_text
from gte_deploy.core.spec import Engine, Precision
from gte_deploy.exporters.bundle.source import checkpoint_source
from gte_deploy.exporters.graph.build import Graph, build_graphs, openvino_graph
from gte_deploy.exporters.graph.editing import constant, initializer, tensor_of
from gte_deploy.exporters.graph.parts import parts_of
from gte_deploy.exporters.verification.answers import verify_against
from gte_deploy.exporters.verification.cases import TokenSource
from gte_deploy.exporters.verification.parity import Comparison, check_parity
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.exporters.verification.report import library_versions
from gte_deploy.models import builtin_bundle, builtin_path
from gte_deploy.models.checkpoint import load_described
from gte_deploy.models.description import Description, describe
from gte_deploy.text.tokenization import load_tokenizer

CHECKPOINT = builtin_path().name
_STORED_WEIGHTS = f"{CHECKPOINT}/model.safetensors"
"""ONNX allows data only in the folder of a graph, or below it. So the checkpoint lies in the folder of the bundle."""
_TOKENIZER_FILES = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
PATHS: dict[Engine, str] = {"onnxruntime": "model.onnx", "openvino": "model_openvino.onnx"}
_MIN_STORED_BYTES = 256
"""Smaller tensors stay in the graph, as in every bundle."""


@dataclass(frozen=True)
class Stored:
    """A tensor in the file of weights: its name, its values in float16, and where they begin, in bytes."""

    name: str
    values: NDArray[np.float16]
    offset: int


class Weights:
    """The tensors of a safetensors file, by their values in float32. Matrices are found by their transpose, too."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parents[1]
        self._found: dict[tuple[tuple[int, ...], bytes], tuple[Stored, bool]] = {}
        for stored in _read(path):
            values = stored.values.astype(np.float32)
            self._found.setdefault(_key(values.T), (stored, True))
            self._found[_key(values)] = (stored, False)

    def read_from_here(self, graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
        """Replace an initialiser of the graph by a stored tensor; return the nodes that compute its value."""
        stored, is_transposed = self._found[_key(tensor_of(value).numpy())]
        name = f"{stored.name}.half"
        tensor = ir.ExternalTensor(
            location=_STORED_WEIGHTS,
            offset=stored.offset,
            length=stored.values.nbytes,
            dtype=ir.DataType.FLOAT16,
            shape=ir.Shape(stored.values.shape),
            name=name,
            base_dir=self._folder,
        )
        half = initializer(graph, name, tensor)
        nodes = [ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)})]
        if is_transposed:
            nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0]}))
        return nodes


def _key(values: NDArray[np.float32]) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()


def _read(path: Path) -> Iterator[Stored]:
    """Yield the tensors. The format: the length of the header, the header as JSON, and the tensors without gaps."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:begin]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F16":
            raise ValueError(f"{path}: {name} is {entry['dtype']}; the graphs convert float16")
        first, end = entry["data_offsets"]
        values = np.frombuffer(data[begin + first : begin + end], np.float16).reshape(entry["shape"])
        yield Stored(name, values, begin + first)


def with_stored_weights(model: ir.Model, weights: Weights, frequencies: NDArray[np.float32]) -> ir.Model:
    """Return a copy of a graph that holds no large tensor.

    Args:
        model: a graph of the built-in model, in float32.
        weights: where it reads its weights from.
        frequencies: [head size / 2], those of the rotation: the graph computes the tables of cosines and sines.
    """
    model = model.clone()
    graph = model.graph
    large = [value for value in graph.initializers.values() if tensor_of(value).nbytes >= _MIN_STORED_BYTES]
    tables = [value for value in large if str(value.name).endswith(("rotary_emb.cos", "rotary_emb.sin"))]
    nodes = _angles(graph, tensor_of(tables[0]).shape[0], frequencies)
    angles = nodes[-1].outputs[0]
    for value in large:
        if value in tables:
            made = [ir.node("Cos" if str(value.name).endswith("cos") else "Sin", [angles])]
        else:
            made = weights.read_from_here(graph, value)
        new = made[-1].outputs[0]
        ir.convenience.replace_all_uses_with(value, new)
        graph.initializers.pop(str(value.name))
        new.name, new.type, new.shape = value.name, value.type, value.shape
        nodes += made
    for number, node in enumerate(nodes):
        node.name = f"stored_{number}"
        for output in node.outputs:
            output.name = output.name or node.name
    graph.insert_before(graph[0], nodes)
    return model


def _angles(graph: ir.Graph, positions: object, frequencies: NDArray[np.float32]) -> list[ir.Node]:
    """Return the nodes that compute the angles [positions, head size / 2], as PyTorch does, in float32."""
    first, end, step = (
        constant(graph, f"rotation_{name}", np.array(number, np.float32))
        for name, number in (("first", 0), ("end", positions), ("step", 1))
    )
    numbers = ir.node("Range", [first, end, step])
    axis = constant(graph, "rotation_axis", np.array([1], np.int64))
    column = ir.node("Unsqueeze", [numbers.outputs[0], axis])
    by = constant(graph, "rotation_frequencies", frequencies)
    return [numbers, column, ir.node("Mul", [column.outputs[0], by])]


def write(folder: Path) -> Description:
    """Write the bundle to a folder that holds the checkpoint; return the description of the checkpoint."""
    checkpoint = describe(folder / CHECKPOINT)
    spec = checkpoint.spec
    model = load_described(checkpoint)
    traced = build_graphs(model, task=spec.task, max_length=spec.max_length, logits=spec.logits)
    graphs: dict[Engine, Graph] = {**traced, "openvino": openvino_graph(traced["openvino"], checkpoint.sites)}
    weights = Weights(folder / _STORED_WEIGHTS)
    rotation = model.base_model.rotary_emb.inv_freq.numpy().astype(np.float32)  # type: ignore[union-attr, operator]
    entries: dict[Engine, GraphEntry] = {}
    for engine, graph in graphs.items():
        files = {PATHS[engine]: graph}
        for name, part in parts_of(graph, spec).items():
            files[PATHS[engine].replace(".onnx", f"_{name}.onnx")] = part
        for name, each in files.items():
            ir.save(with_stored_weights(each.model, weights, rotation), folder / name)
        whole, *parts = (GraphPart(name, each.inputs, each.outputs) for name, each in files.items())
        entries[engine] = GraphEntry(
            path=whole.path,
            opset=graph.opset,
            inputs=whole.inputs,
            outputs=whole.outputs,
            fusions=graph.fusions,
            parts=tuple(parts),
            half_weights=True,
        )
    for name in _TOKENIZER_FILES:
        write_bytes(folder / name, (folder / CHECKPOINT / name).read_bytes())
    names = [*(graph.path for entry in entries.values() for graph in entry.files), *_TOKENIZER_FILES]
    names += [f"{CHECKPOINT}/{file.name}" for file in (folder / CHECKPOINT).iterdir()]
    manifest = Manifest(
        spec=spec,
        precision="fp32",
        graphs=entries,
        files={name: FileEntry((folder / name).stat().st_size, sha256_file(folder / name)) for name in sorted(names)},
        versions=library_versions(),
        source=checkpoint_source(None, checkpoint),
    )
    write_text(folder / MANIFEST_NAME, json.dumps(manifest.to_json(), indent=2) + "\n")
    return checkpoint


def check(folder: Path, checkpoint: Description) -> None:
    """Compare the bundle's graphs with PyTorch, and its answers with transformers, as an export does.

    Raises:
        ParityError: a bound is missed.
    """
    spec, manifest = checkpoint.spec, read_manifest(folder)
    files = {engine: graph_files(folder, entry) for engine, entry in manifest.graphs.items()}
    runs: dict[tuple[Engine, Precision], Backend] = {
        ("onnxruntime", "fp32"): OnnxBackend(files["onnxruntime"], spec, half_weights=True),
        ("openvino", "fp32"): OpenVinoBackend(files["openvino"], spec),
    }
    graph = manifest.graphs["onnxruntime"]
    asked = Comparison(
        outputs=[output.name for output in graph.outputs],
        spec=spec,
        precision="fp32",
        tokens=TokenSource.from_tokenizer(load_tokenizer(folder)),
        parts=[[output.name for output in part.outputs] for part in graph.parts],
    )
    reference = TorchReference(load_described(checkpoint), task=spec.task, pooling=spec.pooling, logits=spec.logits)
    parity = check_parity(reference, runs, asked, progress=lambda line: print(line, file=sys.stderr))
    parity.require("strict")
    compared = verify_against(folder, folder / CHECKPOINT).compared
    print(f"{folder} answers as the checkpoint does:", ", ".join(f"{what} {value}" for what, value in compared.items()))


def main() -> None:
    """Write the bundle, and compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=builtin_bundle())
    folder = parser.parse_args().output
    if folder != builtin_bundle():
        shutil.copytree(builtin_path(), folder / CHECKPOINT)
    check(folder, write(folder))


if __name__ == "__main__":
    main()

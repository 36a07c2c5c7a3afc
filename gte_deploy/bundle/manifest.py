"""Reads a bundle: a folder in the Hugging Face layout whose manifest lists every file with its size and sha256.

This module needs only the standard library; `gte_deploy.exporters.bundle.writer` writes bundles. A bundle that does not
match its manifest is refused before any loader reads its files.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gte_deploy.bundle.held import HeldFile, require_inside
from gte_deploy.core.errors import BundleError
from gte_deploy.core.files import is_below
from gte_deploy.core.spec import (
    DEVICE_TYPES,
    ENGINES,
    LATE_INTERACTIONS,
    LOGITS,
    POOLINGS,
    PRECISIONS,
    SIMILARITIES,
    SPARSE_ACTIVATIONS,
    SPARSE_HEADS,
    SPARSE_POOLINGS,
    SPARSE_ROUTES,
    TASK_NAMES,
    TENSORRT_VARIANTS,
    DeviceType,
    Engine,
    ModelSpec,
    MultiVectorSpec,
    Precision,
    Profile,
    QueryExpansion,
    SparseSpec,
    TensorRTVariant,
    TensorSpec,
    is_packed,
)

MANIFEST_NAME = "manifest.json"
_PROJECT = "gte-deploy-"
FORMAT = f"{_PROJECT}bundle"
FORMAT_VERSION = 4
# Version 1 had no token types, Dense modules, activations and sparse embeddings, and version 2 had no parts of graphs.
# Up to version 3, the weights were in model.onnx.data, the hidden states were the first output of every graph, and
# fill-mask had no graph with all logits.
# Their fields still mean the same.
_READ_VERSIONS = (1, 2, 3, FORMAT_VERSION)
_MAX_MANIFEST_BYTES = 4 << 20
# What the runtime and `gte-export adopt` read if it is there, besides the graphs and the weights of queries.
_READ_BY_NAME = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
# Fields whose name in files is older than their name here.
_JSON_NAMES = {"variant": "flavour"}


@dataclass(frozen=True)
class FileEntry:
    """The size in bytes and the hex sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphPart:
    """A smaller graph that computes some outputs of a graph, from the same inputs and the same weights file.

    Args:
        path: path relative to the bundle, with forward slashes.
        inputs: the inputs in graph order.
        outputs: the outputs in graph order; fewer than those of the whole graph.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class GraphEntry:
    """The ONNX graph of a bundle for one engine.

    Args:
        path: path relative to the bundle, with forward slashes.
        opset: version of the standard operators.
        inputs: the inputs in graph order.
        outputs: the outputs in graph order.
        fusions: fusion pass -> number of matches.
        computes: the precisions that the export verified. Where the graph leaves the engine the choice of its
            precision, it may compute in others on request; a graph for GPUs has only that of the bundle.
        emulated: those of `computes` that were verified by an emulation, because the exporting machine lacks them.
        parts: smaller graphs, which the engine runs for calls that need no other outputs.
        all_logits: for fill-mask, the graph that other libraries open: without `mask_positions`, and with the logits of
            every token. The runtime never opens it. None if the graph itself is such a graph, and for other tasks.
        half_weights: whether the weights are stored in float16, and nodes of the graph convert them to float32. The
            engine must compute these nodes when it opens the graph, or each run computes them again.
    """

    path: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fusions: Mapping[str, int]
    computes: tuple[Precision, ...] = ("fp32",)
    emulated: tuple[Precision, ...] = ()
    parts: tuple[GraphPart, ...] = ()
    all_logits: GraphPart | None = None
    half_weights: bool = False

    @property
    def with_parts(self) -> "tuple[GraphEntry | GraphPart, ...]":
        """The whole graph, and then its parts."""
        return (self, *self.parts)

    @property
    def files(self) -> "tuple[GraphEntry | GraphPart, ...]":
        """Everything that is a file: the whole graph, its parts, and the graph for other libraries."""
        return self.with_parts if self.all_logits is None else (*self.with_parts, self.all_logits)


@dataclass(frozen=True)
class PlanEntry:
    """A built TensorRT engine.

    Args:
        path: path relative to the bundle, with forward slashes.
        variant: the TensorRT that built it and that must run it; `flavour` in JSON.
        version: the exact version of that TensorRT, e.g. "1.7.1.116".
        compute_capabilities: compute capabilities of the GPUs that it runs on, e.g. "8.9".
        profiles: the shapes that it takes; the runtime chooses one of the profiles.
        inputs: the inputs of the engine.
        outputs: the outputs of the engine.
        layers: kind of layer -> number in the engine, e.g. "fused_attention".
        timing_cache: path of the builder's timing cache in the bundle, or None.
        caveats: one sentence for each thing that the export could not verify about the engine.
    """

    path: str
    variant: TensorRTVariant
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: Mapping[str, int]
    timing_cache: str | None = None
    caveats: tuple[str, ...] = ()

    @property
    def padding_free(self) -> bool:
        """Whether it takes the tokens of all texts in a row; its profiles are then (texts, tokens of all texts)."""
        return is_packed(self.inputs)

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON data, for the manifest and for reports."""
        return {_JSON_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    def describe(self) -> list[str]:
        """Describe the engine for people: its builder, GPUs, kernels, tensors and shapes."""
        layers = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in self.layers.items())
        tensors = ", ".join(f"{tensor.name} {tensor.dtype}" for tensor in (*self.inputs, *self.outputs))
        targets = ", ".join(f"sm{target.replace('.', '')}" for target in self.compute_capabilities)
        axes = "texts x tokens of all" if self.padding_free else "batch x sequence"
        return [
            f"engine: {self.variant} {self.version} for {targets}: {layers or 'layers unknown'}",
            f"inputs and outputs: {tensors}",
            f"profiles ({axes}, min:opt:max): {', '.join(map(str, self.profiles))}",
        ]


@dataclass(frozen=True)
class TextsEntry:
    """Texts that an export read: those for the ranges of 8-bit activations, or those that measured its accuracy.

    Args:
        source: what they are, for people: built-in ones, or the name of a file.
        languages: codes of their languages (BCP 47); empty where they are not known.
        texts: their number.
        sha256: hex digest of the texts in UTF-8, with a newline after each.
    """

    source: str
    languages: tuple[str, ...]
    texts: int
    sha256: str

    def describe(self) -> str:
        """Return their number, source and digest for people."""
        return f"{self.texts:,} texts: {self.source}; sha256 {self.sha256}"


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Args:
        spec: the facts about the model.
        precision: the precision of the weights and graphs.
        graphs: engine -> its graph, for every engine that the export verified; the graphs share one weights file. A
            TensorRT bundle has none, or "tensorrt", from which the plan was compiled.
        files: path relative to the bundle, with forward slashes -> size and hash; every file except the manifest.
        versions: library -> its version at the export.
        source: the exported checkpoint: its `name`, and the `sha256` of its weights if known.
        target: the device that ONNX Runtime's graph is for.
        plan: the TensorRT engine, if the bundle has one.
        missed_bounds: one line for each bound or check that the export missed, if it wrote the bundle nevertheless
            (`gte-export --bounds report`).
        calibration: the calibration texts, for precisions with ranges that were measured on texts.
    """

    spec: ModelSpec
    precision: Precision
    graphs: Mapping[Engine, GraphEntry]
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]
    source: Mapping[str, str]
    target: DeviceType = "cpu"
    plan: PlanEntry | None = None
    missed_bounds: tuple[str, ...] = ()
    calibration: TextsEntry | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON data, with a checksum of its other fields."""
        data = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        if self.plan is not None:
            data["plan"] = self.plan.to_json()
        if self.calibration is None:
            del data["calibration"]  # older bundles do not have it, and keep their checksum
        for entry in data["graphs"].values():
            if not entry["half_weights"]:
                del entry["half_weights"]  # likewise
        return {**data, "checksum": _checksum(data)}


def has_manifest(path: Path) -> bool:
    """Whether `path` is a folder with a manifest.json, whoever wrote it."""
    return (path / MANIFEST_NAME).is_file()


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of this project.

    The manifest.json of another project is none. One that is no JSON counts as a manifest of this project, because it
    may be a damaged one: `read_manifest` says so, and the folder is not taken for a checkpoint.
    """
    file = path / MANIFEST_NAME
    if not file.is_file() or file.stat().st_size > _MAX_MANIFEST_BYTES:
        return False
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return True
    # Triton repositories count, too: their manifest is not a bundle's, and `read_manifest` says so.
    return isinstance(data, dict) and str(data.get("format")).startswith(_PROJECT)


def read_manifest(path: Path) -> Manifest:
    """Read and check `path`/manifest.json; the files it names are not opened.

    Raises:
        BundleError: the manifest is missing or not JSON, has another format or version, or a field has a wrong form; or
            the folder has a file that would be read and is not named.
    """
    file = path / MANIFEST_NAME
    if not file.is_file():
        if (path / "config.json").is_file():
            raise BundleError(
                f"{path} is a checkpoint, and no bundle: it has no {MANIFEST_NAME}.",
                advice=f"Make a bundle of it with: gte-export {path}",
            )
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST_NAME}. Write one with gte-export.")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{file} has {file.stat().st_size:,} bytes; a manifest has at most {_MAX_MANIFEST_BYTES:,}")
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not valid JSON ({error}). Export the bundle again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{file} is not the manifest of a {FORMAT}. Write a bundle with gte-export.")
    if data.get("format_version") not in _READ_VERSIONS:
        raise BundleError(
            f"{file} has format version {data.get('format_version')!r}; this gte-deploy reads "
            f"{', '.join(map(str, _READ_VERSIONS))}. "
            "Export the bundle again, or install the gte-deploy that wrote it."
        )
    checksum = data.pop("checksum", None)
    if checksum != _checksum(data):
        raise BundleError(f"{file} does not match its own checksum: it was altered. Export the bundle again.")
    try:
        manifest = _manifest_from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{file} is malformed ({type(error).__name__}: {error}). Export the bundle again.") from error
    require_inside(file, path)
    _refuse_unnamed(path, manifest)
    return manifest


def files_besides(path: Path, manifest: Manifest) -> list[str]:
    """Return the files in the folder of a bundle that its manifest does not name, without hidden ones; sorted."""
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    named = {MANIFEST_NAME, *manifest.files}
    return sorted(
        file.as_posix()
        for file in found
        if file.as_posix() not in named and not any(part.startswith(".") for part in file.parts)
    )


def _refuse_unnamed(path: Path, manifest: Manifest) -> None:
    """Refuse files that the runtime reads and nothing verifies.

    Raises:
        BundleError: the message names the first.
    """
    sparse = manifest.spec.sparse
    weights = () if sparse is None or sparse.query_weights is None else (sparse.query_weights,)
    for name in (*_READ_BY_NAME, *weights):
        if name not in manifest.files and os.path.lexists(path / name):
            raise BundleError(
                f"{path / name} would be read, and the manifest does not name it. Remove it, or export the bundle "
                "again."
            )


def verify_bundle(path: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest is there with its size and sha256.

    Raises:
        BundleError: a file is missing or differs; the message names it and both values.
    """
    for name, entry in manifest.files.items():
        HeldFile(path, name, entry.size, entry.sha256).close()


def open_bundle(path: Path) -> Manifest:
    """Read the manifest of a bundle and verify every file against it."""
    manifest = read_manifest(path)
    verify_bundle(path, manifest)
    return manifest


def _checksum(data: Mapping[str, Any]) -> str:
    # Through JSON and back first, so that the hash covers the data as a reader sees them, with strings as keys.
    text = json.dumps(json.loads(json.dumps(data)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_from_json(data: Mapping[str, Any]) -> Manifest:
    files = {_checked_name(name): FileEntry(**entry) for name, entry in data["files"].items()}
    for name, entry in files.items():
        if not isinstance(entry.size, int) or entry.size < 0 or not isinstance(entry.sha256, str):
            raise ValueError(f"files[{name!r}] needs a size and a sha256")
    graphs: dict[Engine, GraphEntry] = {
        engine: _graph_from_json(data["graphs"][engine], files) for engine in ENGINES if engine in data["graphs"]
    }
    if len(graphs) < len(data["graphs"]):
        raise ValueError(f"graphs has {', '.join(data['graphs'])}; the known engines are {', '.join(ENGINES)}")
    plan = None if data.get("plan") is None else _plan_from_json(data["plan"], files)
    if not graphs and plan is None:
        raise ValueError("graphs is empty and there is no plan, so nothing can run")
    # Older bundles have no target.
    target = data.get("target", "cpu")
    for name, value, allowed in (("precision", data["precision"], PRECISIONS), ("target", target, DEVICE_TYPES)):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
    missed = data.get("missed_bounds", [])  # older bundles do not have it
    if not isinstance(missed, list) or not all(isinstance(line, str) for line in missed):
        raise ValueError(f"missed_bounds must be a list of sentences, not {missed!r}")
    return Manifest(
        spec=spec_from_json(data["spec"]),
        precision=data["precision"],
        graphs=graphs,
        files=files,
        versions={str(name): str(version) for name, version in data["versions"].items()},
        source={str(name): str(value) for name, value in data["source"].items()},
        target=target,
        plan=plan,
        missed_bounds=tuple(missed),
        # Older bundles do not have it.
        calibration=None if data.get("calibration") is None else _calibration_from_json(data["calibration"]),
    )


def _calibration_from_json(data: Mapping[str, Any]) -> TextsEntry:
    entry = TextsEntry(**{**data, "languages": tuple(data["languages"])})
    strings = (entry.source, entry.sha256, *entry.languages)
    if not all(isinstance(value, str) for value in strings) or type(entry.texts) is not int or entry.texts < 1:
        raise ValueError(f"calibration must have a source, languages, a number of texts and a sha256, not {data!r}")
    return entry


def _plan_from_json(data: Mapping[str, Any], files: Mapping[str, FileEntry]) -> PlanEntry:
    for name in ("path", "timing_cache"):
        if data[name] not in files and not (name == "timing_cache" and data[name] is None):
            raise ValueError(f"plan.{name} {data[name]!r} is not among the files")
    if data["flavour"] not in TENSORRT_VARIANTS:
        raise ValueError(f"plan.flavour {data['flavour']!r} is none of {', '.join(TENSORRT_VARIANTS)}")
    for name, value, pattern in (
        ("version", data["version"], r"\d+(\.\d+)+"),
        *(("compute_capabilities", capability, r"\d+\.\d") for capability in data["compute_capabilities"]),
    ):
        if not re.fullmatch(pattern, value):
            raise ValueError(f"plan.{name} has {value!r}, which is not of the form {pattern}")
    for name in ("compute_capabilities", "profiles", "inputs", "outputs"):
        if not isinstance(data[name], list) or not data[name]:
            raise ValueError(f"plan.{name} must be a list with at least one entry")
    if any(type(count) is not int or count < 0 for count in data["layers"].values()):
        raise ValueError(f"plan.layers must count layers, not {data['layers']!r}")
    caveats = data.get("caveats", [])  # older bundles do not have it
    if not isinstance(caveats, list) or not all(isinstance(line, str) for line in caveats):
        raise ValueError(f"plan.caveats must be a list of sentences, not {caveats!r}")
    return PlanEntry(
        path=data["path"],
        variant=data["flavour"],
        version=data["version"],
        compute_capabilities=tuple(data["compute_capabilities"]),
        profiles=tuple(
            Profile(**{name: tuple(size) for name, size in profile.items()}) for profile in data["profiles"]
        ),
        inputs=tuple(_tensor_from_json(tensor) for tensor in data["inputs"]),
        outputs=tuple(_tensor_from_json(tensor) for tensor in data["outputs"]),
        layers={str(name): count for name, count in data["layers"].items()},
        timing_cache=data["timing_cache"],
        caveats=tuple(caveats),
    )


def _graph_from_json(data: Mapping[str, Any], files: Mapping[str, FileEntry]) -> GraphEntry:
    _require_file(data["path"], files)
    computes = tuple(data["computes"])
    emulated = tuple(data.get("emulated", ()))  # older bundles do not have it
    if not set(emulated) <= set(computes):
        raise ValueError(f"emulated {', '.join(emulated)} must be among the verified precisions {', '.join(computes)}")
    if not set(computes) <= set(PRECISIONS):
        raise ValueError(f"computes {', '.join(computes)}; the known precisions are {', '.join(PRECISIONS)}")
    entry = GraphEntry(
        path=data["path"],
        opset=int(data["opset"]),
        inputs=tuple(_tensor_from_json(tensor) for tensor in data["inputs"]),
        outputs=tuple(_tensor_from_json(tensor) for tensor in data["outputs"]),
        fusions={str(name): int(count) for name, count in data["fusions"].items()},
        computes=computes,
        emulated=emulated,
        # Older bundles have neither of these.
        parts=tuple(_part_from_json(part, files) for part in data.get("parts", [])),
        all_logits=None if data.get("all_logits") is None else _part_from_json(data["all_logits"], files),
        half_weights=data.get("half_weights", False) is True,
    )
    for part in entry.parts:
        if _names(part.inputs) != _names(entry.inputs) or not set() < _names(part.outputs) < _names(entry.outputs):
            raise ValueError(f"{part.path} must have the inputs and some of the outputs of {entry.path}")
    if (other := entry.all_logits) is not None and (
        _names(other.inputs) != _names(entry.inputs) - {"mask_positions"}
        or _names(other.outputs) != _names(entry.outputs)
    ):
        raise ValueError(f"{other.path} must have the inputs but mask_positions, and the outputs of {entry.path}")
    return entry


def _part_from_json(data: Mapping[str, Any], files: Mapping[str, FileEntry]) -> GraphPart:
    _require_file(data["path"], files)
    return GraphPart(
        path=data["path"],
        inputs=tuple(_tensor_from_json(tensor) for tensor in data["inputs"]),
        outputs=tuple(_tensor_from_json(tensor) for tensor in data["outputs"]),
    )


def _names(tensors: Sequence[TensorSpec]) -> set[str]:
    return {tensor.name for tensor in tensors}


def _require_file(graph: str, files: Mapping[str, FileEntry]) -> None:
    if graph not in files:
        raise ValueError(f"the graph {graph!r} is not among the files")


def spec_from_json(data: Mapping[str, Any]) -> ModelSpec:
    """Rebuild a spec from `dataclasses.asdict(spec)` that was stored as JSON.

    Raises:
        ValueError, TypeError, KeyError: the data are not a spec.
    """
    from gte_deploy.core.activations import ACTIVATIONS  # needs numpy, for which a command's --help need not wait

    id2label = {int(i): str(label) for i, label in data["id2label"].items()}
    sparse = None if data.get("sparse") is None else _sparse_from_json(data["sparse"])
    multi_vector = None if data.get("multi_vector") is None else _multi_vector_from_json(data["multi_vector"])
    spec = ModelSpec(**{**data, "id2label": id2label, "sparse": sparse, "multi_vector": multi_vector})
    similarities = LATE_INTERACTIONS if spec.task == "multi-vector" else SIMILARITIES
    for name, value, allowed in (
        ("task", spec.task, TASK_NAMES),
        ("pooling", spec.pooling, POOLINGS),
        ("logits", spec.logits, LOGITS),
        ("similarity", spec.similarity, (None, *similarities)),
        ("activation", spec.activation, (None, *ACTIVATIONS)),
    ):
        if value not in allowed:
            raise ValueError(f"spec.{name} {value!r} is none of {', '.join(map(str, allowed))}")
    for name in ("max_length", "vocab_size", "hidden_size"):
        if type(value := getattr(spec, name)) is not int or value < 1:
            raise ValueError(f"spec.{name} must be a positive integer, not {value!r}")
    if type(spec.token_types) is not bool or type(spec.type_vocab_size) is not int:
        raise ValueError(f"spec.token_types must be a boolean and spec.type_vocab_size an integer, not {spec}")
    if spec.token_types and spec.type_vocab_size < 2:
        raise ValueError(f"spec.token_types is true, and spec.type_vocab_size {spec.type_vocab_size} is below 2")
    if spec.task in ("sparse", "hybrid") and sparse is None:
        raise ValueError(f"spec.sparse is missing, though the task is {spec.task}")
    if spec.task == "hybrid" and sparse is not None and sparse.head != "token-weights":
        raise ValueError(f"spec.sparse.head is {sparse.head!r}, though the task is hybrid")
    if (multi_vector is None) != (spec.task != "multi-vector"):
        raise ValueError(f"spec.multi_vector is {multi_vector}, though the task is {spec.task}")
    if multi_vector is not None:
        _check_multi_vector(multi_vector, spec)
    if type(spec.pad_token_id) is not int or not 0 <= spec.pad_token_id < spec.vocab_size:
        raise ValueError(f"spec.pad_token_id {spec.pad_token_id!r} is outside the vocabulary of {spec.vocab_size}")
    return spec


def _sparse_from_json(data: Mapping[str, Any]) -> SparseSpec:
    unweighted = tuple(data.get("unweighted", ()))
    sparse = SparseSpec(**{**data, "unweighted": unweighted})
    for name, allowed in (
        ("head", SPARSE_HEADS),
        ("activation", SPARSE_ACTIVATIONS),
        ("pooling", SPARSE_POOLINGS),
        ("default_route", (None, *SPARSE_ROUTES)),
    ):
        if (value := getattr(sparse, name)) not in allowed:
            raise ValueError(f"spec.sparse.{name} {value!r} is none of {', '.join(map(str, allowed))}")
    if sparse.query_weights is not None:
        _checked_name(sparse.query_weights)
    for name, numbers in (("max_active_dims", (sparse.max_active_dims or 1,)), ("unweighted", unweighted)):
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"spec.sparse.{name} must have whole numbers, not {numbers!r}")
    return sparse


def _multi_vector_from_json(data: Mapping[str, Any]) -> MultiVectorSpec:
    expansion = None if data["expansion"] is None else QueryExpansion(**data["expansion"])
    skipped = {name: tuple(data[name]) for name in ("skipped_in_queries", "skipped_in_documents")}
    return MultiVectorSpec(**{**data, **skipped, "expansion": expansion})


def _check_multi_vector(found: MultiVectorSpec, spec: ModelSpec) -> None:
    lengths = {"query_length": found.query_length, "document_length": found.document_length}
    ids: list[int] = [*found.skipped_in_queries, *found.skipped_in_documents, *found.prefixes]
    if (expansion := found.expansion) is not None:
        lengths["expansion.length"] = expansion.length
        ids.append(expansion.token)
        if type(expansion.attended) is not bool or type(expansion.fixed) is not bool:
            raise ValueError(f"spec.multi_vector.expansion must say true or false, not {expansion}")
    for name, length in lengths.items():
        if type(length) is not int or not 1 <= length <= spec.max_length:
            raise ValueError(f"spec.multi_vector.{name} must be 1 to {spec.max_length}, not {length!r}")
    if any(type(token) is not int or not 0 <= token < spec.vocab_size for token in ids):
        raise ValueError(f"spec.multi_vector has token ids outside the vocabulary of {spec.vocab_size}: {ids}")


def _tensor_from_json(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))


def _checked_name(name: str) -> str:
    if not is_below(name) or str(PurePosixPath(name)) != name:
        raise ValueError(f"files: {name!r} is not a plain relative path")
    return name

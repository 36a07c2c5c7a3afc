"""Reads a bundle: a folder in the Hugging Face layout whose manifest lists every file with its size and sha256.

This module needs only the standard library; `gte_deploy.exporters.bundle.writer` writes bundles. A bundle that does not
match its manifest is refused before any loader reads its files.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.bundle.held import HeldFile, require_inside
from gte_deploy.bundle.signature import SIGNATURE_NAME, TrustedKeys
from gte_deploy.core.errors import BundleError, SignatureError
from gte_deploy.core.formats import check_version
from gte_deploy.core.spec import (
    DEVICE_TYPES,
    ENGINES,
    PRECISIONS,
    TENSORRT_VARIANTS,
    TOKENIZER_NAMES,
    DeviceType,
    Engine,
    ModelSpec,
    Precision,
    Profile,
    TensorRTVariant,
    TensorSpec,
    is_packed,
)
from gte_deploy.core.spec_json import read_name, read_spec
from gte_deploy.core.typed_json import JsonValue

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
_READ_BY_NAME = (*TOKENIZER_NAMES, "config.json")
# Fields whose name in files is older than their name here.
_JSON_NAMES = {"variant": "flavour"}
_ENDINGS = {"executorch": ".pte"}  # of the file of an engine; that of all others is .onnx
_MAX_FILE_BYTES = 1 << 50


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


def read_manifest(path: Path, trusted: TrustedKeys | None = None) -> Manifest:
    """Read and check `path`/manifest.json; the files it names are not opened.

    With trusted keys, the signature of the very bytes that are parsed is verified first.

    Raises:
        BundleError: the manifest is missing or not JSON, has another format or version, or a field has a wrong form; or
            the folder has a file that would be read and is not named.
        SignatureError: no trusted key has signed the manifest, or there is none.
    """
    if trusted is not None:
        require_manifest(path, path)
    data = manifest_bytes(path)
    if trusted is not None:
        trusted.require_signature(path, data)
    return parse_manifest(path, data)


def require_manifest(path: Path | None, name: object) -> None:
    """Refuse a model without a manifest where a signed bundle is asked for; `path` is None if there is none on the hub.

    Raises:
        SignatureError: only bundles are signed, and `name` is none.
    """
    if path is None or not has_manifest(path):
        raise SignatureError(
            f"{name} is not signed: only bundles are, it has no {MANIFEST_NAME}, and a trusted key is asked for.",
            advice=f"Make a bundle of it with: gte-export {name}. Then sign it with gte-deploy sign.",
        )


def manifest_bytes(path: Path) -> bytes:
    """Read `path`/manifest.json, whatever it holds.

    Raises:
        BundleError: there is none, or it is too large.
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
    return file.read_bytes()


def parse_manifest(path: Path, content: bytes) -> Manifest:
    """Parse and check the bytes of `path`/manifest.json. Raises BundleError as `read_manifest`."""
    file = path / MANIFEST_NAME
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not valid JSON ({error}). Export the bundle again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{file} is not the manifest of a {FORMAT}. Write a bundle with gte-export.")
    advice = "Export the bundle again, or install the gte-deploy that wrote it."
    check_version(file, data.get("format_version"), _READ_VERSIONS, error=BundleError, advice=advice)
    checksum = data.pop("checksum", None)
    if checksum != _checksum(data):
        raise BundleError(f"{file} does not match its own checksum: it was altered. Export the bundle again.")
    try:
        manifest = _manifest_from_json(JsonValue(data))
    except ValueError as error:
        raise BundleError(f"{file} is malformed: {error}. Export the bundle again.") from error
    require_inside(file, path)
    _refuse_unnamed(path, manifest)
    return manifest


def files_besides(path: Path, manifest: Manifest) -> list[str]:
    """Return the files in the folder of a bundle that its manifest does not name, without hidden ones; sorted."""
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    named = {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files}
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


def open_bundle(path: Path, trusted: TrustedKeys | None = None) -> Manifest:
    """Read the manifest of a bundle, signed by a trusted key if any are given, and verify every file against it."""
    manifest = read_manifest(path, trusted)
    verify_bundle(path, manifest)
    return manifest


def _checksum(data: Mapping[str, Any]) -> str:
    # Through JSON and back first, so that the hash covers the data as a reader sees them, with strings as keys.
    text = json.dumps(json.loads(json.dumps(data)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_from_json(data: JsonValue) -> Manifest:
    files = {_file_name(name): _file_entry(entry) for name, entry in data["files"].fields().items()}
    graphs: dict[Engine, GraphEntry] = {
        JsonValue(engine, "an engine of graphs").one_of(ENGINES): _graph_entry(entry, engine, files)
        for engine, entry in data["graphs"].fields().items()
    }
    plan = data.get("plan").or_none(lambda entry: _plan_entry(entry, files))
    if not graphs and plan is None:
        raise ValueError("graphs is empty and there is no plan, so nothing can run")
    spec = read_spec(data["spec"])
    manifest = Manifest(
        spec=spec,
        precision=data["precision"].one_of(PRECISIONS),
        graphs=graphs,
        files=files,
        versions={name: version.text() for name, version in data["versions"].fields().items()},
        source={name: value.text() for name, value in data["source"].fields().items()},
        # Older bundles have no target, missed bounds and calibration.
        target=data.get("target", "cpu").one_of(DEVICE_TYPES),
        plan=plan,
        missed_bounds=tuple(line.text() for line in data.get("missed_bounds", []).entries()),
        calibration=data.get("calibration").or_none(_calibration_entry),
    )
    for graph in (*(file for entry in graphs.values() for file in entry.files), *([] if plan is None else [plan])):
        _check_widths(graph, spec)
    return manifest


def _check_widths(graph: GraphEntry | GraphPart | PlanEntry, spec: ModelSpec) -> None:
    """Refuse outputs whose last axis is not that of the spec."""
    for tensor in graph.outputs:
        width, size = spec.width_of(tensor.name), tensor.shape[-1] if tensor.shape else None
        if width is not None and size is not None and isinstance(size, int) and size != width:
            raise ValueError(
                f"the output {tensor.name} of {graph.path} has the shape {list(tensor.shape)}, and by the spec its "
                f"last axis is {width}"
            )


def _file_name(name: str) -> str:
    return read_name(JsonValue(name, "a name in files"))


def _file_entry(data: JsonValue) -> FileEntry:
    data.has_only(("size", "sha256"))
    return FileEntry(size=data["size"].whole(0, _MAX_FILE_BYTES), sha256=data["sha256"].text())


def _calibration_entry(data: JsonValue) -> TextsEntry:
    data.has_only([field.name for field in dataclasses.fields(TextsEntry)])
    return TextsEntry(
        source=data["source"].text(),
        languages=tuple(language.text() for language in data["languages"].entries()),
        texts=data["texts"].whole(1),
        sha256=data["sha256"].text(),
    )


def _plan_entry(data: JsonValue, files: Mapping[str, FileEntry]) -> PlanEntry:
    return PlanEntry(
        path=_path(data["path"], files),
        variant=data["flavour"].one_of(TENSORRT_VARIANTS),
        version=data["version"].text(r"\d+(\.\d+)+"),
        compute_capabilities=tuple(entry.text(r"\d+\.\d") for entry in data["compute_capabilities"].entries(least=1)),
        profiles=tuple(_profile(profile) for profile in data["profiles"].entries(least=1)),
        inputs=_tensors(data["inputs"], least=1),
        outputs=_tensors(data["outputs"], least=1),
        layers={name: count.whole() for name, count in data["layers"].fields().items()},
        timing_cache=data["timing_cache"].or_none(lambda path: _path(path, files)),
        caveats=tuple(line.text() for line in data.get("caveats", []).entries()),  # older bundles do not have it
    )


def _profile(data: JsonValue) -> Profile:
    data.has_only(("min", "opt", "max"))
    sizes = {name: [size.whole(1) for size in data[name].entries()] for name in ("min", "opt", "max")}
    for name, pair in sizes.items():
        if len(pair) != 2:
            raise data[name].refuse("pairs of positive integers (batch, sequence)")
    try:
        return Profile(**{name: (pair[0], pair[1]) for name, pair in sizes.items()})
    except ValueError as error:
        raise ValueError(f"{data.place}: {error}") from error


def _graph_entry(data: JsonValue, engine: str, files: Mapping[str, FileEntry]) -> GraphEntry:
    ending = _ENDINGS.get(engine, ".onnx")
    computes: tuple[Precision, ...] = tuple(entry.one_of(PRECISIONS) for entry in data["computes"].entries())
    # Older bundles do not have it.
    emulated: tuple[Precision, ...] = tuple(entry.one_of(PRECISIONS) for entry in data.get("emulated", []).entries())
    if not set(emulated) <= set(computes):
        raise data["emulated"].refuse(f"some of the verified precisions {', '.join(computes)}")
    entry = GraphEntry(
        path=_path(data["path"], files, ending),
        opset=data["opset"].whole(),
        inputs=_tensors(data["inputs"]),
        outputs=_tensors(data["outputs"]),
        fusions={name: count.whole() for name, count in data["fusions"].fields().items()},
        computes=computes,
        emulated=emulated,
        # Older bundles have none of these.
        parts=tuple(_graph_part(part, files, ending) for part in data.get("parts", []).entries()),
        all_logits=data.get("all_logits").or_none(lambda part: _graph_part(part, files, ending)),
        half_weights=data.get("half_weights", False).flag(),
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


def _graph_part(data: JsonValue, files: Mapping[str, FileEntry], ending: str) -> GraphPart:
    return GraphPart(
        path=_path(data["path"], files, ending), inputs=_tensors(data["inputs"]), outputs=_tensors(data["outputs"])
    )


def _path(data: JsonValue, files: Mapping[str, FileEntry], ending: str = "") -> str:
    path = data.text()
    if path not in files:
        raise data.refuse("one of the files")
    # Engines choose a parser by the name, and the inspection has that of one format.
    if not path.endswith(ending):
        raise data.refuse(f"a file whose name ends in {ending}")
    return path


def _tensors(data: JsonValue, *, least: int = 0) -> tuple[TensorSpec, ...]:
    found = tuple(
        TensorSpec(
            name=tensor["name"].text(),
            dtype=tensor["dtype"].text(),
            shape=tuple(
                axis.text() if isinstance(axis.value, str) else axis.whole(0) for axis in tensor["shape"].entries()
            ),
        )
        for tensor in data.entries(least=least)
    )
    # Bundles of multi-vector models without a projection had one tensor twice.
    if len(_names(found)) < len(set(found)):
        raise ValueError(f"{data.place} has two tensors of one name: {', '.join(tensor.name for tensor in found)}")
    return found


def _names(tensors: Sequence[TensorSpec]) -> set[str]:
    return {tensor.name for tensor in tensors}

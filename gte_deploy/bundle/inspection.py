"""Finds the operators that an ONNX file calls and the files that it reads, without the `onnx` package.

It walks over the protobuf wire format (https://protobuf.dev/programming-guides/encoding/) and skips tensor data. The
field numbers are those of onnx.proto3, which never change.
"""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.errors import BundleError

# Domains that are built into every engine. Operators of another domain need a library of custom operators.
_ALLOWED_DOMAINS = frozenset(("", "ai.onnx", "com.microsoft"))
# Operators of TensorRT's own parser, which padding-free graphs use.
_ALLOWED_OPERATORS = frozenset((("trt", "TRT_Attention"),))
# A node that wraps an accelerator's compiled engine: executable code that cannot be inspected.
_REFUSED_OPERATORS = frozenset(("EPContext",))

# `file_identifier` in ExecuTorch's schema/program.fbs; it stands behind the offset of the root table.
_PROGRAM_IDENTIFIER = b"ET12"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 64

# For each message: field number -> the message inside it. Other fields are skipped.
_CHILDREN: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse_tensor"},
    "sparse_tensor": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse_tensor", 23: "sparse_tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_NODE_OP_TYPE, _NODE_DOMAIN = 4, 7
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


@dataclass(frozen=True)
class OnnxContents:
    """Operators as (domain, name), and the paths of external data relative to the folder of the file."""

    operators: frozenset[tuple[str, str]]
    external_files: frozenset[str]


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Refuse a bundle with a graph that calls foreign code or reads files that are not in the manifest.

    Raises:
        BundleError: a graph has an operator of another domain, an EPContext node, or data outside the manifest.
    """
    if (program := manifest.graphs.get("executorch")) is not None:
        _check_program(folder, program.path)
    onnx = [entry for engine, entry in manifest.graphs.items() if engine != "executorch"]
    for graph in (graph for entry in onnx for graph in entry.files):
        contents = inspect_onnx(folder / graph.path)
        for domain, operator in sorted(contents.operators):
            known = domain in _ALLOWED_DOMAINS or (domain, operator) in _ALLOWED_OPERATORS
            if operator in _REFUSED_OPERATORS or not known:
                raise BundleError(
                    f"{graph.path} has a node {domain or 'ai.onnx'}::{operator}. Compiled engines and custom operators "
                    "are not loaded from a bundle; export the checkpoint with gte-export."
                )
        for location in sorted(contents.external_files):
            if str(PurePosixPath(graph.path).parent / location) not in manifest.files:
                raise BundleError(f"{graph.path} reads {location!r}, which the manifest does not name.")


def _check_program(folder: Path, name: str) -> None:
    """Refuse a file that is no program for ExecuTorch, by the identifier of its FlatBuffers schema.

    A program calls the operators that the runtime was built with; it holds no code.
    """
    with (folder / name).open("rb") as file:
        if file.read(8)[4:] != _PROGRAM_IDENTIFIER:
            raise BundleError(f"{name} is not a program for ExecuTorch. Export the bundle again.")


def inspect_onnx(path: Path) -> OnnxContents:
    """Read the operators and external files of an ONNX file.

    Raises:
        BundleError: the file is empty or not a protobuf message.
    """
    operators: set[tuple[str, str]] = set()
    files: set[str] = set()
    try:
        with path.open("rb") as file:
            # Python unmaps it when the last view is gone; the traceback of an error may hold some.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _walk(memoryview(data), "model", operators, files, 0)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not an ONNX model ({error}). Export the bundle again.") from error
    return OnnxContents(frozenset(operators), frozenset(files))


def _walk(view: memoryview, kind: str, operators: set[tuple[str, str]], files: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages nested deeper than {_MAX_DEPTH}")
    children = _CHILDREN[kind]
    texts: dict[int, str] = {}
    for field, content in _fields(view):
        if field in children:
            _walk(content, children[field], operators, files, depth + 1)
        elif (kind == "node" and field in (_NODE_OP_TYPE, _NODE_DOMAIN)) or kind == "entry":
            texts[field] = bytes(content).decode("utf-8")
    if kind == "node":
        operators.add((texts.get(_NODE_DOMAIN, ""), texts.get(_NODE_OP_TYPE, "")))
    elif kind == "entry" and texts.get(_ENTRY_KEY) == "location":
        files.add(texts.get(_ENTRY_VALUE, ""))


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field; other fields are skipped."""
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(view, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, at = _varint(view, at)
            if at + size > len(view):
                raise ValueError("a field runs past the end")
            yield tag >> 3, view[at : at + size]
            at += size
        else:
            raise ValueError(f"unknown wire type {wire}")
    if at != len(view):
        raise ValueError("a field runs past the end")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")

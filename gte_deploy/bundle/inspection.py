"""Finds the operators that an ONNX file calls and the files that it reads, without the `onnx` package.

The file is read as strictly as `gte_deploy.bundle.wire` says, and may have only the fields of `onnx_fields`. So every
engine's parser sees what the inspection saw, or the file is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gte_deploy.bundle.manifest import GraphEntry, GraphPart, Manifest
from gte_deploy.bundle.onnx_fields import MESSAGES
from gte_deploy.bundle.wire import Message, Schema, encode_field, encode_number, map_fields
from gte_deploy.core.errors import BundleError

# Domains that are built into every engine. Operators of another domain need a library of custom operators.
_ALLOWED_DOMAINS = frozenset(("", "ai.onnx", "com.microsoft"))
# Operators of TensorRT's own parser, which padding-free graphs use.
_ALLOWED_OPERATORS = frozenset((("trt", "TRT_Attention"),))
# A node that wraps an accelerator's compiled engine: executable code that cannot be inspected.
_REFUSED_OPERATORS = frozenset(("EPContext",))

# `file_identifier` in ExecuTorch's schema/program.fbs; it stands behind the offset of the root table.
_PROGRAM_IDENTIFIER = b"ET12"

_SCHEMA = Schema(
    MESSAGES,
    kept={
        "NodeProto": frozenset(("op_type", "domain")),
        "TensorProto": frozenset(("name", "data_type", "dims", "data_location", "external_data")),
        "StringStringEntryProto": frozenset(("key", "value")),
    },
)
_EXTERNAL = 1  # TensorProto.DataLocation
_EXTERNAL_KEYS = frozenset(("location", "offset", "length", "checksum"))
_MAX_FILE_BYTES = 1 << 31
# How many messages are around an initializer of the main graph: the graph and the model.
_INITIALIZER_DEPTH = 2
_MODEL_GRAPH, _GRAPH_INITIALIZER, _GRAPH_INPUT = 7, 5, 11


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor of a graph whose data are in another file.

    Args:
        name: name of the initializer.
        data_type: number of its type in `TensorProto.DataType`.
        dims: its shape.
        location: the file, relative to the folder of the graph.
        offset: where its data begin in the file, in bytes.
        length: number of bytes; None for all that its type and shape need.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class OnnxContents:
    """Operators as (domain, name), and the tensors whose data are in other files."""

    operators: frozenset[tuple[str, str]]
    external: tuple[ExternalTensor, ...]

    @property
    def external_files(self) -> frozenset[str]:
        """The paths of external data relative to the folder of the file."""
        return frozenset(tensor.location for tensor in self.external)


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Refuse a bundle with a graph that calls foreign code or reads files that are not in the manifest.

    Raises:
        BundleError: a graph has an operator of another domain, an EPContext node, data outside the manifest, or an
            encoding that parsers read differently.
    """
    check_program(folder, manifest)
    for graph in onnx_graphs(manifest):
        check_graph(graph.path, inspect_onnx(folder / graph.path), manifest)


def onnx_graphs(manifest: Manifest) -> tuple[GraphEntry | GraphPart, ...]:
    """Return every ONNX file of a bundle: the graphs of all engines, and their parts."""
    entries = (entry for engine, entry in manifest.graphs.items() if engine != "executorch")
    return tuple(graph for entry in entries for graph in entry.files)


def check_graph(path: str, contents: OnnxContents, manifest: Manifest) -> None:
    """Refuse what a graph of a bundle contains; `path` is its path in the bundle. Raises as `check_graphs`."""
    for domain, operator in sorted(contents.operators):
        known = domain in _ALLOWED_DOMAINS or (domain, operator) in _ALLOWED_OPERATORS
        if operator in _REFUSED_OPERATORS or not known:
            raise BundleError(
                f"{path} has a node {domain or 'ai.onnx'}::{operator}. Compiled engines and custom operators "
                "are not loaded from a bundle; export the checkpoint with gte-export."
            )
    for location in sorted(contents.external_files):
        plain = str(PurePosixPath(location)) == location and not location.startswith("/")
        if not plain or str(PurePosixPath(path).parent / location) not in manifest.files:
            raise BundleError(f"{path} reads {location!r}, which the manifest does not name.")


def check_program(folder: Path, manifest: Manifest) -> None:
    """Refuse a file that is no program for ExecuTorch, by the identifier of its FlatBuffers schema.

    A program calls the operators that the runtime was built with; it holds no code.

    Raises:
        BundleError: the bundle is made for ExecuTorch, and its file is something else.
    """
    if (program := manifest.graphs.get("executorch")) is None:
        return
    with (folder / program.path).open("rb") as file:
        if file.read(8)[4:] != _PROGRAM_IDENTIFIER:
            raise BundleError(f"{program.path} is not a program for ExecuTorch. Export the bundle again.")


def inspect_onnx(path: Path) -> OnnxContents:
    """Read the operators and external data of an ONNX file.

    Raises:
        BundleError: the file cannot be read, or is not an ONNX model in the one encoding that all parsers read alike.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size < _MAX_FILE_BYTES else b""
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error}). Export the bundle again.") from error
    return inspect_bytes(data, path)


def inspect_bytes(data: bytes, path: Path | str) -> OnnxContents:
    """Read the operators and external data of an ONNX file's content; `path` is for messages. See `inspect_onnx`."""
    if not 0 < len(data) < _MAX_FILE_BYTES:
        raise BundleError(f"{path} is not an ONNX model: it is empty, or has 2 GiB or more. Export the bundle again.")
    found = _Found()
    try:
        _SCHEMA.read(data, "ModelProto", found.visit)
    except ValueError as error:
        raise BundleError(f"{path} is not an ONNX model ({error}). Export the bundle again.") from error
    return OnnxContents(frozenset(found.operators), tuple(found.external))


class _Found:
    """Collects what the messages of a model say."""

    def __init__(self) -> None:
        self.operators: set[tuple[str, str]] = set()
        self.external: list[ExternalTensor] = []

    def visit(self, message: str, fields: Message, depth: int) -> None:
        if message == "NodeProto":
            self.operators.add((fields.get("domain", ""), fields.get("op_type", "")))
        elif message == "TensorProto" and ("external_data" in fields or fields.get("data_location") == _EXTERNAL):
            tensor = _external_tensor(fields)
            if depth != _INITIALIZER_DEPTH:
                raise ValueError(f"the tensor {tensor.name!r} is no initializer, and has its data in another file")
            self.external.append(tensor)


def _external_tensor(fields: Message) -> ExternalTensor:
    name = fields.get("name", "")
    entries = [(entry.get("key", ""), entry.get("value", "")) for entry in fields.get("external_data", ())]
    values = dict(entries)
    if len(values) < len(entries) or not values.keys() <= _EXTERNAL_KEYS:
        raise ValueError(f"the external data of {name!r} have the keys {', '.join(key for key, _ in entries)}")
    if fields.get("data_location") != _EXTERNAL or not values.get("location"):
        raise ValueError(f"it is not clear whether the data of {name!r} are in another file")
    # Engines take the location */_ORT_MEM_ADDR_/* for the offset's address in their own memory.
    if "*" in values["location"]:
        raise ValueError(f"the data of {name!r} are in no file, but in {values['location']!r}")
    numbers = {key: values[key] for key in ("offset", "length") if key in values}
    if not all(re.fullmatch("[0-9]{1,18}", value) for value in numbers.values()):
        raise ValueError(f"the external data of {name!r} have the place {numbers}")
    return ExternalTensor(
        name=name,
        data_type=fields.get("data_type", 0),
        dims=tuple(fields.get("dims", ())),
        location=values["location"],
        offset=int(numbers.get("offset", 0)),
        length=int(numbers["length"]) if "length" in numbers else None,
    )


def with_data_as_inputs(data: bytes, external: Sequence[ExternalTensor]) -> bytes:
    """Return an inspected ONNX file in which the tensors in other files are no initializers, but inputs of the graph.

    Args:
        data: the file; `inspect_bytes` accepted it.
        external: all of its tensors in other files, as `inspect_bytes` found them.
    """

    def without_external(tensor: bytes) -> bytes | None:
        return None if "external_data" in _SCHEMA.read(tensor, "TensorProto") else tensor

    def changed(graph: bytes) -> bytes:
        inputs = (encode_field(_GRAPH_INPUT, _value_info(tensor)) for tensor in external)
        return map_fields(graph, _GRAPH_INITIALIZER, without_external) + b"".join(inputs)

    return map_fields(data, _MODEL_GRAPH, changed)


def _value_info(tensor: ExternalTensor) -> bytes:
    """Encode a ValueInfoProto: name, and type with tensor_type, which has elem_type, and shape with each dim_value."""
    dims = b"".join(encode_field(1, encode_number(1, size)) for size in tensor.dims)
    type = encode_number(1, tensor.data_type) + encode_field(2, dims)
    return encode_field(1, tensor.name.encode()) + encode_field(2, encode_field(1, type))

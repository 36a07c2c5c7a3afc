"""A bundle whose files are open: verified, inspected, and handed to the engines as they were verified."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gte_deploy.bundle.held import HeldFile
from gte_deploy.bundle.inspection import (
    ExternalTensor,
    OnnxContents,
    check_graph,
    check_program,
    inspect_bytes,
    onnx_graphs,
)
from gte_deploy.bundle.manifest import GraphEntry, GraphPart, Manifest
from gte_deploy.core.errors import BundleError
from gte_deploy.core.regular import MAX_JSON_BYTES
from gte_deploy.core.spec import TOKENIZER_NAMES


@dataclass(frozen=True)
class VerifiedGraph:
    """An ONNX graph of a bundle: its verified content, and the open files of its data.

    Args:
        file: the graph; its content is kept.
        external: its tensors in other files.
        data: location in the graph -> the file.
    """

    file: HeldFile
    external: tuple[ExternalTensor, ...]
    data: Mapping[str, HeldFile]

    def __str__(self) -> str:
        return str(self.file.path)

    @property
    def path(self) -> Path:
        """The path of the graph, for engines that can open nothing else."""
        return self.file.path

    @property
    def content(self) -> bytes:
        """The bytes of the graph that were hashed and inspected."""
        assert self.file.content is not None
        return self.file.content

    def require_unchanged(self) -> None:
        """Refuse data into which something was written since they were verified. Raises as `HeldFile`."""
        for file in self.data.values():
            file.require_unchanged()

    def release_pages(self) -> None:
        """Take the pages of its data out of the resident memory, once an engine has copies of what it uses most."""
        for file in self.data.values():
            file.release_pages()

    def require_same_paths(self) -> None:
        """Refuse paths that lead to other files by now, after an engine opened them by path. Raises as `HeldFile`."""
        for file in (self.file, *self.data.values()):
            file.require_same_path()


class VerifiedBundle:
    """A bundle with each file of its manifest open, until `close`. Its graphs keep their own files open longer."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Verify every file against the manifest, and inspect every graph.

        Raises:
            BundleError: a file is missing or differs, or a graph calls foreign code or reads files that are not in the
                manifest.
        """
        self.folder = folder
        self.manifest = manifest
        names = {graph.path for graph in onnx_graphs(self.manifest)}
        kept = {name for name in self._read_by_content() if name in manifest.files}
        for name in kept:
            if (size := manifest.files[name].size) > MAX_JSON_BYTES:
                raise BundleError(f"{folder / name} has {size:,} bytes; expected at most {MAX_JSON_BYTES:,}")
        self._files = {
            name: HeldFile(folder, name, entry.size, entry.sha256, keeps_content=name in names | kept)
            for name, entry in self.manifest.files.items()
        }
        self._contents: dict[str, OnnxContents] = {}
        for name in sorted(names):
            file = self._files[name]
            assert file.content is not None
            self._contents[name] = inspect_bytes(file.content, file.path)
            check_graph(name, self._contents[name], self.manifest)
        check_program(folder, self.manifest)

    def _read_by_content(self) -> tuple[str, ...]:
        sparse = self.manifest.spec.sparse
        weights = None if sparse is None else sparse.query_weights
        return TOKENIZER_NAMES if weights is None else (*TOKENIZER_NAMES, weights)

    def contents(self) -> dict[str, bytes]:
        """Return the verified content of the tokenizer's files and of stored query weights: name -> bytes."""
        found = {name: self._files[name].content for name in self._read_by_content() if name in self._files}
        return {name: content for name, content in found.items() if content is not None}

    def graph(self, entry: GraphEntry | GraphPart) -> VerifiedGraph:
        """Return an ONNX graph of the bundle."""
        contents, folder = self._contents[entry.path], PurePosixPath(entry.path).parent
        data = {location: self._files[str(folder / location)] for location in contents.external_files}
        return VerifiedGraph(self._files[entry.path], contents.external, data)

    def require_same_paths(self) -> None:
        """Refuse a bundle in which a file was replaced since it was verified.

        For the files that are read by path: a program for ExecuTorch, everything for a GPU and others.

        Raises:
            BundleError: the message names the file.
        """
        for file in self._files.values():
            file.require_same_path()

    def close(self) -> None:
        """Close every file but the weights of the graphs that are in use."""
        for name in self._contents:
            self._files[name].close()
        self._files = {}
        self._contents = {}

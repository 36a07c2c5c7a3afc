"""Opens the graph that computes least for the outputs of a call: the whole graph of a bundle, or one of its parts."""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from gte_deploy.bundle.inspection import inspect_onnx
from gte_deploy.bundle.manifest import GraphEntry, GraphPart
from gte_deploy.bundle.verified import VerifiedBundle, VerifiedGraph
from gte_deploy.core.errors import BackendError
from gte_deploy.core.files import is_below
from gte_deploy.tasks.base import HIDDEN

OutputNames = tuple[str, ...]
GraphFile = Path | VerifiedGraph
"""A graph that an engine can open: one of a verified bundle, or any file."""
GraphFiles = Mapping[OutputNames, GraphFile]
"""The names of a graph's outputs -> its file: the whole graph with all outputs, and its parts."""

Opened = TypeVar("Opened")
"""An engine's own object for an open graph."""


def graph_files(folder: Path, entry: GraphEntry) -> GraphFiles:
    """Return the files of a graph in the folder of a bundle, and of its parts. Nothing is verified."""
    return {_output_names(graph): folder / graph.path for graph in entry.with_parts}


def verified_graphs(bundle: VerifiedBundle, entry: GraphEntry) -> GraphFiles:
    """Return a graph of a bundle, and its parts, as they were verified."""
    return {_output_names(graph): bundle.graph(graph) for graph in entry.with_parts}


def _output_names(graph: GraphEntry | GraphPart) -> OutputNames:
    return tuple(tensor.name for tensor in graph.outputs)


@contextlib.contextmanager
def without_links(graph: Path) -> Iterator[Path]:
    """Yield the path of a graph whose files are no links: itself, or a copy in a temporary folder.

    The Hugging Face cache holds links to files of other names in another folder, and OpenVINO refuses data outside the
    graph's folder. The copy consists of hard links, which take no space; only if the file system has none are the
    files copied. A process may map the files and go on after the folder is gone.

    Raises:
        OSError: a file cannot be read, or there is no space for a copy.
    """
    # OpenVINO's own format is opened only where an export has just written it.
    names = [graph.name, *(sorted(inspect_onnx(graph).external_files) if graph.suffix == ".onnx" else ())]
    if not any((graph.parent / name).is_symlink() for name in names) or not all(map(is_below, names)):
        yield graph
        return
    with contextlib.ExitStack() as stack:
        yield _copy_of(graph.parent, names, stack) / graph.name


def _copy_of(folder: Path, names: Sequence[str], stack: contextlib.ExitStack) -> Path:
    sources = {name: (folder / name).resolve() for name in names}
    # A hard link must be on the file system of its target: beside the folder of the first file, if we may write there.
    beside = sources[names[0]].parent.parent
    for parent, make in ((beside, os.link), (None, os.link), (None, shutil.copyfile)):
        with contextlib.ExitStack() as attempt, contextlib.suppress(OSError):
            copy = Path(attempt.enter_context(tempfile.TemporaryDirectory(prefix=".gte-deploy-", dir=parent)))
            for name, source in sources.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                make(source, copy / name)
            stack.push(attempt.pop_all())
            return copy
    raise OSError(
        f"the files of {folder} are links out of the folder, and no copy can be written to the folder for temporary "
        "files. Set TMPDIR to a writable folder, or load the bundle with backend='onnx'"
    )


class OpenGraphs(Generic[Opened]):
    """A graph and its parts. Each of them is opened once, with its own copy of the weights; threads may share them.

    The graph that the model's own answer needs opens at once, so that a graph that cannot run fails when it is loaded.
    Every other one opens at the first call that needs it.
    """

    def __init__(
        self,
        files: GraphFiles,
        open_graph: Callable[[OutputNames, GraphFile], Opened],
        opened: Mapping[OutputNames, Opened] | None = None,
    ) -> None:
        """Open the graph for the answer: for all outputs besides the hidden states.

        Args:
            files: the graphs.
            open_graph: opens a file that computes these outputs.
            opened: those that are open already.

        Raises:
            BackendError: the engine refuses the graph.
        """
        self._files = sorted(files.items(), key=lambda file: len(file[0]))
        self._open_graph = open_graph
        self._opened: dict[OutputNames, Opened] | None = dict(opened or {})
        self._lock = threading.Lock()
        self.outputs = self._files[-1][0]
        """The names of all outputs."""
        self.for_outputs([name for name in self.outputs if name != HIDDEN] or self.outputs)

    def for_outputs(self, names: Sequence[str]) -> Opened:
        """Return the graph with the fewest outputs that has all of `names`, which are known; the first call opens it.

        Raises:
            BackendError: the graphs are closed, the engine refuses the graph, or its data have changed since they were
                verified.
        """
        wanted = set(names)
        files = self._files
        if self._opened is None:
            raise BackendError("this model is closed; load it again")
        outputs, file = next(choice for choice in files if wanted.issubset(choice[0]))
        if not isinstance(file, Path):
            file.require_unchanged()
        # Without the lock: calls for an open graph need not wait until another one is open.
        graph = None if self._opened is None else self._opened.get(outputs)
        if graph is None:
            with self._lock:
                if self._opened is None:
                    raise BackendError("this model is closed; load it again")
                if outputs not in self._opened:
                    self._opened[outputs] = self._open_graph(outputs, file)
                graph = self._opened[outputs]
        return graph

    def close(self) -> None:
        """Drop the open graphs and their files. Idempotent."""
        with self._lock:
            self._opened = None
            self._files = []

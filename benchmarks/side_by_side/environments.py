"""The processes of peers that need other versions of our requirements, in the environments of tests/support.

python tests/support/environments.py openvino onnx infinity    # then benchmarks/inference.py measures these peers
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gte_deploy.core.quiet import without_openvino_telemetry
from gte_deploy.tuning.measure import Answer, Worker, WorkerError, serve_calls

if TYPE_CHECKING:
    from side_by_side.workloads import Job

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ("openvino", "onnx", "infinity")


@functools.cache
def _environments() -> ModuleType:
    """Import tests/support/environments.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("environments", ROOT / "tests" / "support" / "environments.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreter(name: str) -> Path:
    """Return the interpreter of an environment that is made.

    Raises:
        WorkerError: there is none; the message is pip's, or names the command that makes it.
    """
    try:
        return _environments().interpreter(name)
    except _environments().Unavailable as error:
        raise WorkerError(str(error)) from error


def versions(name: str, distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of the installed ones of these distributions; empty if there is no such environment."""
    return _environments().versions(name, distributions)


class _Process(subprocess.Popen[bytes]):
    """A process with the interface that `Worker` uses of `multiprocessing.Process`."""

    @property
    def exitcode(self) -> int | None:
        return self.returncode

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self, timeout: float | None = None) -> None:
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            pass


class EnvironmentWorker(Worker):
    """A `Worker` whose process runs another environment's interpreter, with the classes of `peers` alone."""

    def __init__(
        self,
        python: Path,
        factory: type,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        *,
        cpus: int | None,
        timeout_s: float,
    ) -> None:
        """Start the process and wait until `factory(*arguments, **options)` has returned in it.

        Raises:
            WorkerError: the peer cannot be opened.
        """
        self._timeout_s = timeout_s
        self.peak_bytes = 0
        self._connection, theirs = Pipe()
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        self._process: Any = _Process(
            [python, "-c", "from side_by_side.environments import serve; serve()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        )
        theirs.close()
        self._connection.send((cpus, factory, arguments, options))
        self._receive()

    def call(self, method: str, job: Job) -> Answer:  # type: ignore[override]
        """Call a method of the peer with the job's texts; see `Worker.call`."""
        return super().call(method, job.texts)


def serve() -> None:
    """Answer the calls of an `EnvironmentWorker`; sys.argv[1] is the file descriptor of the pipe."""
    connection = Connection(int(sys.argv[1]))
    cpus, factory, arguments, options = connection.recv()
    with without_openvino_telemetry():  # the peers import openvino
        serve_calls(connection, cpus, functools.partial(factory, **options), arguments)

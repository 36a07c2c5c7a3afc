"""Virtual environments for peers that need other versions of our requirements, and the processes that run in them.

Each lies under build/, is made once, and is used for the benchmark only:

    python benchmarks/peers.py                   # make all; then benchmarks/inference.py measures these peers as well
    python benchmarks/peers.py infinity          # make one
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.quiet import without_openvino_telemetry
from gte_deploy.tuning.measure import Answer, Worker, WorkerError, serve_calls

if TYPE_CHECKING:
    from side_by_side.workloads import Job

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / "build" / "peers"

REQUIREMENTS = {
    "openvino": ("sentence-transformers[openvino]>=6",),
    "onnx": ("sentence-transformers[onnx]",),
    "infinity": ("infinity-emb[torch,optimum]",),
}
_FAILED = "failed.txt"
_DONE = "requirements.txt"
_PIP_MINUTES = 30


def requirements_of(name: str) -> tuple[str, ...]:
    """Return the requirements of an environment of REQUIREMENTS, with the same torch as here."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    return (*REQUIREMENTS[name], f"torch=={torch}")


def make(name: str, requirements: Sequence[str], *, folder: Path = ENVIRONMENTS) -> Path:
    """Make a virtual environment, unless it exists with these requirements, and return its interpreter.

    Raises:
        WorkerError: pip cannot install the requirements; the message is pip's. `interpreter` repeats it.
    """
    target = folder / name
    wanted = "\n".join(requirements) + "\n"
    done = target / _DONE
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return _python(target)
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, with_pip=True)
    pip = [str(_python(target)), "-m", "pip", "--quiet"]
    try:
        ended = subprocess.run(
            [*pip, "install", *requirements], capture_output=True, text=True, check=False, timeout=_PIP_MINUTES * 60
        )
        # Texts need no torchvision, and one that was built for another build of torch breaks transformers.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], capture_output=True, check=False)
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        message = None if ended.returncode == 0 else " ".join(errors) or f"pip ended with {ended.returncode}"
    except subprocess.TimeoutExpired:
        message = f"pip took longer than {_PIP_MINUTES} minutes"
    if message is not None:
        (target / _FAILED).write_text(message, encoding="utf-8")
        raise WorkerError(message)
    done.write_text(wanted, encoding="utf-8")
    return _python(target)


def interpreter(name: str, *, folder: Path = ENVIRONMENTS) -> Path:
    """Return the interpreter of an environment that `make` made.

    Raises:
        WorkerError: there is none; the message is pip's, or names the command that makes it.
    """
    target = folder / name
    if (target / _DONE).is_file():
        return _python(target)
    if (target / _FAILED).is_file():
        raise WorkerError(f"pip could not install it: {(target / _FAILED).read_text(encoding='utf-8')}")
    raise WorkerError(f"it needs an environment of its own: python benchmarks/peers.py {name}")


def versions(name: str, distributions: Sequence[str], *, folder: Path = ENVIRONMENTS) -> dict[str, str]:
    """Return the versions of the installed ones of these distributions; empty if there is no such environment."""
    try:
        python = interpreter(name, folder=folder)
    except WorkerError:
        return {}
    code = (
        "import importlib.metadata as m, sys\n"
        "for d in m.distributions():\n"
        "    if d.metadata['Name'].lower().replace('_', '-') in sys.argv[1:]:\n"
        "        print(d.metadata['Name'].lower().replace('_', '-'), d.version)"
    )
    listed = subprocess.run([python, "-c", code, *distributions], capture_output=True, text=True, check=True).stdout
    return dict(sorted(line.split() for line in listed.splitlines()))


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


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"

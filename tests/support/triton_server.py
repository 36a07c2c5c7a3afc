"""A real Triton on the CPU, without root or containers: set up once, started on loopback for tests and benchmarks.

    python tests/support/triton_server.py    # set it up under build/triton-server; nothing to do when repeated

The server is the one in NVIDIA's wheel `nvidia-pytriton`: the tritonserver binary with its Python backend, response
cache and metrics. The ONNX Runtime backend is on no package index, so the models that name it run on a stand-in,
`tests/triton/onnxruntime_backend/model.py`: the same checks of config.pbtxt against the graph, the same onnxruntime
library, behind Triton's interface for Python-based backends. Everything else (HTTP and gRPC, ensembles, dynamic
batching, queues, warm-up, statistics) is Triton itself.

The Python backend wants numpy 1, so its models get a small virtual environment that holds it in front of the packages
of this one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "triton-server"
BACKEND = ROOT / "tests" / "triton" / "onnxruntime_backend" / "model.py"

VERSION = "2.51"

_WHEEL = "nvidia-pytriton==0.7.0"
_NUMPY = "numpy==1.26.4"
_PYTHON = "{}.{}".format(*sys.version_info)
_LIBRARY_FOLDER = sysconfig.get_config_var("LIBDIR")
_PORT_TRIES = 3
_STOP_S = 30.0
_LOG_CHARS = 20_000
# Runs before the server in its process. A preexec_fn would run between fork and exec, where a process with other
# threads (gRPC's, an engine's) may only call what is safe in a signal handler, and can lock up for good.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Unavailable(Exception):
    """The wheel cannot be had here: no index, no build for this machine, or none for this Python."""


class ServerError(Exception):
    """The server cannot run, or refused a repository; the message ends with its log."""


def install(folder: Path = FOLDER) -> Path:
    """Set the server up in `folder`, once for all processes.

    Raises:
        Unavailable: the wheel cannot be had, with pip's reason.
        ServerError: it was had and cannot run here.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_done(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _install(folder)
            _done(folder).write_text(_stamp(), encoding="utf-8")
    return folder


def _is_done(folder: Path) -> bool:
    return _done(folder).is_file() and _done(folder).read_text(encoding="utf-8") == _stamp()


def _done(folder: Path) -> Path:
    return folder / "done"


def _stamp() -> str:
    return f"{_WHEEL} {_NUMPY} {sys.executable} {_PYTHON}\n"


def _install(folder: Path) -> None:
    _pip_install(_WHEEL, folder / "wheel")
    server = _server(folder)
    stub = server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        raise Unavailable(f"{_WHEEL} holds no Python backend for Python {_PYTHON}")
    stub = Path(shutil.copy(stub, server / "backends" / "python"))
    for program in (stub, server / "bin" / "tritonserver"):
        program.chmod(0o755)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = environment / "lib" / f"python{_PYTHON}" / "site-packages"
    _pip_install(_NUMPY, packages)
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _check_libraries(folder, stub)


def _pip_install(package: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    options = ["--no-deps", "--only-binary", ":all:", "--target", str(target)]
    done = subprocess.run([*command, *options, package], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"pip cannot install {package}: {done.stderr.strip()[-500:]}")


def _check_libraries(folder: Path, stub: Path) -> None:
    found = subprocess.run(["ldd", stub], env=_environment(folder), capture_output=True, text=True).stdout
    missing = [line.split()[0] for line in found.splitlines() if "not found" in line]
    if missing:
        raise ServerError(
            f"Triton's Python backend needs {', '.join(missing)}. A shared libpython{_PYTHON} comes with "
            f"`apt-get install libpython{_PYTHON}`, or with a Python built with --enable-shared."
        )


def _server(folder: Path) -> Path:
    return folder / "wheel" / "pytriton" / "tritonserver"


def _environment(folder: Path) -> dict[str, str]:
    # The stub takes the first virtual environment on PATH for its own.
    libraries = [str(folder / "wheel" / "nvidia_pytriton.libs"), _LIBRARY_FOLDER]
    environment = {
        **os.environ,
        "PATH": f"{folder / 'environment' / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("VIRTUAL_ENV", None)
    return environment


class Server:
    """A running tritonserver over one model repository; ends with the `with` block, or with this process.

    `http`, `grpc` and `metrics` are HOST:PORT. Close HTTP clients before leaving: Triton waits for them.
    """

    def __init__(
        self,
        repository: Path,
        *arguments: str,
        folder: Path = FOLDER,
        config_name: str = "cpu",
        timeout_s: float = 600.0,
    ) -> None:
        """Start it and wait until every model is ready.

        Args:
            repository: a folder of models.
            arguments: more of the server's options.
            folder: where `install` put it.
            config_name: of the files `configs/NAME.pbtxt` to use where a model has one.
            timeout_s: for the models to get ready.

        Raises:
            ServerError: it ended or did not get ready in time.
        """
        self._process: subprocess.Popen[bytes] | None = None
        descriptor, name = tempfile.mkstemp(prefix="triton-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        self._bin = _server(folder) / "bin" / "tritonserver"
        self._environment = _environment(folder)
        options = [
            f"--model-repository={repository}",
            f"--backend-directory={_server(folder) / 'backends'}",
            f"--cache-directory={_server(folder) / 'caches'}",
            f"--model-config-name={config_name}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=10",
            *arguments,
        ]
        _put_backend(_server(folder))
        try:
            for tries_left in reversed(range(_PORT_TRIES)):
                if self._started(options, timeout_s):
                    return
                if not tries_left or "ddress already in use" not in self.log():
                    raise ServerError(f"tritonserver did not get ready with {repository}\n{self.log()[-_LOG_CHARS:]}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The server's process; the processes of Python models are its children."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What the server wrote so far, without its tables."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.is_file() else ""
        return "\n".join(line for line in text.splitlines() if not line.startswith(("+", "|")))

    def close(self) -> None:
        """Stop it: politely, then not. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)  # its Python models live in processes of their own
                self._process.wait()
        self._log.unlink(missing_ok=True)

    def _started(self, options: list[str], timeout_s: float) -> bool:
        ports = _free_ports(3)
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)
        names = ("http", "grpc", "metrics")
        command = [
            *(sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(os.getpid())),
            str(self._bin),
            *options,
            *(f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        end = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < end:
            # The metrics have a listener of their own, which may begin after the models are ready.
            if _answers(f"http://{self.http}/v2/health/ready") and _answers(f"http://{self.metrics}/metrics"):
                return True
            time.sleep(0.05)
        return False


def _put_backend(server: Path) -> None:
    # Renamed into place: another process may be starting a server now.
    target = server / "backends" / "onnxruntime" / "model.py"
    target.parent.mkdir(exist_ok=True)
    aside = target.with_name(f".{os.getpid()}.tmp")
    shutil.copy(BACKEND, aside)
    aside.replace(target)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    try:
        print(install())
    except Unavailable as error:
        sys.exit(f"Triton's tests will be skipped: {error}")

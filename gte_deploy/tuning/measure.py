"""Fair timing: every contestant has its own process, and they are called in turn while the others wait."""

import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import BackendError, GteDeployError

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing since Python 3.11

PAUSE_S = 0.1
"""Pause before every timed call: threads of ONNX Runtime and OpenMP spin for a while and slow down the next call."""

_STOP_S = 5.0


class WorkerError(BackendError):
    """A worker could not open its contestant, or a call failed, took too long or ended the process."""


@dataclass(frozen=True)
class Answer:
    """The result of a call, its seconds, and the highest resident memory of the process until then."""

    value: Any
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Spread:
    """Seconds of several calls: median, quartiles and minimum."""

    median: float
    q1: float
    q3: float
    least: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """The spread of at least one number."""
        if len(seconds) == 1:
            return cls(*(float(seconds[0]),) * 4)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median=median, q1=q1, q3=q3, least=min(seconds))


class Worker:
    """A new process with one contestant, which waits without computing until it is called.

    The process is spawned, not forked, so it has its own memory and thread pools. `peak_bytes` is its highest resident
    memory until the end of the last call.
    """

    def __init__(
        self, factory: Callable[..., Any], *arguments: Any, cpus: int | None = None, timeout_s: float = math.inf
    ) -> None:
        """Start the process and wait until `factory(*arguments)` has returned in it.

        Args:
            factory: a function or class of a module, so that it can be pickled.
            arguments: arguments of the factory.
            cpus: number of CPUs for the process; None for all that it may use.
            timeout_s: seconds after which opening or a call fails and the process is ended.

        Raises:
            WorkerError: the factory failed.
        """
        self._timeout_s = timeout_s
        self.peak_bytes = 0
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve_calls, args=(theirs, cpus, factory, arguments))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process ends
        self._receive()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Answer:
        """Call a method of the contestant; only the call itself is timed.

        Raises:
            WorkerError: the call failed, took too long, or ended the process.
        """
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise WorkerError("its process has ended") from error
        return self._receive()

    def close(self) -> None:
        """End the process. Idempotent."""
        self._connection.close()
        self._process.join(_STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Answer:
        try:
            if not self._connection.poll(None if math.isinf(self._timeout_s) else self._timeout_s):
                self._process.kill()
                self.close()
                raise WorkerError(f"no answer in {self._timeout_s:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise WorkerError(f"its process ended with exit code {self._process.exitcode}") from error
        if isinstance(answer, str):
            raise WorkerError(answer)
        assert isinstance(answer, Answer)
        self.peak_bytes = answer.peak_bytes
        return answer


def interleaved(
    calls: Mapping[str, Callable[[], float]], *, repeats: int, at_least: int = 1, budget_s: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call each in turn, in `repeats` rounds, so that a disturbance of the machine affects all alike.

    Args:
        calls: name -> a function that makes one call and returns its seconds.
        repeats: the most rounds.
        at_least: the least rounds, however long they take.
        budget_s: seconds; a round that would end later does not begin.

    Returns:
        Name -> seconds of its calls, and name -> message of a WorkerError.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    started = time.monotonic()
    for number in range(repeats):
        spent = time.monotonic() - started
        if number >= max(1, at_least) and spent + spent / number > budget_s:
            break
        for name, call in calls.items():
            if name in errors:
                continue
            time.sleep(PAUSE_S)
            try:
                seconds[name].append(call())
            except WorkerError as error:
                errors[name] = str(error)
    return seconds, errors


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far (VmHWM), in bytes; 0 if the system does not report it."""
    return _status_bytes("VmHWM:")


def resident_bytes() -> int:
    """The resident memory of this process (VmRSS), in bytes; 0 if the system does not report it."""
    return _status_bytes("VmRSS:")


def _status_bytes(field: str) -> int:
    # Not getrusage: a process inherits that maximum from the process that started it.
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def serve_calls(
    connection: Connection, cpus: int | None, factory: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Run in the process of a `Worker`: answer calls until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which then closes the pipe
    os.dup2(2, 1)  # the output of libraries does not belong on stdout
    if cpus is not None and hasattr(os, "sched_getaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    try:
        subject = _timed(factory, arguments)
        connection.send(subject if isinstance(subject, str) else Answer(None, subject.seconds, subject.peak_bytes))
        while not isinstance(subject, str):
            method, values = connection.recv()
            connection.send(_timed(getattr(subject.value, method), values))
    except (EOFError, OSError):
        return


def _timed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer | str:
    started = time.perf_counter()
    try:
        value = function(*arguments)
    except GteDeployError as error:
        return str(error)
    except Exception as error:  # a contestant is foreign code: any exception is its result
        return f"{type(error).__name__}: {error}"
    return Answer(value, time.perf_counter() - started, peak_resident_bytes())

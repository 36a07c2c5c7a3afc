"""The backend of a model in a process that was forked after the model was loaded."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Backend, Batch
from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.joining import JoiningBackend
from gte_deploy.backends.torch import TorchBackend
from gte_deploy.core.errors import BackendError
from gte_deploy.core.forking import keep_for_good
from gte_deploy.core.spec import Precision

logger = logging.getLogger(__name__)

Reopen = Callable[[int], Backend]
"""Opens the same backend again with a given number of threads."""

# Opening takes a second or less. A thread opens the engine and is abandoned after this time: a child must not hang.
PATIENCE_S = 60.0
_ADVICE = "Load the model after the fork, in each process that uses it."


class ReopenedBackend:
    """Opens the parent's engine again at the first run, or says why a forked process cannot have it."""

    def __init__(self, inherited: Backend, reopen: Reopen | None, *, num_threads: int, refusal: str | None) -> None:
        """Take the place of `inherited`; with `refusal`, every run raises it."""
        self.name = inherited.name
        self.device = inherited.device
        self.outputs = inherited.outputs
        self.precision: Precision = inherited.precision
        self.num_threads = num_threads
        self._reopen = reopen
        self._refusal = refusal
        self._backend: Backend | None = None
        self._closed = False
        self._lock = threading.Lock()

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        return self._opened().run(batch, outputs)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._closed = True
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _opened(self) -> Backend:
        with self._lock:
            if self._closed:
                raise BackendError("this model is closed; load it again")
            if self._refusal is not None or self._reopen is None:
                raise BackendError(self._refusal or _refusal(self, "nobody knows how it was opened"))
            if self._backend is None:
                self._backend = self._open(self._reopen)
            return self._backend

    def _open(self, reopen: Reopen) -> Backend:
        result: list[Backend | BaseException] = []

        def open_it() -> None:
            try:
                result.append(reopen(self.num_threads))
            except BaseException as error:  # noqa: B036 - raised below, in the calling thread
                result.append(error)

        logger.info("a forked process opens its own engine: %s with %d threads", self.name, self.num_threads)
        thread = threading.Thread(target=open_it, name="gte-reopen", daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if not result:
            self._refusal = _refusal(self, f"{self.name} did not open again within {PATIENCE_S:.0f} s")
            raise BackendError(self._refusal)
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]


def after_fork(inherited: Backend, reopen: Reopen | None, *, idle: bool) -> Backend:
    """The backend that replaces `inherited` in a forked child; `idle` says that no engine computed at the fork."""
    if isinstance(inherited, JoiningBackend):
        return inherited.over(after_fork(inherited.inner, reopen, idle=idle))
    refusal = None
    if parse_device(inherited.device)[0] != "cpu":
        refusal = _refusal(inherited, "CUDA does not survive a fork")
    elif not idle:
        refusal = _refusal(inherited, "an engine was computing or being opened at the fork")
    elif isinstance(inherited, TorchBackend):
        inherited.compute_in_forked_process()
        return inherited
    keep_for_good(inherited)
    # TBB starts its threads once per process and has none in a child, so OpenVINO computes in the calling thread only.
    num_threads = 1 if inherited.name == "openvino" else inherited.num_threads
    return ReopenedBackend(inherited, reopen, num_threads=num_threads, refusal=refusal)


def _refusal(backend: Any, why: str) -> str:
    return f"this model was loaded before the process forked, and {why} ({backend.name} on {backend.device}). {_ADVICE}"

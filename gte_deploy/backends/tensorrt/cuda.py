"""The few calls of the CUDA runtime that a backend needs, each with its errors checked."""

import ctypes
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Thread(threading.local):
    """The state of the calling thread: whether it captures, and what it frees after the capture."""

    is_capturing = False

    def __init__(self) -> None:
        self.postponed: list[Callable[[], None]] = []


_thread = _Thread()


class Cuda:
    """One GPU. All methods but `capability` work in a `with` block of `use` alone."""

    def __init__(self, index: int, *, extra: str = "rtx", runtime: Any = None) -> None:
        """Find GPU number `index`; `extra` is the extra that the error names if cuda-bindings is missing.

        `runtime` is the module cuda.bindings.runtime; by default it is imported.

        Raises:
            MissingDependencyError: cuda-bindings is not installed.
            BackendError: there is no such GPU, or no driver for it.
        """
        self._runtime: Any = import_runtime(extra) if runtime is None else runtime
        self._index = index
        try:
            count = self._call("cudaGetDeviceCount")
        except BackendError as error:
            raise BackendError(
                f"no NVIDIA GPU can be used here ({error}). Run on a machine with a GPU and its driver, or load with "
                "another backend."
            ) from error
        if index >= count:
            raise BackendError(f"device 'cuda:{index}' does not exist: CUDA sees {count} GPUs.")

    def capability(self) -> str:
        """Compute capability, such as "8.9".

        Raises:
            BackendError: the driver does not report it.
        """
        capability = gpu_capability(self._index)
        if capability is None:
            raise BackendError(f"the CUDA driver does not give the compute capability of 'cuda:{self._index}'.")
        return capability

    @contextmanager
    def use(self) -> Iterator[None]:
        """A `with` block in which the calling thread uses this GPU. After it the thread has its former GPU again.

        Raises:
            BackendError: CUDA cannot select the GPU.
        """
        before = self._call("cudaGetDevice")
        if before == self._index:
            yield
            return
        self._call("cudaSetDevice", self._index)
        try:
            yield
        finally:
            self.release("cudaSetDevice", before)

    def free_bytes(self) -> int:
        """Bytes of memory of the GPU that nobody uses."""
        return int(self._call("cudaMemGetInfo"))

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def device_memory(self) -> "Buffer":
        """A buffer on the GPU, empty at first."""
        return self._buffer("cudaMalloc", "cudaFree")

    def pinned_memory(self) -> "Buffer":
        """A buffer of page-locked host memory, empty at first. Only copies from or to such memory are asynchronous."""
        return self._buffer("cudaMallocHost", "cudaFreeHost")

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Queue a copy from the host."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Queue a copy to the host."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work in the stream."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """Record the work that `work` queues on `stream` as a graph, without running it.

        Raises:
            BackendError: some of the work cannot be captured; the stream remains usable.
        """
        with _postponed_releases():
            graph = self._recorded(stream, work)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self.release("cudaGraphDestroy", graph)

    def _recorded(self, stream: int, work: Callable[[], None]) -> Any:
        # An allocation in another thread would break a global capture.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            status, *graphs = self._runtime.cudaStreamEndCapture(stream)
            if graphs and status == self._runtime.cudaError_t.cudaSuccess:
                self.release("cudaGraphDestroy", graphs[0])
            raise
        return self._call("cudaStreamEndCapture", stream)

    def launch(self, graph: Any, stream: int) -> None:
        """Queue a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def release(self, name: str, *arguments: Any) -> None:
        """Call a function that frees something. Its errors are ignored: a failed device has raised its error before."""
        getattr(self._runtime, name)(*arguments)

    def _buffer(self, allocate: str, free: str) -> "Buffer":
        return Buffer(lambda size: int(self._call(allocate, size)), lambda address: self.release(free, address))

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            text = self._runtime.cudaGetErrorString(status)[1]
            raise BackendError(f"{name}: CUDA error {int(status)}, {text.decode()}")
        return results[0] if results else None


def release_outside_capture(release: Callable[[], None]) -> None:
    """Call `release` now; if this thread is capturing, right after its capture.

    For finalizers: the garbage collector may run them in any thread at any time, and memory that a thread frees during
    its own capture makes the capture invalid. Captures of other threads do not notice.
    """
    if _thread.is_capturing:
        _thread.postponed.append(release)
    else:
        release()


@contextmanager
def _postponed_releases() -> Iterator[None]:
    """A `with` block of a capture in this thread; see `release_outside_capture`."""
    _thread.is_capturing = True
    try:
        yield
    finally:
        _thread.is_capturing = False
        while _thread.postponed:
            _thread.postponed.pop(0)()


class Buffer:
    """Memory of a GPU, or page-locked memory of the host. It grows and never shrinks."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self.address = self._size = 0
        self._allocate = allocate
        self._free = free

    def reserve(self, size: int) -> bool:
        """Provide `size` bytes; return whether the buffer moved, which loses its content."""
        if size <= self._size:
            return False
        self.close()
        # It grows in steps of up to an eighth, so that texts of growing length do not move it each time.
        step = max(1, (1 << (size - 1).bit_length()) // 16)
        wanted = -(-size // step) * step
        self.address = self._allocate(wanted)
        self._size = wanted
        return True

    def array(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> "NDArray[Any]":
        """Host memory as an array, valid until the buffer moves."""
        import numpy as np  # not at the top: the exporter's command line imports this module, and waits for no numpy

        memory: Any = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(self.address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory. Idempotent."""
        if self._size:
            self._size = 0
            self._free(self.address)


def gpu_capability(index: int = 0) -> str | None:
    """Return the compute capability of a GPU, such as "8.9"; None if the driver or the GPU is missing.

    It asks the driver's own library, so that the exporter needs no package for it.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for number, attribute in zip(numbers, (75, 76), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"{numbers[0].value}.{numbers[1].value}"


def import_runtime(extra: str) -> Any:
    """The CUDA runtime's module.

    Raises:
        MissingDependencyError: it is not installed; the error names the extra that brings it.
    """
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
    except ImportError as error:
        raise MissingDependencyError("cuda.bindings", extra) from error
    return runtime

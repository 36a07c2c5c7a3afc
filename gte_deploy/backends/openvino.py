"""Runs the plain graph of a bundle with OpenVINO on the CPU, in float32 or bfloat16."""

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import (
    COSTLY_OUTPUTS,
    check_batch,
    check_graph_inputs,
    check_outputs,
    has_costly_head,
)
from gte_deploy.backends.devices import parse_device
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import BackendError
from gte_deploy.core.quiet import import_openvino
from gte_deploy.core.spec import ComputePrecision, ModelSpec

_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}
# OpenVINO compiles kernels for every new shape (3 ms for the tiny model, 6 ms for base) and keeps them: 0.2 to 0.8 MB
# for each shape. With its own limit of 5,000 kernels a process grows by 500 MB and more over texts of all lengths.
# About a hundred shapes have 256 kernels.
_KEPT_KERNELS = 256
# oneDNN keeps another 1,024 kernels until the process ends, even after the model is closed, which saves no time.
_ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

_Requests = queue.SimpleQueue[Any]


class OpenVinoBackend:
    """One compiled model. Many threads may call `run` at once; it computes a batch in each of its streams at a time."""

    name = "openvino"

    def __init__(
        self,
        graph: Path,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        precision: ComputePrecision = "fp32",
        streams: int = 1,
    ) -> None:
        """Compile an ONNX file for this CPU. External data beside the file is mapped; nothing is written to disk.

        `num_threads` is the number of threads inside one operator; the default is every CPU that this process may
        use. `streams` is the number of batches that are computed at once, each on so many threads.

        Raises:
            MissingDependencyError: openvino is not installed.
            BackendError: the device is not the CPU, the CPU does not compute in `precision`, or OpenVINO refuses the
                graph.
        """
        if parse_device(device)[0] != "cpu":
            raise BackendError(
                f"the openvino backend runs only on device 'cpu', not on {device!r}. Use backend='onnx'."
            )
        self.spec = spec
        self.device = device
        self.precision: ComputePrecision = precision
        self.num_threads = num_threads or available_cpus()
        self._streams = streams
        self._openvino = import_openvino()
        core = _core(self._openvino)
        if precision == "bf16" and not has_native_bf16():
            raise BackendError(
                f"this CPU ({core.get_property('CPU', 'FULL_DEVICE_NAME')}) does not compute in bfloat16, and "
                "emulating it would be slower than float32. Load with precision='fp32'."
            )
        try:
            self._model: Any = core.read_model(graph)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot open {graph}: {error}") from error
        self.outputs = tuple(output.any_name for output in self._model.outputs)
        self._inputs = tuple(node.any_name for node in self._model.inputs)
        check_graph_inputs(graph, self._inputs, spec)
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, ...], _Requests] | None = {}
        self._requests_for(self.outputs)

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        check_outputs(outputs, self.outputs)
        idle = self._requests_for(outputs)
        check_batch(batch, self.spec)
        request = idle.get()
        try:
            results = self._infer(request, batch)
            # Copies, because the next batch overwrites the tensors of the request.
            return {name: np.array(results[name], dtype=np.float32) for name in outputs}
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed on a batch of {batch.input_ids.shape}: {error}") from error
        finally:
            idle.put(request)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._idle = self._model = None

    def _infer(self, request: Any, batch: Batch) -> Any:
        return request.infer(batch.graph_inputs(self._inputs), share_inputs=True, share_outputs=True)

    def _requests_for(self, outputs: Sequence[str]) -> _Requests:
        """The idle requests of a model that computes `outputs`; the first call compiles it.

        A model computes all its outputs in every run. Graphs with all logits and sparse graphs have a costly output:
        for them, a second model computes only the hidden states, with its own copy of the weights.
        """
        needs_all = not has_costly_head(self.spec) or bool(COSTLY_OUTPUTS & set(outputs))
        computed = tuple(name for name in self.outputs if needs_all or name not in COSTLY_OUTPUTS)
        with self._lock:
            if self._idle is None:
                raise BackendError("this model is closed; load it again")
            if computed not in self._idle:
                self._idle[computed] = self._compile(computed)
            return self._idle[computed]

    def _compile(self, outputs: Sequence[str]) -> _Requests:
        results = [output for output in self._model.outputs if output.any_name in outputs]
        part = self._openvino.Model(results, self._model.get_parameters())
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": self._streams,
            "INFERENCE_NUM_THREADS": self.num_threads * self._streams,
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "CPU_RUNTIME_CACHE_CAPACITY": _KEPT_KERNELS,
            # Two processes would pin their threads to the same cores, and each would run at half speed.
            "ENABLE_CPU_PINNING": False,
        }
        idle: _Requests = queue.SimpleQueue()
        token = np.zeros((1, 1), np.int64)
        try:
            with _environment(_ONEDNN_CACHE, "0"):
                compiled = _core(self._openvino).compile_model(part, "CPU", config)
                for _ in range(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")):
                    idle.put(compiled.create_infer_request())
                request = idle.get()
                # A graph that cannot run fails here, not at the first text. And oneDNN reads its setting only in a run.
                self._infer(request, Batch(token, token + 1))
                idle.put(request)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot compile the graph: {error}") from error
        return idle


def has_native_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU without emulating it."""
    return "BF16" in _core(import_openvino()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def _core(openvino: Any) -> Any:
    """OpenVINO's core object: one for the whole process, which lives until the process ends.

    If another thread destroys it, the signal stack of the first thread is lost (docs/decisions/openvino-process.md).
    """
    return openvino.Core()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside a `with` block, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]

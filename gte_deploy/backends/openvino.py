"""Runs the plain graph of a bundle with OpenVINO on the CPU, in float32 or bfloat16."""

import contextlib
import functools
import io
import os
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import (
    check_batch,
    check_graph_inputs,
    check_graph_outputs,
    check_outputs,
    has_costly_head,
)
from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.graphs import GraphFile, GraphFiles, OpenGraphs, OutputNames, without_links
from gte_deploy.backends.mapped import mapped_weights
from gte_deploy.bundle.inspection import with_data_as_inputs
from gte_deploy.bundle.verified import VerifiedGraph
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import BackendError
from gte_deploy.core.quiet import import_openvino
from gte_deploy.core.spec import ComputePrecision, ModelSpec
from gte_deploy.tasks.base import HIDDEN

_HINTS: dict[ComputePrecision, str] = {"fp32": "f32", "bf16": "bf16"}
# OpenVINO compiles kernels for every new shape (3 ms for the tiny model, 6 ms for base) and keeps them: 0.2 to 0.8 MB
# for each shape. With its own limit of 5,000 kernels a process grows by 500 MB and more over texts of all lengths.
# About a hundred shapes have 256 kernels.
_KEPT_KERNELS = 256
# oneDNN keeps another 1,024 kernels until the process ends, even after the model is closed, which saves no time.
_ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@dataclass(frozen=True)
class _OpenGraph:
    """The idle requests of a compiled model, the names of its inputs, and the weights in memory that it refers to."""

    inputs: OutputNames
    weights: Mapping[str, NDArray[Any]]
    idle: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def infer(self, request: Any, batch: Batch) -> Any:
        """Run a batch; the results are overwritten by the next run of the request."""
        return request.infer(batch.graph_inputs(self.inputs), share_inputs=True, share_outputs=True)


class OpenVinoBackend:
    """Compiled models of a graph and its parts. Many threads may call `run`.

    Each of its streams computes one batch at a time.
    """

    name = "openvino"

    def __init__(
        self,
        graph: Path | GraphFiles,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        precision: ComputePrecision = "fp32",
        streams: int = 1,
    ) -> None:
        """Compile an ONNX file for this CPU. External data beside the file is mapped; nothing is written to disk.

        `graph` may also be a graph and its parts: then this compiles the file that the model's answer needs, and a call
        that needs another compiles that one.

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
        if isinstance(graph, Path):
            graph = {tuple(output.any_name for output in self._read(graph).outputs): graph}
        if has_costly_head(spec):
            # Bundles of earlier formats have no part for the hidden states alone: `_open` cuts it from the whole graph.
            graph = {(HIDDEN,): max(graph.items(), key=lambda file: len(file[0]))[1], **graph}
        self._graphs = OpenGraphs(graph, self._open)
        self.outputs = self._graphs.outputs

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        check_outputs(outputs, self.outputs)
        graph = self._graphs.for_outputs(outputs)
        check_batch(batch, self.spec)
        request = graph.idle.get()
        try:
            results = graph.infer(request, batch)
            # Copies, because the next batch overwrites the tensors of the request.
            return {name: np.array(results[name], dtype=np.float32) for name in outputs}
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed on a batch of {batch.input_ids.shape}: {error}") from error
        finally:
            graph.idle.put(request)

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs.close()

    def _read(self, graph: GraphFile, weights: Mapping[str, NDArray[Any]] | None = None) -> Any:
        """Read a graph with its weights from memory; without them, or if it is not verified, with those of its files.

        `graph` is verified if there are `weights`.
        """
        try:
            if not isinstance(graph, Path) and weights is not None:
                return _read_with_weights(self._openvino, graph, weights)
            with without_links(graph if isinstance(graph, Path) else graph.path) as file:
                model = _core(self._openvino).read_model(file)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise BackendError(f"OpenVINO cannot open {graph}: {error}") from error
        if not isinstance(graph, Path):
            # By path, only a look at the path afterwards tells whether it was the verified file.
            graph.require_same_paths()
        return model

    def _open(self, outputs: OutputNames, graph: GraphFile) -> _OpenGraph:
        """Compile what computes `outputs`, and run it once."""
        weights = None if isinstance(graph, Path) else mapped_weights(graph)
        model = self._read(graph, weights)
        results = [output for output in model.outputs if output.any_name in outputs]
        if len(results) < len(outputs):
            raise BackendError(f"{graph} lacks some of the outputs {', '.join(outputs)}. Export the bundle again.")
        opened = _OpenGraph(tuple(node.any_name for node in model.inputs), weights or {})
        check_graph_inputs(graph, opened.inputs, self.spec)
        check_graph_outputs(graph, {output.any_name: _shape(output) for output in results}, self.spec)
        if len(results) < len(model.outputs):
            model = self._openvino.Model(results, model.get_parameters())
        token = np.zeros((1, 1), np.int64)
        try:
            with without_onednn_cache():
                compiled = compile_on_cpu(model, self.precision, num_threads=self.num_threads, streams=self._streams)
                for _ in range(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")):
                    opened.idle.put(compiled.create_infer_request())
                request = opened.idle.get()
                # A graph that cannot run fails here, not at the first text. And oneDNN reads its setting only in a run.
                opened.infer(request, Batch(token, token + 1))
                opened.idle.put(request)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot compile the graph: {error}") from error
        if not isinstance(graph, Path):
            graph.release_pages()
        return opened


def _shape(output: Any) -> list[int | None]:
    """Return the shape of an output of a model, with None for each dynamic axis."""
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic:
        return []
    return [axis.get_length() if axis.is_static else None for axis in shape]


def _read_with_weights(openvino: Any, graph: VerifiedGraph, weights: Mapping[str, NDArray[Any]]) -> Any:
    """Read the content of a graph, and put constants over these weights in the places of its tensors in other files.

    OpenVINO reads no weights from memory together with an ONNX file. So it reads a file in which they are inputs.
    """
    # The front end by its name: by its content, OpenVINO could take a file for one of another format.
    front_end = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    content = with_data_as_inputs(graph.content, graph.external)
    model = front_end.convert(front_end.load(io.BytesIO(content)))
    parameters = []
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name not in weights:
            parameters.append(parameter)
            continue
        constant = openvino.op.Constant(openvino.Tensor(weights[name], shared_memory=True))
        constant.set_friendly_name(name)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(constant.output(0))
    return openvino.Model(model.get_results(), parameters, model.get_friendly_name())


def has_native_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU without emulating it."""
    return "BF16" in _core(import_openvino()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_on_cpu(model: Any, precision: ComputePrecision, *, num_threads: int, streams: int = 1) -> Any:
    """Compile an `openvino.Model` for this CPU, with `num_threads` for each stream; return the compiled model."""
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": num_threads * streams,
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "CPU_RUNTIME_CACHE_CAPACITY": _KEPT_KERNELS,
        # Two processes would pin their threads to the same cores, and each would run at half speed.
        "ENABLE_CPU_PINNING": False,
    }
    return _core(import_openvino()).compile_model(model, "CPU", config)


def without_onednn_cache() -> contextlib.AbstractContextManager[None]:
    """A `with` block for compiling and for the first run, in which oneDNN reads that it keeps no kernels."""
    return _environment(_ONEDNN_CACHE, "0")


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

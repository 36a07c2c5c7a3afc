"""Runs the graph of a bundle with ONNX Runtime: on the CPU, on CUDA or through TensorRT."""

import contextlib
import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_graph_inputs, check_graph_outputs, check_outputs
from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.graphs import GraphFile, GraphFiles, OpenGraphs, OutputNames
from gte_deploy.backends.mapped import mapped_weights
from gte_deploy.backends.tensorrt.shapes import PaddedLayout, split_batch, write_inputs
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import BackendError, MissingDependencyError
from gte_deploy.core.install import install_command
from gte_deploy.core.spec import ModelSpec, Precision, Profile

logger = logging.getLogger(__name__)

_LOG_ERRORS_ONLY = 3
# Major version of CUDA -> the oldest NVIDIA driver for Linux that runs it.
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes
_DRIVERS = {"12": "525", "13": "580"}


@dataclass(frozen=True)
class ThroughTensorRT:
    """Settings for ONNX Runtime's TensorRT provider, which compiles a graph and runs it.

    Args:
        profile: the shapes that it compiles for. There is only one: of several, the provider runs only the first.
            https://github.com/microsoft/onnxruntime/pull/31624
        cache: the folder for the compiled engine of one graph. Only this user may read it: an engine is executable
            code. Without a cache (None), every opening compiles again.
        max_masks: the most mask positions of one run; None if the graph takes none.
        token_types: whether the graph takes token types.
    """

    profile: Profile
    cache: Path | None
    max_masks: int | None = None
    token_types: bool = False


@dataclass(frozen=True)
class _OpenGraph:
    """An inference session, the names of its inputs, and the weights in memory that it refers to."""

    session: Any
    inputs: OutputNames
    weights: Sequence[Any] = ()


class OnnxBackend:
    """Inference sessions of a graph and its parts; `run` may be called from many threads at once."""

    name = "onnx"

    def __init__(
        self,
        graph: Path | GraphFiles,
        spec: ModelSpec,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        precision: Precision = "fp32",
        tensorrt: ThroughTensorRT | None = None,
        packed: bool = True,
        half_weights: bool = False,
    ) -> None:
        """Open a session on an ONNX file; ONNX Runtime maps the external data beside the file.

        `graph` may also be a graph and its parts: then this opens the file that the model's answer needs, and a call
        that needs another opens that one.

        `num_threads` is the number of threads inside one operator on the CPU; the default is every CPU that this
        process may use. `precision` is the precision that the graph's data types give. With `tensorrt`, TensorRT runs
        the graph on `device`. `packed` makes a copy of the weights in the order in which the kernels read them; without
        it, every call packs them, and the session has no copy of the mapped file. `half_weights` is as in `GraphEntry`.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            BackendError: the device is missing, or ONNX Runtime refuses the graph.
        """
        self.spec = spec
        self.device = device
        self.precision: Precision = precision
        self.num_threads = num_threads or available_cpus()
        self._tensorrt = tensorrt
        self._packed = packed
        self._half_weights = half_weights
        ort = _import_onnxruntime(device)
        self._errors = _error_types()
        self._ort = ort
        if isinstance(graph, Path):
            opened = self._open(graph)
            outputs = tuple(output.name for output in opened.session.get_outputs())
            self._graphs = OpenGraphs({outputs: graph}, self._open_for, {outputs: opened})
        else:
            self._graphs = OpenGraphs(graph, self._open_for)
        self.outputs = self._graphs.outputs

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        check_outputs(outputs, self.outputs)
        graph = self._graphs.for_outputs(outputs)
        check_batch(batch, self.spec)
        if self._tensorrt is not None:
            return self._run_in_sub_batches(graph, self._tensorrt, batch, outputs)
        values = self._run(graph.session, batch.graph_inputs(graph.inputs), outputs)
        return {name: value.astype(np.float32, copy=False) for name, value in zip(outputs, values, strict=True)}

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs.close()

    def _run(self, session: Any, feed: Mapping[str, NDArray[np.int64]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        try:
            return session.run(list(outputs), feed)
        except self._errors as error:
            raise BackendError(f"ONNX Runtime failed on a batch of {feed['input_ids'].shape}: {error}") from error

    def _run_in_sub_batches(
        self, graph: _OpenGraph, tensorrt: ThroughTensorRT, batch: Batch, outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """Run a batch as sub-batches that are padded to the profile, as for an engine of TensorRT."""
        session = graph.session
        layout = PaddedLayout({node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())})
        masks = None if tensorrt.max_masks is None else [(1, tensorrt.max_masks)]
        results = layout.results(batch, outputs)
        for sub_batch in split_batch(batch, [tensorrt.profile], masks):
            shapes = layout.shapes(sub_batch.shape, sub_batch.num_masks)
            feed = {name: np.empty(shapes[name], np.int64) for name in graph.inputs}
            write_inputs(batch, sub_batch, feed, pad_token_id=self.spec.pad_token_id)
            for name, values in zip(outputs, self._run(session, feed, outputs), strict=True):
                layout.place(name, values, sub_batch, results[name])
        return results

    def _open_for(self, outputs: OutputNames, graph: GraphFile) -> _OpenGraph:
        """Open a graph, and check that it has the outputs that the manifest gives it."""
        opened = self._open(graph)
        found = tuple(output.name for output in opened.session.get_outputs())
        if found != outputs:
            raise BackendError(
                f"{graph} has the outputs {', '.join(found)}, and the manifest says {', '.join(outputs)}. Export the "
                "bundle again."
            )
        return opened

    def _open(self, graph: GraphFile) -> _OpenGraph:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS_ONLY
        if parse_device(self.device)[0] == "cpu":
            # The exporter fused the graph already. ORT finds nothing more, and its search takes a tenth of the time.
            # Only constants must be folded where the graph converts its own weights.
            levels = ort.GraphOptimizationLevel
            options.graph_optimization_level = levels.ORT_ENABLE_BASIC if self._half_weights else levels.ORT_DISABLE_ALL
        # Threads spin inside a run, which makes it faster (fp32 5 %, int8 15 % at 128 tokens), and stop at its end.
        # Else each thread would keep a core busy for another 35 ms that the tokenizer or other processes need.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not self._packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        # The arena halves the peak memory of a long text. Its size stays constant over texts of all lengths as long as
        # nothing shrinks it. A memory pattern for every shape would only need more memory.
        options.enable_mem_pattern = False
        providers = _providers(ort, self.device, self._tensorrt)
        if parse_device(self.device)[0] == "cuda":
            _load_cuda_libraries(ort)
        if self._tensorrt is not None:
            with contextlib.suppress(ImportError):
                importlib.import_module("tensorrt_libs")  # loads the libraries of pip's tensorrt-cu13
        # A GPU's providers read the weights by path.
        verified = None if isinstance(graph, Path) else graph
        on_cpu = parse_device(self.device)[0] == "cpu"
        weights = mapped_weights(verified) if verified is not None and on_cpu else None
        model: bytes | str = str(graph)
        values = []
        if verified is not None and weights is not None:
            model = verified.content
            values = [ort.OrtValue.ortvalue_from_numpy(weight) for weight in weights.values()]
            options.add_external_initializers(list(weights), values)
            # By its bytes alone, a model in ONNX Runtime's own format could pass for one in ONNX's.
            options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            session = ort.InferenceSession(model, options, providers=providers)
        except self._errors as error:
            raise BackendError(f"ONNX Runtime cannot open {graph}: {error}") from error
        if verified is not None:
            # By path, only a look at the path afterwards tells whether it was the verified file.
            verified.require_same_paths() if weights is None else verified.release_pages()
        wanted, active = providers[0][0], session.get_providers()[0]
        if active != wanted:
            raise BackendError(
                f"device {self.device!r} needs {wanted}, and ONNX Runtime fell back to {active}: "
                f"{_missing_libraries(ort, through_tensorrt=self._tensorrt is not None)}, or pass device='cpu'."
            )
        inputs = tuple(node.name for node in session.get_inputs())
        check_graph_inputs(graph, inputs, self.spec)
        check_graph_outputs(graph, {node.name: node.shape for node in session.get_outputs()}, self.spec)
        return _OpenGraph(session, inputs, values)


def _import_onnxruntime(device: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnxruntime", "cpu" if parse_device(device)[0] == "cpu" else "gpu") from error
    return onnxruntime


@functools.cache
def _load_cuda_libraries(ort: Any) -> None:
    """Load the CUDA and cuDNN libraries that pip installed. They are not on the linker's search path.

    A missing library is logged at level DEBUG; ONNX Runtime then looks for it on the search path.
    """
    preload = getattr(ort, "preload_dlls", None)  # new in 1.21
    if preload is None:
        return
    # It prints what it does not find. Redirecting stdout would also take what other threads print.
    ort.print = lambda *words: logger.debug("onnxruntime.preload_dlls: %s", " ".join(map(str, words)))
    try:
        preload()
    except (OSError, RuntimeError) as error:
        logger.debug("onnxruntime.preload_dlls failed: %s", error)
    finally:
        vars(ort).pop("print", None)


def _missing_libraries(ort: Any, *, through_tensorrt: bool) -> str:
    """Return which libraries could not be loaded, and how to install them."""
    version = getattr(ort, "cuda_version", "") or "13"
    major = version.partition(".")[0]
    driver = f"an NVIDIA driver {_DRIVERS[major]} or newer" if major in _DRIVERS else "an NVIDIA driver for it"
    others, libraries = [], f"CUDA {version}"
    if through_tensorrt:
        others, libraries = [f"tensorrt-cu{major}==10.*"], f"TensorRT 10 and {libraries}"
    command = install_command("gpu", *others)
    return f"the libraries of {libraries} could not be loaded. Install {driver}, and {command}"


def _error_types() -> tuple[type[Exception], ...]:
    # The error classes have no common base except Exception.
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = (value for value in vars(state).values() if isinstance(value, type))
    # A message with bytes of a graph that are no UTF-8 cannot even be raised.
    return (*(kind for kind in kinds if issubclass(kind, Exception)), RuntimeError, UnicodeDecodeError)


def _providers(ort: Any, device: str, tensorrt: ThroughTensorRT | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The execution providers; each takes the nodes that the ones before it did not take."""
    kind, index = parse_device(device)
    cpu: tuple[str, dict[str, Any]] = ("CPUExecutionProvider", {})
    if kind == "cpu":
        return [cpu]
    wanted = "CUDAExecutionProvider" if tensorrt is None else "TensorrtExecutionProvider"
    if wanted not in ort.get_available_providers():
        raise BackendError(
            f"device {device!r} needs {wanted} of onnxruntime-gpu, and the installed onnxruntime does not have it: "
            f"pip uninstall onnxruntime, and then {install_command('gpu')}. Or pass device='cpu'."
        )
    # By default the arena doubles its size, and TF32 rounds the FP32 inputs of matrix products to ten bits.
    cuda = {"device_id": index, "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    providers: list[tuple[str, dict[str, Any]]] = [("CUDAExecutionProvider", cuda), cpu]
    if tensorrt is not None:
        providers.insert(0, ("TensorrtExecutionProvider", {"device_id": index, **_tensorrt_options(tensorrt)}))
    return providers


def _tensorrt_options(tensorrt: ThroughTensorRT) -> dict[str, Any]:
    """Options of the provider. Without precision flags the network is strongly typed, by the graph."""
    profile = tensorrt.profile
    options: dict[str, Any] = {}
    masks = None if tensorrt.max_masks is None else (1, min(8, tensorrt.max_masks), tensorrt.max_masks)
    by_token = ["input_ids", "attention_mask", *(["token_type_ids"] if tensorrt.token_types else [])]
    for index, (end, (rows, tokens)) in enumerate((("min", profile.min), ("opt", profile.opt), ("max", profile.max))):
        shapes = [f"{name}:{rows}x{tokens}" for name in by_token]
        shapes += [] if masks is None else [f"mask_positions:{masks[index]}x2"]
        options[f"trt_profile_{end}_shapes"] = ",".join(shapes)
    if tensorrt.cache is not None:
        for name in ("trt_engine_cache", "trt_timing_cache"):
            options |= {f"{name}_enable": True, f"{name}_path": str(tensorrt.cache)}
    return options

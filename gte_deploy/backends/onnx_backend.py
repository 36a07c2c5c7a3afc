"""ONNX Runtime: the graph of a bundle on the CPU or on CUDA."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_batch, check_outputs
from gte_deploy.backends.devices import parse_device
from gte_deploy.errors import BackendError, MissingDependencyError
from gte_deploy.spec import ComputePrecision, ModelSpec
from gte_deploy.threads import available_cpus

logger = logging.getLogger(__name__)

_INPUTS = frozenset(("input_ids", "attention_mask", "mask_positions"))
_LOG_ERRORS_ONLY = 3
_NO_POSITIONS = np.empty((0, 2), dtype=np.int64)


class OnnxBackend:
    """One inference session; `run` may be called from many threads at once."""

    name = "onnx"
    precision: ComputePrecision = "fp32"

    def __init__(self, graph: Path, spec: ModelSpec, *, device: str = "cpu", num_threads: int | None = None) -> None:
        """Open a session on an ONNX file; external data beside it is mapped by ONNX Runtime itself.

        `num_threads` are used inside an operator; the default is every CPU that this process may use.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            BackendError: the device is not there, or ONNX Runtime refuses the graph.
        """
        self.spec = spec
        self.device = device
        self.num_threads = num_threads or available_cpus()
        ort = _import_onnxruntime()
        self._errors = _error_types()
        self._run_options = ort.RunOptions()
        self._session: Any = self._open(ort, graph)
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        self._inputs = frozenset(node.name for node in self._session.get_inputs())
        if unknown := sorted(self._inputs - _INPUTS):
            raise BackendError(f"{graph} asks for the inputs {', '.join(unknown)}, which nothing here provides.")

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        session = self._session
        if session is None:
            raise BackendError("this model is closed; load it again")
        check_batch(batch, self.spec)
        check_outputs(outputs, self.outputs)
        positions = _NO_POSITIONS if batch.mask_positions is None else batch.mask_positions
        offered = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "mask_positions": positions,
        }
        feed = {name: offered[name] for name in self._inputs}
        try:
            values = session.run(list(outputs), feed, self._options_for(outputs))
        except self._errors as error:
            raise BackendError(f"ONNX Runtime failed on a batch of {batch.input_ids.shape}: {error}") from error
        return {name: value.astype(np.float32, copy=False) for name, value in zip(outputs, values, strict=True)}

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None

    def _options_for(self, outputs: Sequence[str]) -> Any:
        return None if self._needs_every_node(outputs) else self._run_options

    def _needs_every_node(self, outputs: Sequence[str]) -> bool:
        # Only the classical graph has a costly head that runs without being asked for.
        return self.spec.logits == "masked" or "logits" in outputs

    def _open(self, ort: Any, graph: Path) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS_ONLY
        if parse_device(self.device)[0] == "cpu":
            # The exporter fused the graph. ORT finds nothing more in it, and looking costs a tenth of the opening.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Threads spin inside a run, for its speed (fp32 5 %, int8 15 % at 128 tokens), and stop with it: each would
        # burn another 35 ms of a core that the tokenizer, a neighbour or the battery has better uses for.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # The arena halves the peak of a long text, and is flat over texts of all lengths as long as it is not shrunk.
        # A memory pattern for every shape seen would only add to it.
        options.enable_mem_pattern = False
        self._run_options.only_execute_path_to_fetches = True
        providers = _providers(ort, self.device)
        try:
            session = ort.InferenceSession(str(graph), options, providers=providers)
        except self._errors as error:
            raise BackendError(f"ONNX Runtime cannot open {graph}: {error}") from error
        wanted, active = providers[0][0], session.get_providers()[0]
        if active != wanted:
            raise BackendError(
                f"device {self.device!r} needs {wanted}, and ONNX Runtime fell back to {active}: its CUDA libraries "
                "could not be loaded. Install them, or pass device='cpu'."
            )
        return session


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnxruntime", "cpu") from error
    return onnxruntime


def _error_types() -> tuple[type[Exception], ...]:
    # They share no base but Exception.
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (value for value in vars(state).values() if isinstance(value, type))
    return (*(kind for kind in kinds if issubclass(kind, Exception)), RuntimeError)


def _providers(ort: Any, device: str) -> list[tuple[str, dict[str, Any]]]:
    kind, index = parse_device(device)
    if kind == "cpu":
        return [("CPUExecutionProvider", {})]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(
            f"device {device!r} needs onnxruntime-gpu, and the installed onnxruntime is for the CPU only: "
            "pip uninstall onnxruntime && pip install 'gte-deploy[gpu]'. Or pass device='cpu'."
        )
    cuda = {"device_id": index, "arena_extend_strategy": "kSameAsRequested"}
    return [("CUDAExecutionProvider", cuda), ("CPUExecutionProvider", {})]

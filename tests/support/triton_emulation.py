"""Follows a Triton repository's configurations in this process: its checks of shapes, its batches, its Python models.

tests/triton runs the same repositories on a real server; here every wire, shape and answer is looked at in a second.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loading import load_file


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError(Exception):
    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.failure = self.error = error

    def has_error(self) -> bool:
        return self.failure is not None


class Request(dict[str, np.ndarray]):
    """The inputs of a request by name, and the outputs that it asks for."""

    def __init__(self, inputs: dict[str, np.ndarray], outputs: Sequence[str] = ()) -> None:
        super().__init__(inputs)
        self._outputs = list(outputs)

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, values) for name, values in self.items()]

    def requested_output_names(self) -> list[str]:
        return self._outputs


class InferenceRequest:
    """A request of a Python model to another model of its repository."""

    repository: Repository

    def __init__(
        self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: Any
    ) -> None:
        self._model, self._outputs = model_name, requested_output_names
        self._inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}

    def exec(self) -> InferenceResponse:
        (result,) = self.repository._run(self._model, [Request(self._inputs, self._outputs)])
        if isinstance(result, TritonError):
            return InferenceResponse(error=result)
        return InferenceResponse([Tensor(name, result[name]) for name in self._outputs])


class Repository:
    """Runs a repository's models; `ask` sends several requests at once, as one scheduler batch."""

    def __init__(self, path: Path, variant: str | None = "cpu") -> None:
        self.path = path
        self.variant = variant
        self.runs: list[tuple[int, ...]] = []
        """Shape of input_ids of every run of the encoder."""
        self._models: dict[str, Any] = {}

    def config(self, model: str) -> Any:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2

        file = self.path / model / "configs" / f"{self.variant}.pbtxt"
        file = file if file.is_file() else self.path / model / "config.pbtxt"
        return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())

    def ask(self, ensemble: str, *requests: dict[str, Any]) -> list[Any]:
        """The outputs of each request, or its TritonError."""
        config = self.config(ensemble)
        states: list[Any] = [self._checked(request, config) for request in requests]
        for step in config.ensemble_scheduling.step:
            alive = [i for i, state in enumerate(states) if not isinstance(state, TritonError)]
            inputs = [
                Request(
                    {key: states[i][name] for key, name in step.input_map.items() if name in states[i]},
                    list(step.output_map),
                )
                for i in alive
            ]
            for i, result in zip(alive, self._run(step.model_name, inputs), strict=True):
                if isinstance(result, TritonError):
                    states[i] = result
                else:
                    states[i] |= {name: result[key] for key, name in step.output_map.items()}
        wanted = {tensor.name: tensor for tensor in config.output}
        return [
            state
            if isinstance(state, TritonError)
            else {name: self._shaped(state[name], wanted[name], config) for name in wanted}
            for state in states
        ]

    def _checked(self, request: dict[str, Any], config: Any) -> dict[str, np.ndarray]:
        arrays = {name: _as_array(value) for name, value in request.items()}
        inputs = {tensor.name: tensor for tensor in config.input}
        assert set(arrays) <= set(inputs)
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(arrays)
        return {name: self._shaped(values, inputs[name], config) for name, values in arrays.items()}

    def _shaped(self, values: np.ndarray, tensor: Any, config: Any) -> np.ndarray:
        """Refuse what Triton would refuse: a shape that is not the configured one."""
        dims = [*([-1] if config.max_batch_size else []), *tensor.dims]
        assert values.ndim == len(dims), (tensor.name, values.shape, dims)
        assert all(size in (-1, got) for size, got in zip(dims, values.shape, strict=True)), (tensor.name, values.shape)
        return values

    def _run(self, name: str, inputs: list[dict[str, np.ndarray]]) -> list[Any]:
        config = self.config(name)
        for request in inputs:
            for tensor in config.input:
                if tensor.name in request:
                    self._shaped(request[tensor.name], tensor, config)
        if config.backend == "onnxruntime":
            results = self._run_onnx(name, config, inputs)
        else:
            responses = self.model(name).execute(inputs)
            results = [response.error or response.tensors for response in responses]
        for result in results:
            for tensor in config.output if not isinstance(result, TritonError) else ():
                if tensor.name in result:
                    self._shaped(result[tensor.name], tensor, config)
        return results

    def _run_onnx(self, name: str, config: Any, inputs: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Requests of one shape run together, as Triton's dynamic batcher and the ONNX Runtime backend do it."""
        import onnxruntime

        if name not in self._models:
            file = next(self.path.glob(f"{name}/[0-9]*/{config.default_model_filename}"))
            self._models[name] = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        outputs = [tensor.name for tensor in config.output]
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(inputs):
            shapes = tuple(values.shape[1:] for values in request.values())
            groups.setdefault(shapes if config.max_batch_size else i, []).append(i)
        results: list[Any] = [None] * len(inputs)
        for members in groups.values():
            feed = {key: np.concatenate([inputs[i][key] for i in members]) for key in inputs[members[0]]}
            self.runs.append(feed["input_ids"].shape)
            values = self._models[name].run(outputs, feed)
            ends = np.cumsum([len(inputs[i]["input_ids"]) for i in members])[:-1]
            if len(members) == 1:
                parts = [[value] for value in values]
            else:
                parts = [np.split(value, ends) for value in values]
            for at, i in enumerate(members):
                results[i] = {key: part[at] for key, part in zip(outputs, parts, strict=True)}
        return results

    def model(self, name: str) -> Any:
        """A Python model, made as the Python backend makes it."""
        if name not in self._models:
            from google.protobuf import json_format

            file = next(self.path.glob(f"{name}/[0-9]*/model.py"))
            InferenceRequest.repository = self
            module = load_file(file, f"triton_model_{file.parents[1].name}")
            config = json_format.MessageToDict(self.config(name), preserving_proto_field_name=True)
            self._models[name] = module.TritonPythonModel()
            self._models[name].initialize(
                {
                    "model_config": json.dumps(config),
                    "model_repository": str(file.parents[1]),
                    "model_version": file.parent.name,
                }
            )
        return self._models[name]


def _as_array(value: Any) -> np.ndarray:
    """Texts as rows of BYTES; other things as one option a row."""
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    return np.array([[v.encode() if isinstance(v, str) else v] for v in values], dtype=np.object_)


def python_backend() -> types.ModuleType:
    """The module that Triton's Python backend offers to a model, as far as the models use it."""
    backend = types.ModuleType("triton_python_backend_utils")
    backend.__dict__.update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        InferenceRequest=InferenceRequest,
        PreferredMemory=lambda kind, number: (kind, number),
        TRITONSERVER_MEMORY_CPU="CPU",
        get_output_tensor_by_name=lambda response, name: Tensor(name, response.tensors[name]),
    )
    return backend

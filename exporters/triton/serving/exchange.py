"""Code that the Python models share: it reads the tensors and options of a request and writes the answer or the error.

An error affects only the request that caused it; the other requests of the same `execute` get their answers.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # Triton's own module
from numpy.typing import NDArray

from gte_deploy.core.errors import GteDeployError, InputError, NonFiniteError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.core.spec_json import spec_from_json
from gte_deploy.text.inputs import check_integer

logger = logging.getLogger(__name__)

SPEC_PARAMETER = "gte_deploy_spec"

T = TypeVar("T")


class Settings:
    """The settings of a model in config.pbtxt, and the folder of its files."""

    def __init__(self, arguments: Mapping[str, str]) -> None:
        """Read the arguments of `initialize`, which Triton calls."""
        config = json.loads(arguments["model_config"])
        self.folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self.inputs = tuple(tensor["name"] for tensor in config["input"])
        self.outputs = tuple(tensor["name"] for tensor in config["output"])
        self._parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.spec: ModelSpec = spec_from_json(json.loads(self._parameters[SPEC_PARAMETER]))

    def text(self, name: str) -> str:
        """A parameter of config.pbtxt."""
        return self._parameters[name]

    def integer(self, name: str) -> int:
        """An integer parameter of config.pbtxt."""
        return int(self._parameters[name])

    def integers(self, name: str) -> list[int]:
        """A parameter of config.pbtxt with several integers, separated by commas."""
        return [int(value) for value in self._parameters[name].split(",")]


class Inputs:
    """The inputs of a request by name. The list of tensors is read once, and a tensor is converted when it is read."""

    def __init__(self, request: Any) -> None:
        self._tensors = {tensor.name(): tensor for tensor in request.inputs()}

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> NDArray[Any] | None:
        """An input with its batch axis; None if it was not sent."""
        found = self._tensors.get(name)
        return None if found is None else found.as_numpy()


def required(request: Inputs, name: str) -> NDArray[Any]:
    """An input that the configuration requires."""
    values = request.get(name)
    assert values is not None, name
    return values


def floats(request: Inputs, name: str) -> NDArray[np.float32]:
    """An output of the encoder in float32; a TensorRT plan may give fewer bits."""
    return required(request, name).astype(np.float32, copy=False)


def texts(request: Inputs, name: str, shown: str = "input") -> list[str] | None:
    """A BYTES input as texts; None if it was not sent. `shown` is the name of one text in an error.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    values = request.get(name)
    return None if values is None else [_decoded(value, f"{shown} {i}") for i, value in enumerate(values.reshape(-1))]


def option(request: Inputs, name: str, default: Any = None) -> Any:
    """The value of an optional input as a Python object; all rows of a request must have the same.

    Raises:
        InputError: rows have different values.
    """
    values = request.get(name)
    if values is None:
        return default
    first, *rest = values.reshape(-1).tolist()
    if any(value != first for value in rest):
        raise InputError(f"{name} differs between the rows of one request; send those rows in separate requests")
    return _decoded(first, name) if isinstance(first, bytes) else first


def shared_texts(request: Inputs, name: str, shown: str) -> list[str] | None:
    """The texts of an optional BYTES input; all rows of a request must have the same texts.

    Raises:
        InputError: the bytes are not UTF-8, or rows have different texts.
    """
    values = texts(request, name, shown)
    if values is None:
        return None
    width = required(request, name).shape[-1]
    first = values[:width]
    if values != first * (len(values) // max(width, 1)):
        raise InputError(f"{name} differ between the rows of one request; send those rows in separate requests")
    return first


def check_finite(name: str, values: NDArray[np.floating[Any]]) -> None:
    """Refuse NaN and Inf.

    Raises:
        NonFiniteError: the message names the rows.
    """
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if not finite.all():
        rows = ", ".join(map(str, np.flatnonzero(~finite)))
        raise NonFiniteError(
            f"the model gave NaN or Inf in {name} for the inputs {rows}; no result is returned for them"
        )


def check_ids(ids: NDArray[np.integer], vocab_size: int) -> None:
    """Refuse token ids that are not in the vocabulary.

    Raises:
        InputError: the message names the rows.
    """
    wrong = ((ids < 0) | (ids >= vocab_size)).any(axis=1)
    if wrong.any():
        rows = ", ".join(map(str, np.flatnonzero(wrong)))
        raise InputError(f"the inputs {rows} have token ids outside the vocabulary of {vocab_size:,}")


def max_active_dims(request: Inputs) -> int | None:
    """The option MAX_ACTIVE_DIMS.

    Raises:
        InputError: the value is out of range.
    """
    wanted = option(request, "MAX_ACTIVE_DIMS")
    return None if wanted is None else check_integer("MAX_ACTIVE_DIMS", wanted, 1, (1 << 31) - 1)


def attempt(work: Callable[[], T]) -> T | Any:
    """The result of `work`, or a TritonError that says why it failed."""
    try:
        return work()
    except InputError as error:
        return pb_utils.TritonError(f"InputError: {error}", pb_utils.TritonError.INVALID_ARG)
    except GteDeployError as error:
        return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
    except Exception as error:  # an exception would fail every request of this execute
        logger.exception("a request failed")
        return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)


def failed(result: Any) -> bool:
    """Whether `attempt` gave an error."""
    return isinstance(result, pb_utils.TritonError)


def answer_each(requests: Sequence[Any], answer: Callable[[Inputs], Mapping[str, NDArray[Any]]]) -> list[Any]:
    """A response for each request: the tensors of `answer`, or its error."""
    return [response(attempt(partial(answer, Inputs(request)))) for request in requests]


def response(result: Any) -> Any:
    """An InferenceResponse with named tensors, or with the TritonError of a failed `attempt`."""
    if failed(result):
        return pb_utils.InferenceResponse(error=result)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in result.items()])


def _decoded(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}") from None

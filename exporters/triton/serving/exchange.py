"""Code that the Python models share: reads tensors and options of a request, and writes its answer or its error.

An error belongs to the request that caused it; the others of the same `execute` are answered.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # Triton's own module
from numpy.typing import NDArray

from gte_deploy.bundle.manifest import spec_from_json
from gte_deploy.core.errors import GteDeployError, InputError, NonFiniteError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.text.inputs import check_integer

logger = logging.getLogger(__name__)

SPEC_PARAMETER = "gte_deploy_spec"

# Of what a Python model gives to the encoder: TensorRT plans may take 32-bit ids.
_INTEGER_DTYPES = {"TYPE_INT32": np.int32, "TYPE_INT64": np.int64}

T = TypeVar("T")


class Settings:
    """The settings of a model in config.pbtxt, and the folder of its files."""

    def __init__(self, arguments: Mapping[str, str]) -> None:
        """Read the arguments that Triton gives to `initialize`."""
        config = json.loads(arguments["model_config"])
        self.folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self.inputs = frozenset(tensor["name"] for tensor in config["input"])
        self.outputs = {
            tensor["name"]: _INTEGER_DTYPES.get(tensor["data_type"], np.object_) for tensor in config["output"]
        }
        self._parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.spec: ModelSpec = spec_from_json(json.loads(self._parameters[SPEC_PARAMETER]))

    def integer(self, name: str) -> int:
        """A parameter of config.pbtxt."""
        return int(self._parameters[name])

    def integers(self, name: str) -> list[int]:
        """A parameter of config.pbtxt with commas."""
        return [int(value) for value in self._parameters[name].split(",")]


def tensor(request: Any, name: str) -> NDArray[Any] | None:
    """An input as it came, with its batch axis; None where it was not sent."""
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


def required(request: Any, name: str) -> NDArray[Any]:
    """An input that the configuration does not leave open."""
    values = tensor(request, name)
    assert values is not None, name
    return values


def floats(request: Any, name: str) -> NDArray[np.float32]:
    """An output of the encoder in float32; a TensorRT plan may give fewer bits."""
    return required(request, name).astype(np.float32, copy=False)


def texts(request: Any, name: str, shown: str = "input") -> list[str] | None:
    """A BYTES input as texts, or None where it was not sent; `shown` is what an error calls one of them.

    Raises:
        InputError: bytes that are no UTF-8.
    """
    values = tensor(request, name)
    return None if values is None else [_decoded(value, f"{shown} {i}") for i, value in enumerate(values.reshape(-1))]


def option(request: Any, name: str, default: Any = None) -> Any:
    """The value of an optional input, which all rows of a request share, as a Python object.

    Raises:
        InputError: rows with different values.
    """
    values = tensor(request, name)
    if values is None:
        return default
    first, *rest = values.reshape(-1).tolist()
    if any(value != first for value in rest):
        raise InputError(f"{name} differs between the rows of one request; send those rows in requests of their own")
    return _decoded(first, name) if isinstance(first, bytes) else first


def shared_texts(request: Any, name: str, shown: str) -> list[str] | None:
    """The texts of an optional BYTES input, of which every row of a request has the same several.

    Raises:
        InputError: bytes that are no UTF-8; rows with different texts.
    """
    values = texts(request, name, shown)
    if values is None:
        return None
    width = required(request, name).shape[-1]
    first = values[:width]
    if values != first * (len(values) // max(width, 1)):
        raise InputError(f"{name} differ between the rows of one request; send those rows in requests of their own")
    return first


def check_finite(name: str, values: NDArray[np.floating[Any]]) -> None:
    """Let no NaN or Inf leave.

    Raises:
        NonFiniteError: naming the rows.
    """
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if not finite.all():
        rows = ", ".join(map(str, np.flatnonzero(~finite)))
        raise NonFiniteError(f"the model gave NaN or Inf in {name} for the inputs {rows}; nothing of them is returned")


def max_active_dims(request: Any) -> int | None:
    """The option MAX_ACTIVE_DIMS.

    Raises:
        InputError: it is out of its range.
    """
    wanted = option(request, "MAX_ACTIVE_DIMS")
    return None if wanted is None else check_integer("MAX_ACTIVE_DIMS", wanted, 1, (1 << 31) - 1)


def attempt(work: Callable[[], T]) -> T | Any:
    """The result of `work`, or the TritonError that says why there is none."""
    try:
        return work()
    except InputError as error:
        return pb_utils.TritonError(f"InputError: {error}", pb_utils.TritonError.INVALID_ARG)
    except GteDeployError as error:
        return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
    except Exception as error:  # whatever escaped would fail every request of this execute
        logger.exception("a request failed")
        return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)


def answer_each(requests: Sequence[Any], answer: Callable[[Any], Mapping[str, NDArray[Any]]]) -> list[Any]:
    """A response for each request: the tensors of `answer`, or its error."""
    return [response(attempt(lambda request=request: answer(request))) for request in requests]  # type: ignore[misc]


def response(result: Any) -> Any:
    """An InferenceResponse of named tensors, or of the TritonError that came of `attempt`."""
    if isinstance(result, pb_utils.TritonError):
        return pb_utils.InferenceResponse(error=result)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in result.items()])


def _decoded(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}") from None

"""Sends tensors to a Triton Inference Server and receives its answers, over HTTP or gRPC.

It uses the binary encoding of tritonclient. Several threads may use a transport at once. HTTP connections come from
urllib3's pool, because a connection of tritonclient belongs to the thread that opened it.
"""

import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import (
    BackendError,
    GteDeployError,
    InputError,
    MissingDependencyError,
    NoAnswerError,
    NonFiniteError,
    UnavailableError,
    UnreachableError,
)
from gte_deploy.tasks.base import Tensors

_HEADER_LENGTH = "Inference-Header-Content-Length"
_BAD_REQUEST = {400, "INVALID_ARGUMENT"}
_UNAVAILABLE = {429, 502, 503, 504, "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
# gRPC has one status for a server that is overloaded and for one that is not there; its texts tell them apart.
_UNREACHED = re.compile(r"failed to connect|connection refused|resolving|resolution|lookup", re.IGNORECASE)


class Transport(Protocol):
    """A connection to one server. Calls raise InputError, or UnavailableError or BackendError with its reason."""

    def config(self, model: str) -> dict[str, Any]:
        """The configuration of a model, as Triton returns it in JSON."""
        ...

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run a model on named tensors. Texts are object arrays of bytes."""
        ...

    def close(self) -> None:
        """Close the connections. Idempotent."""
        ...


def open_transport(url: str, *, connections: int, timeout_s: float, headers: Mapping[str, str]) -> Transport:
    """The transport for http://, https://, grpc:// or grpcs:// (TLS) and HOST:PORT; connects on first use.

    Raises:
        InputError: the URL has another form.
        MissingDependencyError: tritonclient is not installed.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
        raise InputError(
            f"url must be http://HOST:PORT or grpc://HOST:PORT (with TLS https:// or grpcs://), not {url!r}"
        )
    if parts.scheme.startswith("http"):
        return HttpTransport(url.rstrip("/"), connections=connections, timeout_s=timeout_s, headers=headers)
    return GrpcTransport(parts.netloc, tls=parts.scheme == "grpcs", timeout_s=timeout_s, headers=headers)


class HttpTransport:
    """HTTP/1.1 with at most `connections` connections, which stay open; further calls wait for one."""

    def __init__(self, url: str, *, connections: int, timeout_s: float, headers: Mapping[str, str]) -> None:
        self._codec = _tritonclient("http")
        import urllib3  # comes with tritonclient

        self._urllib3: Any = urllib3
        self._url, self._timeout_s = url, timeout_s
        self._path = urllib.parse.urlsplit(url).path
        self._headers = dict(headers)
        # Any: urllib3's annotations allow only whole seconds for the wait for a connection.
        self._pool: Any = urllib3.connection_from_url(
            url, maxsize=connections, block=True, timeout=timeout_s, retries=False
        )

    def config(self, model: str) -> dict[str, Any]:
        """See Transport."""
        config: dict[str, Any] = json.loads(self._request("GET", model, "config").data)
        return config

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See Transport."""
        client = self._codec.InferenceServerClient
        wanted = [self._codec.InferRequestedOutput(name, binary_data=True) for name in outputs]
        body, header_length = client.generate_request_body(_as_inputs(self._codec, inputs), outputs=wanted)
        headers = {} if header_length is None else {_HEADER_LENGTH: str(header_length)}
        response = self._request("POST", model, "infer", body=body, headers=headers)
        length = response.headers.get(_HEADER_LENGTH)
        result = client.parse_response_body(response.data, header_length=None if length is None else int(length))
        return _outputs(result, model, outputs)

    def close(self) -> None:
        """See Transport."""
        self._pool.close()

    def _request(
        self, method: str, model: str, what: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        path = f"{self._path}/v2/models/{urllib.parse.quote(model)}/{what}"
        sent = {**self._headers, **(headers or {})}
        try:
            # Without pool_timeout, a call that waits for a connection while the pool closes would wait for ever.
            response = self._pool.urlopen(method, path, body=body, headers=sent, pool_timeout=self._timeout_s)
        except self._urllib3.exceptions.ClosedPoolError as error:
            raise _closed() from error
        except self._urllib3.exceptions.ConnectTimeoutError as error:  # also its subclasses, which are no timeouts
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
            raise _unreachable(self._url, reason) from error
        except (self._urllib3.exceptions.TimeoutError, self._urllib3.exceptions.EmptyPoolError) as error:
            raise _no_answer(self._url, self._timeout_s) from error
        except self._urllib3.exceptions.HTTPError as error:
            raise UnavailableError(f"the connection to {self._url} failed: {error}") from error
        if response.status != 200:
            raise _refused(self._url, response.status, _reason(response.data))
        return response


class GrpcTransport:
    """gRPC; all calls share one HTTP/2 connection."""

    def __init__(self, address: str, *, tls: bool, timeout_s: float, headers: Mapping[str, str]) -> None:
        self._codec = _tritonclient("grpc")
        self._url, self._timeout_s = f"grpc{'s' * tls}://{address}", timeout_s
        self._headers = dict(headers) or None
        self._client: Any = self._codec.InferenceServerClient(address, ssl=tls)

    def config(self, model: str) -> dict[str, Any]:
        """See Transport."""
        config: dict[str, Any] = self._call("get_model_config", model, as_json=True)["config"]
        return config

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See Transport."""
        wanted = [self._codec.InferRequestedOutput(name) for name in outputs]
        return _outputs(self._call("infer", model, _as_inputs(self._codec, inputs), outputs=wanted), model, outputs)

    def close(self) -> None:
        """See Transport."""
        self._client.close()

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._client, method)(
                *arguments, headers=self._headers, client_timeout=self._timeout_s, **options
            )
        except self._codec.InferenceServerException as error:
            status = (error.status() or "").removeprefix("StatusCode.")
            if status == "DEADLINE_EXCEEDED":
                raise _no_answer(self._url, self._timeout_s) from error
            if status == "UNAVAILABLE" and _UNREACHED.search(error.message()):
                raise _unreachable(self._url, error.message()) from error
            raise _refused(self._url, status, error.message()) from error
        except ValueError as error:  # gRPC raises it for a closed channel
            raise _closed() from error


def _tritonclient(protocol: str) -> ModuleType:
    try:
        if protocol == "http":
            import tritonclient.http as module
        else:
            import tritonclient.grpc as module
    except (ModuleNotFoundError, RuntimeError) as error:  # RuntimeError: tritonclient without this protocol
        raise MissingDependencyError(f"tritonclient[{protocol}]", "triton") from error
    return module


def _as_inputs(codec: ModuleType, tensors: Tensors) -> list[Any]:
    inputs = []
    for name, array in tensors.items():
        tensor = codec.InferInput(name, list(array.shape), _DATATYPES[array.dtype.kind, array.dtype.itemsize])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


_DATATYPES = {("O", np.dtype(object).itemsize): "BYTES", ("b", 1): "BOOL", ("i", 4): "INT32", ("i", 8): "INT64"}


def _outputs(result: Any, model: str, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    arrays = {name: result.as_numpy(name) for name in names}
    missing = [name for name, array in arrays.items() if array is None]
    if missing:
        raise BackendError(f"the server's {model} answered without {', '.join(missing)}")
    return arrays


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):  # the body is a proxy's page
        return body[:200].decode(errors="replace") or "no reason given"


def _refused(url: str, status: int | str, reason: str) -> GteDeployError:
    # The models of gte-export put the name of the error before its message, and Triton puts its own text before both.
    _, named, own_reason = reason.partition("InputError: ")
    if named or status in _BAD_REQUEST:
        return InputError(own_reason or reason)
    _, named, own_reason = reason.partition("NonFiniteError: ")
    if named:
        return NonFiniteError(own_reason)
    if status in _UNAVAILABLE:
        return UnavailableError(f"{url} cannot answer now: {reason}")
    return BackendError(f"{url} failed with {status}: {reason}")


def _unreachable(url: str, reason: str) -> UnreachableError:
    return UnreachableError(f"{url} cannot be reached: {reason}; check the address, and whether the server runs")


def _no_answer(url: str, timeout_s: float) -> NoAnswerError:
    return NoAnswerError(f"{url} gave no answer within {timeout_s:g} s; send fewer texts at once or raise timeout_s")


def _closed() -> BackendError:
    return BackendError("this client is closed")

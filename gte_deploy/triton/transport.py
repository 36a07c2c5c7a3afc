"""Sends tensors to a Triton Inference Server and receives its answers, over HTTP or gRPC.

It uses the binary encoding of tritonclient. Several threads may use a transport at once. HTTP connections come from
urllib3's pool, because a connection of tritonclient belongs to the thread that opened it.

What a server sends is data of a stranger: a request has one deadline, an answer has a size, and every part of it is
checked before it is used.
"""

import json
import math
import re
import struct
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from gte_deploy.triton.address import Address, checked_headers, parse_address

MAX_ANSWER_BYTES = 1 << 30
"""The largest answer that is read, in bytes; a larger one is an error before it is in memory."""

_MAX_CONFIG_BYTES = 1 << 24
_MAX_REASON_BYTES = 1 << 16
_MAX_REASON_CHARS = 2000
_READ_BYTES = 1 << 18
_HEADER_LENGTH = "Inference-Header-Content-Length"
_BAD_REQUEST = {400, "INVALID_ARGUMENT"}
_UNAVAILABLE = {429, 502, 503, 504, "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
# gRPC has one status for a server that is overloaded and for one that is not there; its texts tell them apart.
_UNREACHED = re.compile(r"failed to connect|connection refused|resolving|resolution|lookup", re.IGNORECASE)
# gRPC's own texts for an answer above the limit, and for one that is compressed.
_TOO_LARGE = re.compile(r"larger than max|compression algorithm", re.IGNORECASE)
_NO_COMPRESSION = 1  # a set of bits, of which the first is "identity"
_TYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}


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


def open_transport(
    url: str,
    *,
    connections: int,
    timeout_s: float,
    headers: Mapping[str, str],
    max_answer_bytes: int = MAX_ANSWER_BYTES,
) -> Transport:
    """The transport for http://, https://, grpc:// or grpcs:// (TLS) and HOST:PORT; connects on first use.

    Raises:
        InputError: the URL has another form, or a header cannot be sent.
        MissingDependencyError: tritonclient is not installed.
    """
    address = parse_address(url)
    sent = checked_headers(headers, address)
    if address.is_grpc:
        return GrpcTransport(address, timeout_s=timeout_s, headers=sent, max_answer_bytes=max_answer_bytes)
    return HttpTransport(
        address, connections=connections, timeout_s=timeout_s, headers=sent, max_answer_bytes=max_answer_bytes
    )


class HttpTransport:
    """HTTP/1.1 with at most `connections` connections, which stay open; further calls wait for one."""

    def __init__(
        self,
        address: Address,
        *,
        connections: int,
        timeout_s: float,
        headers: Mapping[str, str],
        max_answer_bytes: int,
    ) -> None:
        self._codec = _tritonclient("http")
        import urllib3  # comes with tritonclient

        from gte_deploy.triton.deadline import deadline, open_pool

        self._errors: Any = urllib3.exceptions
        self._deadline = deadline
        self._address, self._timeout_s, self._max_bytes = address, timeout_s, max_answer_bytes
        self._headers = dict(headers)
        self._pool = open_pool(address.host, tls=address.has_tls, connections=connections)

    def config(self, model: str) -> dict[str, Any]:
        """See Transport."""
        body, _ = self._request("GET", model, "config", most=_MAX_CONFIG_BYTES)
        return _json_object(body, f"the configuration of {model}", self._address)

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See Transport."""
        wanted = [self._codec.InferRequestedOutput(name, binary_data=True) for name in outputs]
        body, header_length = self._codec.InferenceServerClient.generate_request_body(
            _as_inputs(self._codec, inputs), outputs=wanted
        )
        headers = {} if header_length is None else {_HEADER_LENGTH: str(header_length)}
        answer, received = self._request("POST", model, "infer", body, headers, most=self._max_bytes)
        parts = _http_outputs(answer, received.get(_HEADER_LENGTH), model, self._address)
        return _arrays(parts, outputs, model, self._address)

    def close(self) -> None:
        """See Transport."""
        self._pool.close()

    def _request(
        self,
        method: str,
        model: str,
        what: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        most: int,
    ) -> tuple[bytes, Mapping[str, str]]:
        """The body and the headers of an answer with status 200, of at most so many bytes."""
        path = f"{self._address.path}/v2/models/{urllib.parse.quote(model)}/{what}"
        sent = {**self._headers, **(headers or {})}
        errors = self._errors
        try:
            with self._deadline(self._timeout_s):
                # Without pool_timeout, a call that waits for a connection while the pool closes would wait for ever.
                response = self._pool.urlopen(
                    method,
                    path,
                    body=body,
                    headers=sent,
                    pool_timeout=self._timeout_s,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
                content = self._content(response, most if response.status == 200 else _MAX_REASON_BYTES)
        except errors.ClosedPoolError as error:
            raise _closed() from error
        except errors.ConnectTimeoutError as error:  # also its subclasses, which are no timeouts
            cause = error.__cause__
            reason = (isinstance(cause, OSError) and (cause.strerror or str(cause))) or str(error)
            raise _unreachable(self._address, reason) from error
        except (errors.HTTPError, TimeoutError) as error:
            if isinstance(error, TimeoutError | errors.TimeoutError | errors.EmptyPoolError) or any(
                isinstance(part, TimeoutError) for part in error.args
            ):
                raise _no_answer(self._address, self._timeout_s) from error
            raise UnavailableError(f"the connection to {self._address} failed: {_shortened(str(error))}") from error
        except (ValueError, OverflowError) as error:  # from http.client, for sizes of chunks
            raise UnavailableError(f"the connection to {self._address} failed: {_shortened(str(error))}") from error
        if response.status != 200:
            raise _refused(self._address, response.status, _reason(content))
        return content, response.headers

    def _content(self, response: Any, most: int) -> bytes:
        """The body of a response, as it was sent. Afterwards the connection is free for the next request.

        Raises:
            BackendError: it has more bytes than `most`, or is compressed.
        """
        try:
            length = response.headers.get("Content-Length", "")[:19]
            encoding = response.headers.get("Content-Encoding", "identity")
            if response.status == 200 and encoding.lower() != "identity":
                # To unpack it could take a thousand times its size. No compression was asked for.
                raise BackendError(f"{self._address} sent an answer compressed by {encoding[:40]!r}, which is not read")
            body = bytearray()
            if not (length.isdecimal() and int(length) > most):
                while len(body) <= most and (part := response.read(_READ_BYTES, decode_content=False)):
                    body += part
            if response.status == 200 and (len(body) > most or (length.isdecimal() and int(length) > most)):
                size = f"{int(length):,} bytes" if length.isdecimal() else f"more than {most:,} bytes"
                raise _too_large(self._address, size, most)
        except BaseException:
            response.close()
            response.release_conn()
            raise
        if response.length_remaining or len(body) > most:
            response.close()
        response.release_conn()
        return bytes(body)


class GrpcTransport:
    """gRPC; all calls share one HTTP/2 connection."""

    def __init__(
        self, address: Address, *, timeout_s: float, headers: Mapping[str, str], max_answer_bytes: int
    ) -> None:
        self._codec = _tritonclient("grpc")
        self._address, self._timeout_s, self._max_bytes = address, timeout_s, max_answer_bytes
        self._headers = dict(headers) or None
        self._client: Any = self._codec.InferenceServerClient(
            address.host,
            ssl=address.has_tls,
            channel_args=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", min(max_answer_bytes, (1 << 31) - 1)),
                # To unpack an answer could take a thousand times its size.
                ("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION),
            ],
        )

    def config(self, model: str) -> dict[str, Any]:
        """See Transport."""
        answer = self._call("get_model_config", model, as_json=True)
        config = answer.get("config") if isinstance(answer, dict) else None
        if not isinstance(config, dict):
            raise _nonsense(self._address, f"the configuration of {model}", "it is empty")
        return config

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See Transport."""
        wanted = [self._codec.InferRequestedOutput(name) for name in outputs]
        answer = self._call("infer", model, _as_inputs(self._codec, inputs), outputs=wanted).get_response()
        if len(answer.outputs) != len(answer.raw_output_contents):
            found = f"{len(answer.outputs)} tensors and {len(answer.raw_output_contents)} of them in binary"
            raise _nonsense(self._address, f"the answer of {model}", found)
        parts = [
            _Part(tensor.name, tensor.datatype, tuple(tensor.shape), data)
            for tensor, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
        ]
        return _arrays(parts, outputs, model, self._address)

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
                raise _no_answer(self._address, self._timeout_s) from error
            if status == "UNAVAILABLE" and _UNREACHED.search(error.message()):
                raise _unreachable(self._address, error.message()) from error
            if _TOO_LARGE.search(error.message()):
                raise BackendError(
                    f"{self._address} sent an answer that is not read: {_shortened(error.message())}; at most "
                    f"{self._max_bytes:,} bytes without compression are"
                ) from error
            raise _refused(self._address, status, error.message()) from error
        except ValueError as error:  # gRPC raises it for a closed channel
            raise _closed() from error


@dataclass(frozen=True)
class _Part:
    """One tensor of an answer as it was sent: Triton's name of its type, its shape, and its bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


def _http_outputs(body: bytes, header_length: str | None, model: str, address: Address) -> list[_Part]:
    """The tensors of a body: a JSON object of `header_length` bytes, and behind it the bytes of each tensor.

    Raises:
        BackendError: the body has another form.
    """
    what = f"the answer of {model}"
    if header_length is not None and not (header_length.isascii() and header_length.isdecimal()):
        raise _nonsense(address, what, f"its {_HEADER_LENGTH} is {header_length[:40]!r}")
    # At most as many digits as a size in memory can have: Python refuses very long numbers in its own way.
    start = len(body) if header_length is None else int(header_length[:19])
    outputs = _json_object(body[:start], what, address).get("outputs")
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise _nonsense(address, what, "it has no list of outputs")
    parts = []
    for output in outputs:
        name, datatype, shape = (output.get(key) for key in ("name", "datatype", "shape"))
        parameters = output.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if not isinstance(name, str) or not isinstance(datatype, str) or not _is_shape(shape):
            raise _nonsense(address, what, "an output has no name, datatype or shape")
        if type(size) is not int or not 0 <= size <= len(body) - start:
            raise _nonsense(address, what, f"{name[:40]} has no binary data of the size that it names")
        parts.append(_Part(name, datatype, tuple(shape), body[start : start + size]))
        start += size
    return parts


def _is_shape(value: Any) -> bool:
    # No tensor of a repository has more than three dimensions.
    return (
        isinstance(value, list) and len(value) < 8 and all(type(size) is int and 0 <= size < 1 << 40 for size in value)
    )


def _arrays(parts: Sequence[_Part], names: Sequence[str], model: str, address: Address) -> dict[str, NDArray[Any]]:
    """The tensors with these names.

    Raises:
        BackendError: one is missing or twice there, has another type, or not as many bytes as its shape.
    """
    found = {part.name: part for part in parts}
    missing = [name for name in names if name not in found]
    if missing:
        raise BackendError(f"the server's {model} answered without {', '.join(missing)}")
    if len(found) != len(parts):
        raise _nonsense(address, f"the answer of {model}", "an output is there twice")
    return {name: _array(found[name], model, address) for name in names}


def _array(part: _Part, model: str, address: Address) -> NDArray[Any]:
    what = f"{part.name} of {model}"
    dtype = _TYPES.get(part.datatype)
    if dtype is None:
        raise _nonsense(address, what, f"its type is {part.datatype[:40]!r}")
    if not _is_shape(list(part.shape)):
        raise _nonsense(address, what, f"its shape is {str(part.shape)[:80]}")
    count = math.prod(part.shape)
    if part.datatype == "BYTES":
        values = _texts(part.data, count)
        if values is None:
            raise _nonsense(address, what, f"its bytes are not {count:,} texts, as its shape {list(part.shape)} says")
        return values.reshape(part.shape)
    if len(part.data) != count * np.dtype(dtype).itemsize:
        raise _nonsense(address, what, f"it has {len(part.data):,} bytes for the shape {list(part.shape)}")
    return np.frombuffer(part.data, dtype=dtype).reshape(part.shape)


def _texts(data: bytes, count: int) -> NDArray[Any] | None:
    """The texts of a tensor, each behind its length in four bytes; None if there are more or fewer than `count`."""
    if 4 * count > len(data):
        return None
    values = np.empty(count, dtype=np.object_)
    start = 0
    for number in range(count):
        if start + 4 > len(data):
            return None
        end = start + 4 + struct.unpack_from("<I", data, start)[0]
        values[number] = data[start + 4 : end]
        start = end
    return values if start == len(data) else None


def _json_object(body: bytes, what: str, address: Address) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        shown = body[:80].decode("utf-8", errors="replace")
        raise _nonsense(address, what, f"it is not JSON ({type(error).__name__}): {shown!r}") from error
    if not isinstance(value, dict):
        raise _nonsense(address, what, f"it is {type(value).__name__}, not a JSON object")
    return value


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


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):  # the body is a proxy's page
        return body[:200].decode(errors="replace") or "no reason given"


def _refused(address: Address, status: int | str, reason: str) -> GteDeployError:
    # The models of gte-export put the name of the error before its message, and Triton puts its own text before both.
    reason = _shortened(reason)
    _, named, own_reason = reason.partition("InputError: ")
    if named or status in _BAD_REQUEST:
        return InputError(own_reason or reason)
    _, named, own_reason = reason.partition("NonFiniteError: ")
    if named:
        return NonFiniteError(own_reason)
    if status in _UNAVAILABLE:
        return UnavailableError(f"{address} cannot answer now: {reason}")
    return BackendError(f"{address} failed with {status}: {reason}")


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON_CHARS else reason[:_MAX_REASON_CHARS] + " …"


def _nonsense(address: Address, what: str, reason: str) -> BackendError:
    return BackendError(
        f"{address} sent what no Triton with a repository of gte-export sends: {what}: {reason}. Check the URL, and "
        "what stands between this client and the server."
    )


def _too_large(address: Address, size: str, most: int) -> BackendError:
    return BackendError(f"{address} sent an answer of {size}; at most {most:,} are read. Send fewer texts at once.")


def _unreachable(address: Address, reason: str) -> UnreachableError:
    return UnreachableError(
        f"{address} cannot be reached: {_shortened(reason)}; check the address, and whether the server runs"
    )


def _no_answer(address: Address, timeout_s: float) -> NoAnswerError:
    return NoAnswerError(
        f"{address} gave no answer within {timeout_s:g} s; send fewer texts at once or raise timeout_s"
    )


def _closed() -> BackendError:
    return BackendError("this client is closed")

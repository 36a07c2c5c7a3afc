"""HTTP connections with one deadline for a whole request: name, connection, TLS, sending, headers and body together.

A timeout of a socket begins anew with every byte that arrives. So each operation of these sockets gets what is left of
the request's time. Only the system's resolver, which looks up a name, has times of its own.
"""

import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import urllib3
import urllib3.connection
import urllib3.exceptions

_DEADLINE: ContextVar[float] = ContextVar("deadline")


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End all that the sockets of this thread do within the `with` block after so many seconds, with TimeoutError."""
    token = _DEADLINE.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def seconds_left() -> float:
    """The seconds that are left of the request.

    Raises:
        TimeoutError: none are left.
    """
    left = _DEADLINE.get() - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def open_pool(host: str, *, tls: bool, connections: int) -> Any:
    """A pool of urllib3 with at most so many connections, which stay open. Requests need a `deadline` around them.

    Raises:
        urllib3.exceptions.LocationParseError: `host` is no HOST:PORT.
    """
    options: dict[str, Any] = {"maxsize": connections, "block": True, "retries": False}
    if not tls:
        pool: Any = urllib3.connection_from_url(f"http://{host}", **options)
        pool.ConnectionCls = _Connection
        return pool
    context = ssl.create_default_context()
    context.sslsocket_class = _TLSSocket
    pool = urllib3.connection_from_url(f"https://{host}", ssl_context=context, **options)
    pool.ConnectionCls = _TLSConnection
    return pool


class _Timed:
    """The operations of a socket that http.client uses, each with the time that is left."""

    def recv_into(self, *arguments: Any, **options: Any) -> Any:
        self.settimeout(seconds_left())  # type: ignore[attr-defined]
        return super().recv_into(*arguments, **options)  # type: ignore[misc]

    def send(self, *arguments: Any, **options: Any) -> Any:
        self.settimeout(seconds_left())  # type: ignore[attr-defined]
        return super().send(*arguments, **options)  # type: ignore[misc]

    def sendall(self, *arguments: Any, **options: Any) -> Any:
        self.settimeout(seconds_left())  # type: ignore[attr-defined]
        return super().sendall(*arguments, **options)  # type: ignore[misc]


class _Socket(_Timed, socket.socket):
    """A socket without TLS."""


class _TLSSocket(_Timed, ssl.SSLSocket):
    """A socket with TLS."""


class _Response(http.client.HTTPResponse):
    """A response whose chunks have sizes from 0: for a chunk of -1 bytes http.client would read without a limit."""

    def _safe_read(self, amt: int) -> bytes:
        if amt < 0:
            raise http.client.HTTPException(f"a chunk has the size {amt}")
        found: bytes = super()._safe_read(amt)  # type: ignore[misc]
        return found


class _Connecting:
    """Opens the connection of a pool within the deadline, whatever the number of the host's addresses."""

    response_class: Any = _Response

    def _new_conn(self) -> socket.socket:
        connection: Any = self
        errors = urllib3.exceptions
        try:
            found = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise errors.NameResolutionError(connection.host, connection, error) from error
        failure: OSError = OSError("the host has no address")
        for family, kind, protocol, _, address in found:
            try:
                return _connected(_Socket(family, kind, protocol), address, connection.socket_options)
            except OSError as error:
                failure = error
        if isinstance(failure, TimeoutError):
            raise errors.ConnectTimeoutError(connection, "timed out") from failure
        raise errors.NewConnectionError(connection, f"no connection: {failure}") from failure


class _Connection(_Connecting, urllib3.connection.HTTPConnection):
    """HTTP within the deadline."""


class _TLSConnection(_Connecting, urllib3.connection.HTTPSConnection):
    """HTTPS within the deadline."""


def _connected(opened: socket.socket, address: Any, options: Any) -> socket.socket:
    try:
        for option in options or ():
            opened.setsockopt(*option)
        opened.settimeout(seconds_left())
        opened.connect(address)
        opened.settimeout(seconds_left())  # a handshake of TLS begins with it
    except BaseException:
        opened.close()
        raise
    return opened

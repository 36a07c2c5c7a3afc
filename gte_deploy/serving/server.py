"""The process of a server: its socket, its signals and its logs."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn

from gte_deploy.core.errors import InputError
from gte_deploy.model import Model
from gte_deploy.serving.app import Server
from gte_deploy.serving.observing import access_logger
from gte_deploy.serving.options import TOKEN_VARIABLE, ServerOptions
from gte_deploy.serving.registry import Registry

logger = logging.getLogger(__name__)


# Longer than proxies keep a connection, usually 60 seconds: one that the server closes first costs them a request.
_KEEP_ALIVE_SECONDS = 75


class _Process(uvicorn.Server):
    """uvicorn's server; a signal ends it with exit code 0, where uvicorn would raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def serve(sources: Mapping[str, Callable[[], Model]], options: ServerOptions) -> None:
    """Serve models over HTTP until SIGTERM or SIGINT.

    On a signal the port closes, requests in work are answered for at most `options.drain_seconds`, and the models
    close.

    Args:
        sources: name -> function that loads the model.
        options: those of the server.

    Raises:
        InputError: the token is not readable, or the port is taken.
        GteDeployError, OSError: a model cannot be loaded.
    """
    token = read_token(options.token_file, os.environ)
    failures: list[Exception] = []
    started = time.perf_counter()

    def ready() -> None:
        print(f"gte-deploy: ready after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

    def fail(error: Exception) -> None:
        failures.append(error)
        process.should_exit = True

    registry = Registry(sources, warm_up=options.warm_up)
    server = Server(registry, options, token=token, on_failure=fail, on_ready=ready)
    _log_access()
    # Warnings about a caller's words are for callers in Python; here they would be texts of others in the log.
    logging.getLogger("gte_deploy.text").setLevel(logging.ERROR)
    listener = _listen(options.host, options.port)
    process = _Process(
        uvicorn.Config(
            server.app(),
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(options.drain_seconds)),
        )
    )
    with listener:
        host, port = listener.getsockname()[:2]
        if token is None and host not in ("127.0.0.1", "::1"):
            logger.warning("everyone who reaches %s may use the server: there is no token", host)
        shown = f"[{host}]" if ":" in host else host
        print(f"gte-deploy: http://{shown}:{port} serves {', '.join(registry.names)}", file=sys.stderr, flush=True)
        process.run(sockets=[listener])
    if failures:
        raise failures[0]


def read_token(file: Path | None, variables: Mapping[str, str]) -> str | None:
    """Return the bearer token, from the file or from the environment, or None.

    Raises:
        InputError: the file cannot be read; the token is empty or has white space or characters beyond ASCII in it;
            or both are given.
    """
    given = variables.get(TOKEN_VARIABLE)
    if file is None:
        if given is None:
            return None
        token, source = given.strip(), TOKEN_VARIABLE
    else:
        if given is not None:
            raise InputError(f"both {TOKEN_VARIABLE} and --token-file {file} give a token; leave one out")
        source = f"--token-file {file}"
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(f"the token of {source} must be printable ASCII without spaces, and not empty")
    return token


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket on which connections can be accepted.

    Raises:
        InputError: the address is not this machine's, or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error
    # Connections inherit it. asyncio sets it only on sockets that it made itself. Without it, the body of an answer
    # waits 40 ms until the client acknowledges the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _log_access() -> None:
    """Write the lines for requests to stderr as they are, whatever the level of other logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_logger.handlers[:] = [handler]
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False

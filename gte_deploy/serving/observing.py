"""What surrounds each request: its id, the bearer token, its metrics, its span and its line in the log."""

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from datetime import datetime, timezone
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gte_deploy.serving.facts import FACTS, Facts, path_of
from gte_deploy.serving.failures import CLIENT_GONE, RequestError, failure_response
from gte_deploy.serving.metrics import Metrics
from gte_deploy.serving.options import AccessLog
from gte_deploy.serving.tracing import Tracing

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("gte_deploy.serving.access")

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class BearerToken:
    """Compares the bearer token of requests with the server's, in constant time."""

    def __init__(self, token: str | None, *, open_paths: Collection[str]) -> None:
        """Take the token, or None for no check; to GET one of `open_paths` never needs one."""
        self._digest = None if token is None else _digest(token.encode())
        self._open_paths = frozenset(open_paths)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Do nothing if the request may go on.

        Raises:
            RequestError: the token is missing or another one.
        """
        if self._digest is None or (method in ("GET", "HEAD") and path in self._open_paths):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip().encode()), self._digest):
            raise RequestError(
                401,
                "the bearer token is missing or wrong; send the header Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(token: bytes) -> bytes:
    # Digests have one length, so that the comparison says nothing about the length of the token.
    return hashlib.sha256(token).digest()


class Observed:
    """An ASGI application around another one: see the module."""

    def __init__(
        self, app: ASGIApp, *, token: BearerToken, metrics: Metrics, tracing: Tracing, access_log: AccessLog
    ) -> None:
        """Surround `app`."""
        self._app = app
        self._token = token
        self._metrics = metrics
        self._tracing = tracing
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        facts = Facts(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope[FACTS] = facts
        span = self._tracing.begin(scope["method"], scope["path"], headers, facts)
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = facts.request_id
                _add_costs(out, facts, started)
            await send(message)

        try:
            await self._answer(scope, receive, observed_send)
        finally:
            self._tracing.end(span, scope["method"], facts, status or CLIENT_GONE)
            seconds = time.perf_counter() - started
            self._metrics.answered(facts, status or CLIENT_GONE, seconds)
            self._log(scope, facts, status or CLIENT_GONE, seconds, self._tracing.trace_id(span))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._token.check(scope["method"], path_of(scope), Headers(scope=scope))
            await self._app(scope, receive, send)
        except RequestError as error:
            await failure_response(error, scope)(scope, receive, send)
        except Exception:  # Starlette raises an error again after its answer, `server_failed`
            facts: Facts = scope[FACTS]
            logger.exception("the request %s failed: %s %s", facts.request_id, scope["method"], facts.route)

    def _log(self, scope: Scope, facts: Facts, status: int, seconds: float, trace_id: str | None) -> None:
        if self._access_log == "off" or not access_logger.isEnabledFor(logging.INFO):
            return
        client = scope.get("client") or ("-", 0)
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1000, 2),
            "request_id": facts.request_id,
        }
        if trace_id is not None:
            line["trace_id"] = trace_id
        if facts.model:
            line |= {"model": facts.model, "inputs": facts.inputs}
        line |= {f"{stage}_ms": round(value * 1000, 2) for stage, value in facts.seconds().items()}
        if self._access_log == "json":
            access_logger.info("%s", json.dumps(line))
            return
        # The path is the client's: in quotes of JSON, it cannot begin a line of its own.
        head = f"{line.pop('time')} {line.pop('client')} {line.pop('method')} {json.dumps(line.pop('path'))}"
        access_logger.info("%s", f"{head} {line.pop('status')} " + " ".join(f"{k}={v}" for k, v in line.items()))


def _add_costs(headers: MutableHeaders, facts: Facts, started: float) -> None:
    """Add TEI's headers on the cost of an answer, and Server-Timing, which browsers show; times in milliseconds."""
    if facts.call is None or not facts.model:
        return
    usage = facts.call.usage
    headers["x-compute-characters"] = str(facts.characters)
    headers["x-compute-tokens"] = str(usage.tokens)
    headers["x-total-time"] = str(round((time.perf_counter() - started) * 1000))
    headers["x-queue-time"] = str(round(usage.queued_s * 1000))
    headers["x-inference-time"] = str(round(usage.computed_s * 1000))
    seconds = {"total": time.perf_counter() - started, **facts.seconds()}
    headers["server-timing"] = ", ".join(f"{name};dur={value * 1000:.2f}" for name, value in seconds.items())

"""The requests in work: how many there are, their deadlines, and callers that went away."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from gte_deploy.core.calls import Call
from gte_deploy.core.errors import DeadlineError
from gte_deploy.serving.failures import RequestError, overloaded

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT_HEADER = "X-Request-Timeout"
# A body that is too large is read so far, and thrown away, that its sender can read the answer.
_READ_BEYOND = 4
_CLOSING_SECONDS = 10


class ClientGoneError(Exception):
    """The client closed the connection, so nobody waits for an answer."""


def seconds_allowed(request: Request, most: float) -> float:
    """The seconds that a request has, from its header or by default.

    Raises:
        RequestError: the header is not a positive number.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise RequestError(422, f"the header {TIMEOUT_HEADER} is {given[:40]!a}; expected seconds above 0")
    return min(seconds, most)


def too_late(message: str = "the deadline of the request passed before its answer was there") -> RequestError:
    """The answer to a request whose deadline has passed."""
    return RequestError(504, f"{message}. Send fewer texts in one request, or allow more time.", "Timeout")


async def read_body(request: Request, most: int, deadline: float) -> bytes:
    """Return the body of a request; `deadline` is a time of `time.monotonic()`.

    Raises:
        RequestError: the body has more than `most` bytes, or did not arrive in time.
        ClientGoneError: the client went away.
    """
    chunks: list[bytes] = []

    async def read() -> int:
        size = 0
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            size += len(message.get("body", b""))
            if size <= most:
                chunks.append(message.get("body", b""))
            if not message.get("more_body", False) or size > _READ_BEYOND * most:
                return size

    try:
        size = await asyncio.wait_for(read(), max(0.0, deadline - time.monotonic()))
    except asyncio.TimeoutError:  # not the builtin one before Python 3.11
        raise RequestError(408, "the body did not arrive in time", "Timeout") from None
    if size > most:
        raise RequestError(413, f"the body has {size:,} bytes or more, and this server takes {most:,}")
    return b"".join(chunks)


class Runner:
    """Runs the work of requests in threads; what they compute joins into batches in the models' own threads."""

    def __init__(self, most: int) -> None:
        """Allow so many requests in work at once."""
        self._most = most
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="gte-request")
        self._in_work = 0
        self._calls: set[Call] = set()

    @property
    def in_work(self) -> int:
        """The number of requests in work, those included whose client went away while they were computed."""
        return self._in_work

    def enter(self) -> None:
        """Count one more request.

        Raises:
            RequestError: there are too many.
        """
        if self._in_work >= self._most:
            raise overloaded(f"{self._most:,} requests are in work already, as many as this server takes", 1)
        self._in_work += 1

    def leave(self) -> None:
        """Count one request less."""
        self._in_work -= 1

    async def run(self, request: Request, call: Call, work: Callable[[], T]) -> T:
        """Return `work()`, which a thread runs inside `call`; `leave` when it has ended, whatever became of it.

        Raises:
            RequestError: the deadline of the call passed.
            ClientGoneError: the client went away; the call is cancelled, so that nothing more is computed for it.
        """
        loop = asyncio.get_running_loop()
        self._calls.add(call)

        def inside() -> T:
            with call:
                call.check()
                return work()

        def ended() -> None:
            self._calls.discard(call)
            self.leave()

        def ended_in_thread(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended)

        future = self._pool.submit(inside)
        future.add_done_callback(ended_in_thread)
        answer = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            done, _ = await asyncio.wait((answer, gone), timeout=call.remaining_s, return_when=asyncio.FIRST_COMPLETED)
            if answer in done:
                return answer.result()
            raise ClientGoneError if gone in done else DeadlineError
        except DeadlineError:
            raise too_late() from None
        finally:
            gone.cancel()
            if not answer.done():
                call.cancel()
                answer.cancel()
                answer.add_done_callback(_forget)

    async def close(self) -> None:
        """Cancel what is in work, and wait a little for the threads."""
        for call in list(self._calls):
            call.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + _CLOSING_SECONDS
        while self._in_work and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if self._in_work:
            logger.warning("%d requests were still computed when the server ended", self._in_work)


def _forget(future: "asyncio.Future[T]") -> None:
    """Take note of the error of an answer that nobody waits for, so that asyncio does not log it."""
    if not future.cancelled():
        future.exception()


async def _disconnected(request: Request) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""`Call`: the deadline, the cancellation and the cost of what one caller asks of a model.

    call = Call(deadline=time.monotonic() + 5)
    with call:
        model.encode(texts)
    call.usage

The methods of a model look the call up in a context variable, so that their signatures need no argument for it.
"""

import math
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields

from gte_deploy.core.errors import CancelledCallError, DeadlineError, InputError


@dataclass(frozen=True)
class Usage:
    """The cost of a call so far. Sums go over the batches with rows of the call, also over those computed at once.

    Args:
        rows: computed rows. Equal texts of one call are computed once.
        tokens: tokens of these rows, special tokens included.
        padded_tokens: these tokens and the padding beside them.
        batches: batches with rows of the call.
        queued_s: seconds for which rows waited for their batch, summed over batches; of a batch the longest wait.
        computed_s: seconds in which the engine computed the batches, also for the rows of other callers.
    """

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    queued_s: float = 0.0
    computed_s: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Usage)))


class Call:
    """What one caller asks of a model inside `with call:`, in one or several calls of its methods.

    The block holds for the thread (or asyncio task) that is in it, and for the threads that a method starts itself.
    Several threads may be in blocks of one call.
    """

    def __init__(self, *, deadline: float | None = None) -> None:
        """Begin a call. After `deadline`, a time of `time.monotonic()`, its methods raise DeadlineError.

        Raises:
            InputError: the deadline is no finite number.
        """
        if deadline is not None and not (isinstance(deadline, int | float) and math.isfinite(deadline)):
            raise InputError(f"deadline is {deadline!r}; expected a time of time.monotonic(), or None")
        self.deadline = deadline
        self.is_admitted = False  # whether a bounded queue has let rows of this call in; it lets the rest in, too
        self._is_cancelled = False
        self._usage = Usage()
        self._lock = threading.Lock()
        self._watchers: set[Callable[[], None]] = set()

    def __enter__(self) -> "Call":
        _calls.set((*_calls.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _calls.set(_calls.get()[:-1])

    @property
    def usage(self) -> Usage:
        """The cost so far."""
        return self._usage

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, 0 if it is over; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def cancel(self) -> None:
        """Give the call up, from any thread: its methods raise CancelledCallError, and its waiting rows are dropped.

        Rows that an engine computes at this moment are computed to the end. Idempotent; a call that has ended does not
        change.
        """
        with self._lock:
            self._is_cancelled = True
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher()

    def check(self) -> None:
        """Do nothing if the call may go on.

        Raises:
            CancelledCallError: it was cancelled.
            DeadlineError: its deadline is over.
        """
        if self._is_cancelled:
            raise CancelledCallError("the caller has cancelled this call; nothing of it is returned")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineError(
                "the deadline of this call passed before its answer was there. Allow it more time, send fewer texts at "
                "once, or add machines."
            )

    def add(self, usage: Usage) -> None:
        """Add the cost of a batch."""
        with self._lock:
            self._usage += usage

    def watch(self, watcher: Callable[[], None]) -> None:
        """Let `cancel` call this function, until `unwatch`; a call that is cancelled already calls it at once."""
        with self._lock:
            self._watchers.add(watcher)
            is_cancelled = self._is_cancelled
        if is_cancelled:
            watcher()

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """End `watch`."""
        with self._lock:
            self._watchers.discard(watcher)


_calls: ContextVar[tuple[Call, ...]] = ContextVar("gte_deploy_calls", default=())


def current_call() -> Call | None:
    """Return the call of the innermost `with call:` block that this thread is in."""
    calls = _calls.get()
    return calls[-1] if calls else None


@dataclass(frozen=True)
class JoinOptions:
    """How the calls of all threads share batches: see `load`.

    Args:
        max_queue_tokens: tokens that may wait; a call with which they would be more is refused with OverloadedError,
            unless nothing waits. None for no bound.

    Raises:
        InputError: the number is not positive.
    """

    max_queue_tokens: int | None = None

    def __post_init__(self) -> None:
        tokens = self.max_queue_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise InputError(f"max_queue_tokens is {tokens!r}; expected a positive integer, or None for no bound")

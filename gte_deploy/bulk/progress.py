"""The progress of a run: what is done, how fast, and the time that is left."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from gte_deploy.bulk.parts import Part
from gte_deploy.core.calls import Call

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing since Python 3.11

_SECONDS_BETWEEN_REPORTS = 0.5


@dataclass(frozen=True)
class BulkState:
    """The state of a run.

    Args:
        rows: rows that are done, failures and rows of an earlier, interrupted run included.
        failures: rows without vectors.
        tokens: tokens that this run has computed.
        share: share of the input that is done, from 0 to 1.
        seconds: duration of this run.
        rows_per_second: of this run.
        tokens_per_second: of this run.
        seconds_left: an estimate; None while there is nothing to base it on.
    """

    rows: int
    failures: int
    tokens: int
    share: float
    seconds: float
    rows_per_second: float
    tokens_per_second: float
    seconds_left: float | None

    def describe(self) -> str:
        """A line for people."""
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        failed = f" ({self.failures:,} failed)" if self.failures else ""
        return (
            f"{self.rows:,} rows{failed}, {self.share:.0%}, {self.rows_per_second:,.0f} rows/s, "
            f"{self.tokens_per_second:,.0f} tokens/s{left}"
        )


ReportState = Callable[[BulkState], object]


class BulkProgress:
    """Counts what is done, and reports it from a thread of its own. Methods may be called from any thread."""

    def __init__(self, before: Sequence[Part], report: ReportState | None) -> None:
        """Begin after the parts of an earlier run."""
        self._report = report
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._rows = self._first_rows = sum(part.count for part in before)
        self._failures = sum(part.failures for part in before)
        self._share = self._first_share = before[-1].done if before else 0.0
        self._tokens = 0
        self._running: list[Call] = []  # of shards that are not stored yet, in order
        self._shard = (1, self._share)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._report_often, name="gte-progress", daemon=True)

    def __enter__(self) -> "Self":
        if self._report is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._report is not None:
            self._thread.join()
            self._report(self.state())

    def begins(self, count: int, done: float) -> Call:
        """A shard of `count` rows begins, up to whose end the share `done` of the input is done.

        Returns:
            The call that the shard's cost is added to.
        """
        with self._lock:
            self._running.append(call := Call())
            self._shard = (max(1, count), done)
        return call

    def finished(self, part: Part, *, share: float | None = None) -> None:
        """A part is finished: the input is done up to its end, or its given share."""
        with self._lock:
            self._running = self._running[1:]
            self._rows += part.count
            self._failures += part.failures
            self._tokens += part.tokens
            self._share = part.done if share is None else share

    def state(self) -> BulkState:
        """The state now."""
        with self._lock:
            seconds = max(1e-9, time.monotonic() - self._started)
            costs = [call.usage for call in self._running]
            count, end = self._shard
            rows, tokens = sum(cost.rows for cost in costs), self._tokens + sum(cost.tokens for cost in costs)
            share = self._share
            if costs:  # the last of them is that of the shard
                share += (end - share) * min(1.0, rows / (rows - costs[-1].rows + count))
            rows += self._rows
            new = share - self._first_share
            return BulkState(
                rows=rows,
                failures=self._failures,
                tokens=tokens,
                share=share,
                seconds=seconds,
                rows_per_second=(rows - self._first_rows) / seconds,
                tokens_per_second=tokens / seconds,
                seconds_left=seconds * (1 - share) / new if new > 0 else None,
            )

    def _report_often(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_REPORTS):
            if self._report is not None:
                self._report(self.state())


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60
    if hours:
        return f"{hours:,} h {minutes % 60:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"

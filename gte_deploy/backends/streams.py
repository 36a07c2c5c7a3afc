"""Streams: several batches of a list are computed at once with few threads each, and a single batch on all threads.

Two engines of one model: one with all threads, and one for the streams, which opens when the first list needs it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import WARM_SHAPES, Backend, Batch
from gte_deploy.backends.stream_plan import StreamPlan
from gte_deploy.core.errors import BackendError
from gte_deploy.core.lanes import in_a_lane, in_lanes
from gte_deploy.core.spec import Precision


class StreamedBackend:
    """A `LanedBackend` over two engines. Answers are those of the engine with all threads.

    A batch of a list, and a batch that comes while another is computed, goes to the streams, unless it is too small for
    them. All others are computed on all threads, one at a time: two would hinder each other. Where a batch has to wait,
    the first to come is the first to go.
    """

    def __init__(self, whole: Backend, plan: StreamPlan, open_streams: Callable[[], Backend]) -> None:
        """Join the engine with all threads and a function that opens the one for the streams.

        `open_streams` is called once at most, in `run`; its engine takes `plan.streams` batches at once.
        """
        self.name = whole.name
        self.device = whole.device
        self.precision: Precision = whole.precision
        self.num_threads = whole.num_threads
        self.outputs = whole.outputs
        self.plan = plan
        self.lanes = plan.streams
        self._whole = whole
        self._open_streams = open_streams
        self._streams: Backend | None = None
        self._is_closed = False
        self._running = 0
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._turns_of_whole, self._turns_of_streams = _Turns(1), _Turns(plan.streams)

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        with self._lock:
            self._running += 1
            is_alone = self._running == 1 and not in_a_lane()
        try:
            if is_alone or self._is_too_small(batch):
                with self._turns_of_whole.one():
                    return self._whole.run(batch, outputs)
            streams = self._opened()
            with self._turns_of_streams.one():
                return streams.run(batch, outputs)
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        """See `Backend.close`."""
        with self._opening:
            self._is_closed = True
            streams, self._streams = self._streams, None
        self._whole.close()
        if streams is not None:
            streams.close()

    def shapes_to_warm_up(self) -> list[tuple[int, int]]:
        """See `LanedBackend.shapes_to_warm_up`."""
        return list(WARM_SHAPES)

    def warm_up(self, batches: Sequence[Batch], outputs: Sequence[str]) -> None:
        """See `LanedBackend.warm_up`."""
        for batch in batches:
            self._whole.run(batch, outputs)
            deque(in_lanes(lambda one: self.run(one, outputs), [batch] * self.lanes, self.lanes), maxlen=0)

    def _is_too_small(self, batch: Batch) -> bool:
        """Whether packing the weights for this batch would take longer than the streams save."""
        return not self.plan.packed and batch.input_ids.size < self.plan.least_tokens

    def _opened(self) -> Backend:
        with self._opening:
            if self._is_closed:
                raise BackendError("this model is closed; load it again")
            if self._streams is None:
                self._streams = self._open_streams()
            return self._streams


class _Turns:
    """Lets a number of threads in at once, in the order in which they came.

    With a semaphore, a thread that comes back at once would overtake those that wait, again and again.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A `with` block of a thread that is inside."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while it waits: the turn must not get lost
            with self._lock:
                still_waits = turn in self._waiting
                if still_waits:
                    self._waiting.remove(turn)
            if not still_waits:
                self._leave()
            raise

    def _leave(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

"""Works on several items at once, and gives the results in the order of the items."""

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


_here = threading.local()


def in_a_lane() -> bool:
    """Whether the calling thread works for `in_lanes` on one of several items."""
    return getattr(_here, "in_a_lane", False)


@contextlib.contextmanager
def as_lane(is_lane: bool) -> Iterator[None]:
    """A `with` block in which the calling thread counts as one of several, as for `in_lanes`, or as before."""
    before, _here.in_a_lane = in_a_lane(), is_lane or in_a_lane()
    try:
        yield
    finally:
        _here.in_a_lane = before


def in_lanes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    lanes: int,
    *,
    fewest: int = 2,
    alone: Callable[[Item], bool] = lambda item: False,
) -> Iterator[Result]:
    """Yield `work(item)` for each item, in the order of the items; up to `lanes` items are worked on at once.

    A single lane, and fewer than `fewest` items, need no thread: the caller's does the work. So it does for the first
    items as long as `alone` holds for them, one at a time. Otherwise each lane is a thread, and `items` is read up to
    `lanes` items ahead; context variables are those of the caller. The first error in the order of the items is raised;
    then, and if the caller stops early, items that are not begun are left out, and the threads end.
    """
    if lanes == 1:
        yield from map(work, items)
        return
    source = iter(items)
    first = list(islice(source, 1))
    while first and alone(first[0]):
        yield work(first[0])
        first = list(islice(source, 1))
    first += islice(source, fewest - 1)
    if len(first) < fewest:
        yield from map(work, first)
        return
    with ThreadPoolExecutor(lanes, thread_name_prefix="gte-lane", initializer=_enter_lane) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in chain(first, source):
                waiting.append(pool.submit(contextvars.copy_context().run, work, item))
                if len(waiting) > lanes:  # one more than is worked on, so that no lane waits for the caller
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _enter_lane() -> None:
    _here.in_a_lane = True

"""Decides which shapes of an engine run as CUDA graphs.

A graph pays only if its shape comes again often: capturing it costs a context and as much time as several runs. So a
shape is captured once it has come several times; a full cache replaces its rarest shape only by a much more frequent
one, and not often. Every other run is queued without a graph, on a context that exists already.

The measurements are in docs/decisions/cuda-graphs-by-frequency.md. This module computes only numbers and does not use
CUDA.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

_Graph = TypeVar("_Graph")


@dataclass(frozen=True)
class GraphLimits:
    """Limits of one cache.

    Args:
        max_graphs: the most graphs.
        max_bytes: memory of the GPU for graphs and their contexts; a cache that holds as much takes no more.
        least_sights: sights of a shape before it is captured.
        window: runs after which every count of sights is halved, so that old traffic is forgotten.
        pause: runs between two replacements of a graph. A replaced graph that was hardly used doubles the pause.
        longest_pause: bound for that pause, and for the pause after a failed capture of a shape.
        least_replays: replays that a graph must have had to count as used.
        max_failures: failed captures in a row after which nothing is captured any more.
    """

    max_graphs: int = 64
    max_bytes: int = 256 << 20
    least_sights: int = 3
    window: int = 2048
    pause: int = 64
    longest_pause: int = 1 << 16
    least_replays: int = 16
    max_failures: int = 8


@dataclass
class _Entry(Generic[_Graph]):
    graph: _Graph
    size: int
    replays: int = 0


class GraphCache(Generic[_Graph]):
    """The graphs of one execution slot by their shapes, with the counts that decide about the next one."""

    def __init__(self, limits: GraphLimits | None = None) -> None:
        self._limits = limits or GraphLimits()
        self._entries: dict[Hashable, _Entry[_Graph]] = {}
        # Halving bounds the sum of all counts, and so the number of shapes, by twice the window.
        self._sights: dict[Hashable, int] = {}
        self._failures: dict[Hashable, tuple[int, int]] = {}
        """Shape -> (failed captures, the run from which on it may be tried again)."""
        self._failures_in_a_row = 0
        self._runs = 0
        self._pause = self._limits.pause
        self._next_replacement = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes that the graphs and their contexts hold."""
        return sum(entry.size for entry in self._entries.values())

    @property
    def is_off(self) -> bool:
        """Whether so many captures failed in a row that no more are tried."""
        return self._failures_in_a_row >= self._limits.max_failures

    def find(self, shape: Hashable) -> _Graph | None:
        """Count a run of `shape`, and return its graph, if there is one."""
        self._runs += 1
        if self._runs % self._limits.window == 0:
            self._forget()
        self._sights[shape] = self._sights.get(shape, 0) + 1
        entry = self._entries.get(shape)
        if entry is None:
            return None
        entry.replays += 1
        return entry.graph

    def wants(self, shape: Hashable) -> bool:
        """Whether to capture `shape`, which `find` has just not found."""
        sights = self._sights.get(shape, 0)
        if self.is_off or sights < self._limits.least_sights:
            return False
        if self._runs < self._failures.get(shape, (0, 0))[1]:
            return False
        if not self._is_full():
            return True
        return self._runs >= self._next_replacement and sights > 2 * self._sights.get(self._rarest(), 0)

    def make_room(self) -> _Graph | None:
        """Take the rarest graph out, for the capture of another shape; None if there is room already."""
        if not self._is_full():
            return None
        entry = self._entries.pop(self._rarest())
        was_used = entry.replays >= self._limits.least_replays
        self._pause = self._limits.pause if was_used else min(2 * self._pause, self._limits.longest_pause)
        self._next_replacement = self._runs + self._pause
        return entry.graph

    def add(self, shape: Hashable, graph: _Graph, size: int) -> None:
        """Keep the graph of a shape; `size` is its memory on the GPU in bytes, with that of its context."""
        self._entries[shape] = _Entry(graph, size)
        self._failures.pop(shape, None)
        self._failures_in_a_row = 0

    def fail(self, shape: Hashable) -> int:
        """Note that the capture of a shape failed; return the number of runs until it may be tried again."""
        self._failures_in_a_row += 1
        count = self._failures.get(shape, (0, 0))[0] + 1
        pause = min(self._limits.pause << min(count, 32), self._limits.longest_pause)
        self._failures[shape] = count, self._runs + pause
        return pause

    def clear(self) -> list[_Graph]:
        """Take out all graphs, but keep the counts of sights."""
        graphs = [entry.graph for entry in self._entries.values()]
        self._entries.clear()
        return graphs

    def _is_full(self) -> bool:
        return bool(self._entries) and (
            len(self._entries) >= self._limits.max_graphs or self.size >= self._limits.max_bytes
        )

    def _rarest(self) -> Hashable:
        return min(self._entries, key=lambda shape: self._sights.get(shape, 0))

    def _forget(self) -> None:
        self._sights = {shape: count // 2 for shape, count in self._sights.items() if count > 1}
        self._failures = {
            shape: failure
            for shape, failure in self._failures.items()
            if shape in self._sights or failure[1] > self._runs
        }

"""An order of samples that stays among a few shards at a time, for a corpus that lies elsewhere.

In each epoch the shards come in a new order. Neighbours form windows of `width` shards, and the samples of a window are
shuffled among themselves. So a step needs the shards of one window, or of two at its end, and the window after it is
known. Like the order of a whole corpus, this one is a pure function of the seed and of the index of a sample.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.random import STREAM_ORDER, STREAM_SHARDS, permute, stream_key


class WindowOrder:
    """Shuffles the chunks of some shards, which lie one after the other, in windows.

    Args:
        chunks_per_shard: `[S]`, the chunks of each shard.
        width: shards of a window, at most.

    Raises:
        InputError: the width is below 1, or there is no chunk.
    """

    def __init__(self, chunks_per_shard: ArrayLike, *, width: int) -> None:
        sizes = np.asarray(chunks_per_shard, dtype=np.int64)
        if width < 1:
            raise InputError(f"shuffle_shards {width} is below 1")
        if not sizes.any():
            raise InputError("there is no chunk to sample from")
        self._first_chunk = np.concatenate([[0], np.cumsum(sizes)])
        self._shards = np.flatnonzero(sizes)  # those that have chunks
        self.num_chunks = int(sizes.sum())
        self.num_windows = -(-len(self._shards) // width)
        # Of nearly equal size, because a small last window would be shuffled little.
        self._bounds = np.arange(self.num_windows + 1) * len(self._shards) // self.num_windows
        self._epoch = lru_cache(maxsize=4)(self._ordered)

    def samples_at(self, indices: ArrayLike, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and the chunks of the samples at `indices`, [N] each. Every epoch visits every chunk once.

        Raises:
            InputError: an index is negative.
        """
        places = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        windows, within = self._windows(places, seed)
        chunks, key = np.empty_like(places), stream_key(seed, STREAM_ORDER)
        for window in np.unique(windows).tolist():
            here = windows == window
            order, ends = self._epoch(window // self.num_windows, seed)
            start, stop = self._bounds[window % self.num_windows :][:2]
            shards, first = order[start:stop], ends[start]
            size = int(ends[stop] - first)
            # The number of the window is in the place of the epoch: each window of each epoch is shuffled anew.
            drawn = first + permute(within[here], size=size, epochs=window, key=key)
            place = np.searchsorted(ends, drawn, side="right") - 1
            chunks[here] = drawn - ends[place] + self._first_chunk[shards[place - start]]
        return places // self.num_chunks, chunks

    def windows_at(self, indices: ArrayLike, *, seed: int) -> list[int]:
        """Return the windows of the samples at `indices`, ascending, numbered from the first epoch on."""
        places = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        return [int(window) for window in np.unique(self._windows(places, seed)[0])]

    def shards_of(self, window: int, *, seed: int) -> list[int]:
        """Return the shards of a window that `windows_at` numbers."""
        order, _ = self._epoch(window // self.num_windows, seed)
        start, stop = self._bounds[window % self.num_windows :][:2]
        return [int(shard) for shard in order[start:stop]]

    def shards_between(self, first: int, last: int, *, seed: int) -> tuple[list[int], list[int]]:
        """Return the shards of the samples first..last, and those of the window after them."""
        start, stop = self.windows_at(first, seed=seed)[0], self.windows_at(last, seed=seed)[-1]
        now: dict[int, None] = {}
        for window in range(start, min(stop, start + 2 * self.num_windows) + 1):  # all shards are in so many windows
            now.update(dict.fromkeys(self.shards_of(window, seed=seed)))
        return list(now), self.shards_of(stop + 1, seed=seed)

    def most_bytes(self, bytes_of_shards: ArrayLike, *, samples: int) -> int:
        """Return the bytes of the shards that so many neighbouring samples, and the window after them, can need."""
        sizes = np.sort(np.asarray(bytes_of_shards, dtype=np.int64)[self._shards])[::-1]
        width = int(np.diff(self._bounds).max())
        smallest = int(np.sort(np.diff(self._first_chunk)[self._shards])[: int(np.diff(self._bounds).min())].sum())
        windows = -(-samples // smallest) + 2  # the samples may begin anywhere in a window, and one more is fetched
        return int(sizes[: windows * width].sum())

    def _windows(self, places: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the window of each index, and its place among the window's chunks, before they are shuffled."""
        if places.size and places.min() < 0:
            raise InputError(f"sample index {places.min()} is negative")
        epochs, rest = np.divmod(places, self.num_chunks)
        windows, within = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            starts = self._epoch(epoch, seed)[1][self._bounds]
            number = np.searchsorted(starts, rest[here], side="right") - 1
            windows[here], within[here] = epoch * self.num_windows + number, rest[here] - starts[number]
        return windows, within

    def _ordered(self, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the order of an epoch, `[S]`, and the chunks before each of them and all, `[S + 1]`."""
        count = len(self._shards)
        key = stream_key(seed, STREAM_SHARDS)
        order = self._shards[permute(np.arange(count), size=count, epochs=epoch, key=key)]
        return order, np.concatenate([[0], np.cumsum(np.diff(self._first_chunk)[order])])

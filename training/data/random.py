"""Random numbers and permutations without a state: each is a pure function of a key and a counter.

A resumed run and a run on another number of ranks compute the same numbers, so no checkpoint saves a generator.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gte_deploy.core.errors import InputError

_FEISTEL_ROUNDS = 8

_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

# One seed feeds several independent streams. The number of a stream is part of its key: changing it changes every run.
STREAM_RESAMPLE, STREAM_ORDER, STREAM_LANGUAGE, STREAM_MASK, STREAM_SHARDS = 1, 2, 3, 4, 5
FIRST_LANGUAGE_STREAM = 1 << 16

Words = NDArray[np.uint64]


def philox4x32(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> tuple[Words, ...]:
    """Compute Philox4x32-10: for each counter of four 32-bit words, four random 32-bit words (stored as uint64).

    The four parts of the counter broadcast against each other. Source: Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", SC 2011. numpy's own Philox makes one stream per object. Here each token of a batch has its own
    counter, so that one vectorised call serves a whole batch.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0 = (p1 >> _SHIFT_32) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> _SHIFT_32) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW_32, p0 & _LOW_32
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & 0xFFFFFFFF, (k1 + _PHILOX_WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def stream_key(seed: int, stream: int) -> tuple[int, int]:
    """Return the Philox key of one stream of a seed.

    Raises:
        InputError: the seed is not in 0..2^64 - 1.
    """
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is outside 0..2^64 - 1")
    word0, word1, _, _ = philox4x32((stream, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return int(word0), int(word1)


def split_words(numbers: ArrayLike) -> tuple[Words, Words]:
    """Split non-negative integers into their low and high 32 bits."""
    wide = np.asarray(numbers).astype(np.uint64)
    return wide & _LOW_32, wide >> _SHIFT_32


def join_words(low: Words, high: Words) -> Words:
    """Join low and high 32 bits into 64-bit integers."""
    return low | (high << _SHIFT_32)


def permute(positions: ArrayLike, *, size: int, epochs: ArrayLike, key: tuple[int, int]) -> NDArray[np.int64]:
    """Send each position through a permutation of 0..size-1. The key and the epoch choose the permutation.

    A Feistel network permutes a grid of cells that is slightly larger than `size`. A position that lands on a surplus
    cell is sent through the network again until it lands below `size` (cycle walking: Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). The cost per position is constant, and there is no table.
    """
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    grid = (np.uint64(rows), np.uint64(-(-size // rows)))
    places = np.atleast_1d(np.asarray(positions)).astype(np.uint64)
    epoch_words = np.broadcast_to(np.asarray(epochs, dtype=np.uint64), places.shape)
    result = _feistel(places, epoch_words, grid, key)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], epoch_words[outside], grid, key)
    return result.astype(np.int64)


def _feistel(places: Words, epochs: Words, grid: tuple[np.uint64, np.uint64], key: tuple[int, int]) -> Words:
    left, right = places % grid[0], places // grid[0]
    for number in range(0, _FEISTEL_ROUNDS, 2):
        left = (left + _round_function(right, number, epochs, key) % grid[0]) % grid[0]
        right = (right + _round_function(left, number + 1, epochs, key) % grid[1]) % grid[1]
    return right * grid[0] + left


def _round_function(half: Words, number: int, epochs: Words, key: tuple[int, int]) -> Words:
    low, high, _, _ = philox4x32((half, number, *split_words(epochs)), key)
    return join_words(low, high)

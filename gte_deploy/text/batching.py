"""Tokenises inputs and groups their rows into rectangular batches with little padding.

Inputs and rows are sorted by length, so that the rows of a batch differ little. Indices put the results back into the
caller's order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch

# Padding that a batch may hold, as a share of the token budget. It is the cost of one more call: 25 tokens with the
# budget of a CPU, where a call was measured to cost as much as 18 (INT8) to 30 (tiny) tokens.
_PADDING_SHARE = 1 / 40
# Inputs tokenised at once, while the model runs on the inputs before them.
WINDOW = 512


class TypedRow(list[int]):
    """Token ids of one input in which not every token has type 0."""

    __slots__ = ("type_runs",)

    type_runs: Sequence[tuple[int, int]]
    """(type, number of consecutive tokens with it), from the first token to the last."""

    def __init__(self, ids: Iterable[int], type_runs: Sequence[tuple[int, int]]) -> None:
        super().__init__(ids)
        self.type_runs = type_runs


class ExpandedRow(TypedRow):
    """Token ids of one input, of which only the first `attended` have the attention mask 1."""

    __slots__ = ("attended",)

    attended: int

    def __init__(self, ids: Iterable[int], type_runs: Sequence[tuple[int, int]], attended: int) -> None:
        super().__init__(ids, type_runs)
        self.attended = attended


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on one batch; a batch of one row is always allowed.

    Args:
        max_rows: the most rows.
        max_tokens: the most tokens, padding included: rows times the longest row.
        max_square: the most rows times the square of the longest row: the cost of attention.
        streams: number of batches that are computed at once. Each gets a like share of the tokens.
        least_tokens: no share is smaller, so that few texts stay one batch.
        fewest_batches: with fewer batches than that, the streams would be slower than one batch after the other.
    """

    max_rows: int
    max_tokens: int
    max_square: int
    streams: int = 1
    least_tokens: int = 1
    fewest_batches: int = 2

    def share(self, lengths: Sequence[int]) -> int:
        """Return the most tokens of a batch, so that rows of these lengths keep all streams busy until the end."""
        total = sum(lengths)
        least = max(self.least_tokens, max(lengths, default=0))
        if self.streams == 1 or total < least * self.fewest_batches:
            return self.max_tokens
        batches = self.streams * math.ceil(total / (self.streams * self.max_tokens))
        # Half a row more, as batches end with whole rows; else the rest would be one more batch.
        share = math.ceil(total / batches + total / len(lengths) / 2)
        return min(self.max_tokens, max(self.least_tokens, share))

    def allow(self, rows: int, longest: int, real: int, most: int) -> bool:
        """Whether a batch of so many rows, of which the longest has so many tokens, is within the bounds.

        Args:
            rows: the number of rows.
            longest: tokens of the longest row.
            real: tokens of all rows, without padding.
            most: the most tokens, padding included.
        """
        padded = rows * longest
        return (
            rows <= self.max_rows
            and padded <= most
            and padded * longest <= self.max_square
            and padded - real <= self.max_tokens * _PADDING_SHARE
        )


def token_batches(
    sizes: Mapping[int, float], tokenize: Callable[[list[int]], list[list[int]]], limits: BatchLimits
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Numbers and token ids of the rows of each batch, for inputs of roughly these `sizes`; every number occurs once.

    `sizes` has the size of each input by its number, and `tokenize` returns the token ids of the inputs with given
    numbers. The largest inputs come first, so that an input that is too long is refused before other work is done. A
    thread tokenises the inputs of later batches while the caller runs the earlier ones, so that the model does not
    wait.
    """
    order = sorted(sizes, key=sizes.__getitem__, reverse=True)
    windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
    rows = tokenize(windows[0])
    pool = ThreadPoolExecutor(1, thread_name_prefix="gte-tokenize") if len(windows) > 1 else None
    with pool or nullcontext():
        for window, following in zip_longest(windows, windows[1:]):
            ahead = pool.submit(tokenize, following) if pool and following else None
            for group in plan_batches([len(row) for row in rows], limits):
                yield [window[i] for i in group], [rows[i] for i in group]
            rows = ahead.result() if ahead else []


def plan_batches(lengths: Sequence[int], limits: BatchLimits) -> Iterator[list[int]]:
    """Indices of the rows of each batch, longest rows first; every index occurs once."""
    most = limits.share(lengths)
    group: list[int] = []
    longest = real = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if group and not limits.allow(len(group) + 1, longest, real + length, most):
            yield group
            group, longest, real = [], 0, 0
        longest = longest or length
        group.append(index)
        real += length
    if group:
        yield group


def collate(
    rows: Sequence[Sequence[int]], *, pad_token_id: int, mask_token_id: int | None = None, token_types: bool = False
) -> Batch:
    """Pad rows on the right into one batch.

    Args:
        rows: token ids; a `TypedRow` has types other than 0, and an `ExpandedRow` has tokens without attention.
        pad_token_id: the id that fills short rows; its type is 0.
        mask_token_id: the id whose positions the batch lists, row by row; None for no list.
        token_types: whether the batch gets token types, for a model that takes them.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padding = [pad_token_id] * (longest - min(lengths))
    input_ids = np.array([[*row, *padding[: longest - len(row)]] for row in rows], dtype=np.int64)
    attended = [row.attended if isinstance(row, ExpandedRow) else len(row) for row in rows]
    if min(attended) < longest:
        attention_mask = (np.arange(longest) < np.array(attended)[:, None]).astype(np.int64)
    else:
        attention_mask = np.ones_like(input_ids)
    positions = None
    if mask_token_id is not None:
        positions = np.argwhere((input_ids == mask_token_id) & (attention_mask == 1)).astype(np.int64, copy=False)
    return Batch(input_ids, attention_mask, positions, _types(rows, attention_mask) if token_types else None)


def _types(rows: Sequence[Sequence[int]], attention_mask: NDArray[np.int64]) -> NDArray[np.int64]:
    types = np.zeros_like(attention_mask)
    for index, row in enumerate(rows):
        if isinstance(row, TypedRow):
            kinds, counts = zip(*row.type_runs, strict=True)
            types[index, : len(row)] = np.repeat(kinds, counts)
    return types

"""Rows of token ids into rectangular batches that waste little on padding.

Rows are sorted by length, so that neighbours differ little; results are put back in the caller's order by index.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gte_deploy.backends.base import Batch

# Padding that a batch may hold: this share of its tokens, or of the budget where the batch is small. Below the second
# a call's fixed cost is larger than the padding's.
_PADDING_SHARE = 1 / 8
_PADDING_SHARE_OF_BUDGET = 1 / 32


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on one batch; a single row is always admitted.

    Args:
        max_rows: rows.
        max_tokens: rows times the longest row, padding included.
        max_square: rows times the square of the longest row, which is what attention costs.
    """

    max_rows: int
    max_tokens: int
    max_square: int


def plan_batches(lengths: Sequence[int], limits: BatchLimits) -> Iterator[list[int]]:
    """Indices of the rows of each batch, longest rows first; every index comes once."""
    group: list[int] = []
    longest = real = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if group and not _fits(len(group) + 1, longest, real + length, limits):
            yield group
            group, longest, real = [], 0, 0
        longest = longest or length
        group.append(index)
        real += length
    if group:
        yield group


def collate(rows: Sequence[Sequence[int]], *, pad_token_id: int, mask_token_id: int | None = None) -> Batch:
    """Pad rows on the right into one batch; with `mask_token_id`, list the places that hold it, row by row."""
    lengths = np.array([len(row) for row in rows])
    attention_mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    input_ids = np.full(attention_mask.shape, pad_token_id, dtype=np.int64)
    input_ids[attention_mask == 1] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    positions = None
    if mask_token_id is not None:
        positions = np.argwhere((input_ids == mask_token_id) & (attention_mask == 1)).astype(np.int64)
    return Batch(input_ids, attention_mask, positions)


def _fits(rows: int, longest: int, real: int, limits: BatchLimits) -> bool:
    padded = rows * longest
    padding = max(padded * _PADDING_SHARE, limits.max_tokens * _PADDING_SHARE_OF_BUDGET)
    return (
        rows <= limits.max_rows
        and padded <= limits.max_tokens
        and padded * longest <= limits.max_square
        and padded - real <= padding
    )

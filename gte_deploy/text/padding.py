"""Shapes of batches for a server: length buckets, and mask positions by row.

A server joins only requests of equal shapes, so rows are padded to one of a few lengths. The tokenizer on the server
and a client that tokenises use the same rules.

Shapes: B rows, S tokens, M masks of the row with the most, as a power of two.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """Return the smallest of the rising `buckets` that holds `length` tokens; `length` if none does."""
    index = bisect_left(buckets, length)
    return buckets[index] if index < len(buckets) else length


def mask_width(most: int) -> int:
    """Return M for rows with at most `most` masks: a power of two, so that 3 and 4 masks have equal shapes."""
    return 1 << max(0, most - 1).bit_length()


def masks_by_row(
    input_ids: NDArray[np.integer], attention_mask: NDArray[np.integer], mask_token_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the mask positions of each row [B, M], filled up with 0 (the first token), and their number [B]."""
    masks = (input_ids == mask_token_id) & (attention_mask == 1)
    counts = masks.sum(axis=1)
    most = int(counts.max())
    positions = np.zeros((len(masks), mask_width(most)), dtype=np.int64)
    positions[np.arange(positions.shape[1]) < counts[:, None]] = np.nonzero(masks)[1]
    return positions, counts

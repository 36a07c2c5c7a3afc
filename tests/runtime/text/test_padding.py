import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gte_deploy.text.padding import bucket_of, mask_width, masks_by_row

MASK = 4


@pytest.mark.parametrize(("length", "bucket"), [(1, 16), (16, 16), (17, 24), (24, 24), (25, 25), (900, 900)])
def test_buckets(length, bucket):
    assert bucket_of(length, (16, 24)) == bucket


@pytest.mark.parametrize(("most", "width"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_widths(most, width):
    assert mask_width(most) == width


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=9), min_size=1, max_size=5))
def test_masks_by_row(rows):
    length = max(map(len, rows))
    ids = np.array([row + [MASK] * (length - len(row)) for row in rows])  # what is behind a row does not count
    attention = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    positions, counts = masks_by_row(ids, attention, MASK)
    assert positions.shape == (len(rows), mask_width(int(counts.max())))
    for row, own, count in zip(rows, positions.tolist(), counts.tolist(), strict=True):
        expected = [place for place, token in enumerate(row) if token == MASK]
        assert (own[:count], own[count:]) == (expected, [0] * (len(own) - count))

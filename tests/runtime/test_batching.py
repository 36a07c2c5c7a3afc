import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gte_deploy.batching import BatchLimits, collate, plan_batches

limits_strategy = st.builds(
    BatchLimits, max_rows=st.integers(1, 40), max_tokens=st.integers(1, 4000), max_square=st.integers(1, 400_000)
)


@given(lengths=st.lists(st.integers(1, 600), max_size=200), limits=limits_strategy)
def test_every_row_once_within_the_limits(lengths, limits):
    plan = list(plan_batches(lengths, limits))
    assert sorted(index for group in plan for index in group) == list(range(len(lengths)))
    for group in plan:
        longest = max(lengths[i] for i in group)
        assert len(group) <= limits.max_rows
        if len(group) > 1:  # a single row is always admitted
            assert len(group) * longest <= limits.max_tokens
            assert len(group) * longest**2 <= limits.max_square


def test_longest_first_and_equal_lengths_in_order():
    plan = list(plan_batches([3, 9, 3, 9], BatchLimits(2, 100, 10**9)))
    assert plan == [[1, 3], [0, 2]]


def test_mixed_lengths_do_not_pay_for_padding():
    lengths = np.random.default_rng(0).integers(16, 513, 320).tolist()
    plan = list(plan_batches(lengths, BatchLimits(32, 2048, 8192**2)))
    padded = sum(len(group) * max(lengths[i] for i in group) for group in plan)
    assert padded < 1.1 * sum(lengths)
    assert len(plan) < len(lengths) / 2  # and rows still share batches


def test_a_long_row_does_not_pad_short_ones():
    assert list(plan_batches([500, 8, 8, 8], BatchLimits(32, 2048, 8192**2))) == [[0], [1, 2, 3]]


def test_equal_rows_fill_a_batch():
    assert [len(group) for group in plan_batches([64] * 70, BatchLimits(32, 2048, 8192**2))] == [32, 32, 6]


def test_no_row_no_batch():
    assert list(plan_batches([], BatchLimits(1, 1, 1))) == []


def test_collate_pads_on_the_right():
    batch = collate([[2, 9, 3], [2, 3]], pad_token_id=7)
    assert batch.input_ids.tolist() == [[2, 9, 3], [2, 3, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64
    assert batch.mask_positions is None


@pytest.mark.parametrize("pad_token_id", [0, 4])
def test_collate_lists_masks_row_by_row_and_none_in_padding(pad_token_id):
    batch = collate([[4, 9, 4], [2, 4]], pad_token_id=pad_token_id, mask_token_id=4)
    assert batch.mask_positions.tolist() == [[0, 0], [0, 2], [1, 1]]
    assert batch.mask_positions.dtype == np.int64

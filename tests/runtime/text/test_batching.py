import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gte_deploy.text.batching import BatchLimits, collate, plan_batches, token_batches

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
            assert len(group) * longest - sum(lengths[i] for i in group) <= limits.max_tokens / 40


def test_longest_first_and_equal_lengths_in_order():
    plan = list(plan_batches([3, 9, 3, 9], BatchLimits(2, 100, 10**9)))
    assert plan == [[1, 3], [0, 2]]


def test_mixed_lengths_do_not_pay_for_padding():
    lengths = np.random.default_rng(0).integers(16, 513, 320).tolist()
    plan = list(plan_batches(lengths, BatchLimits(32, 1024, 8192**2)))
    padded = sum(len(group) * max(lengths[i] for i in group) for group in plan)
    assert padded < 1.02 * sum(lengths)
    assert len(plan) < len(lengths) / 2  # and rows still share batches


def test_a_long_row_does_not_pad_short_ones():
    assert list(plan_batches([500, 8, 8, 8], BatchLimits(32, 2048, 8192**2))) == [[0], [1, 2, 3]]


def test_equal_rows_fill_a_batch():
    assert [len(group) for group in plan_batches([64] * 70, BatchLimits(32, 2048, 8192**2))] == [32, 32, 6]


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([50] * 60, [750, 750, 750, 750]),  # with batches of 1,000 the second stream would be idle at the end
        ([16] * 8, [128]),  # too few for two
        ([16] * 16, [128, 128]),
        ([16] * 17, [144, 128]),
        ([300] + [10] * 20, [300, 200]),  # the long row alone takes longer than all on all threads
        ([500], [500]),
        ([], []),
    ],
)
def test_every_stream_gets_a_like_share(lengths, sizes):
    limits = BatchLimits(32, 1024, 8192**2, streams=2, least_tokens=128)
    assert [len(group) * lengths[group[0]] for group in plan_batches(lengths, limits)] == sizes


def test_lists_that_would_keep_most_streams_idle_are_not_cut_finer():
    limits = BatchLimits(32, 1024, 8192**2, streams=32, least_tokens=128, fewest_batches=12)
    assert len(list(plan_batches([48] * 31, limits))) == 2
    assert len(list(plan_batches([48] * 32, limits))) == 16
    assert len(list(plan_batches([1500] + [48] * 300, limits))) == 16


def test_shares_hold_every_row_once_and_keep_the_limits():
    lengths = np.random.default_rng(0).integers(1, 300, 700).tolist()
    for streams in (2, 3, 8, 32):
        limits = BatchLimits(32, 1024, 8192**2, streams=streams, least_tokens=128)
        plan = list(plan_batches(lengths, limits))
        assert sorted(index for group in plan for index in group) == list(range(700))
        padded = [len(group) * max(lengths[i] for i in group) for group in plan]
        assert max(padded) <= 1024 and sum(padded) < 1.06 * sum(lengths)


def test_no_row_no_batch():
    assert list(plan_batches([], BatchLimits(1, 1, 1))) == []


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr("gte_deploy.text.batching.WINDOW", 8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_token_batches_hold_every_input_once_largest_first(small_windows, lengths):
    asked = []

    def tokenize(indices):
        asked.append(indices)
        return [[index] * lengths[index] for index in indices]

    batches = list(token_batches(dict(enumerate(lengths)), tokenize, BatchLimits(4, 200, 10**9)))
    assert sorted(i for indices, _ in batches for i in indices) == list(range(len(lengths)))
    for indices, rows in batches:
        assert rows == [[index] * lengths[index] for index in indices]
    asked_lengths = [lengths[i] for indices in asked for i in indices]
    assert asked_lengths == sorted(lengths, reverse=True) and max(map(len, asked)) <= 8


def test_the_next_inputs_are_tokenised_while_the_caller_works(small_windows):
    tokenised = [threading.Event() for _ in range(3)]
    threads = []

    def tokenize(indices):
        tokenised[indices[0] // 8].set()
        threads.append(threading.current_thread())
        return [[1]] * len(indices)

    batches = token_batches(dict.fromkeys(range(24), 1), tokenize, BatchLimits(8, 100, 10**9))
    next(batches)  # and no more is asked for: what follows happens beside the caller
    assert tokenised[1].wait(timeout=30)
    assert not tokenised[2].is_set()  # one window ahead, not the whole list
    assert len(list(batches)) == 2
    assert threads[0] is threading.current_thread() and threads[0] not in threads[1:]
    assert not any(thread.is_alive() for thread in threads[1:])


@pytest.mark.parametrize(("refused", "before"), [(20, 0), (0, 2)])
def test_what_tokenising_refuses_reaches_the_caller(small_windows, refused, before):
    """The largest input (20) before there is any batch, a small one (0) at its turn; and no thread is left."""

    def tokenize(indices):
        if refused in indices:
            raise ValueError(refused)
        return [[1]] * len(indices)

    running = threading.active_count()
    done = []
    with pytest.raises(ValueError, match=str(refused)):
        for indices, _ in token_batches({i: i for i in range(21)}, tokenize, BatchLimits(8, 100, 10**9)):
            done.append(indices)
    assert len(done) == before
    assert threading.active_count() == running


def test_a_caller_that_stops_leaves_no_thread(small_windows):
    running = threading.active_count()
    batches = token_batches(
        dict.fromkeys(range(24), 1), lambda indices: [[1]] * len(indices), BatchLimits(8, 100, 10**9)
    )
    next(batches)
    batches.close()
    assert threading.active_count() == running


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

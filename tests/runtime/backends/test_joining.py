"""Joined calls: what shares a batch, that answers and errors stay those of each caller, and that nothing is left."""

from __future__ import annotations

import gc
import heapq
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gte_deploy import (
    BackendError,
    Call,
    CancelledCallError,
    DeadlineError,
    InputError,
    JoinOptions,
    OverloadedError,
)
from gte_deploy.backends.base import Batch
from gte_deploy.backends.joining import JoiningBackend, _Row
from gte_deploy.backends.stream_plan import StreamPlan
from gte_deploy.backends.streams import StreamedBackend
from gte_deploy.core.lanes import in_a_lane
from gte_deploy.core.spec import ModelSpec, MultiVectorSpec, QueryExpansion
from gte_deploy.text.batching import BatchLimits, ExpandedRow, TypedRow, collate, plan_batches
from waiting import WAIT_S, wait_until

SPEC = ModelSpec(
    "fill-mask", max_length=64, vocab_size=1000, hidden_size=2, pad_token_id=9, token_types=True, type_vocab_size=4
)
OUTPUTS = ("last_hidden_state", "logits", "sentence_embedding")


class Engine:
    """Computes sums that tell a row from every other. `gate` holds every batch, until it is set."""

    name, device, num_threads, precision, outputs = "onnx", "cpu", 1, "fp32", OUTPUTS

    def __init__(self, *, lanes=1, gate=None, plan=None):
        self.lanes, self.gate, self.plan = lanes, gate, plan
        self.batches, self.inside, self.most, self.is_closed = [], 0, 0, False
        self.fails = self.spreads_nan = lambda ids: False
        self.lock = threading.Lock()

    def run(self, batch, outputs):
        with self.lock:
            self.batches.append(batch)
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            if self.is_closed:
                raise BackendError("this model is closed; load it again")
            if self.gate is not None:
                assert self.gate.wait(WAIT_S)
            if self.fails(batch.input_ids):
                raise BackendError("the engine broke")
            found = values_of(batch, outputs)
            if self.spreads_nan(batch.input_ids):
                found = {name: np.full_like(values, np.nan) for name, values in found.items()}
            return found
        finally:
            with self.lock:
                self.inside -= 1

    def close(self):
        self.is_closed = True

    @property
    def sizes(self):
        return [batch.input_ids.shape for batch in self.batches]


def values_of(batch, outputs):
    """The answers by hand: values of a token depend on its row, and not on padding or on other rows."""
    ids = np.where(batch.attention_mask == 1, batch.input_ids, 0)
    types = 0 if batch.token_type_ids is None else batch.token_type_ids
    tokens = (ids * np.arange(1, ids.shape[1] + 1) + 7 * types * batch.attention_mask).astype(np.float32)
    sums = tokens.sum(axis=1)
    found = {
        "last_hidden_state": np.stack([tokens, np.broadcast_to(sums[:, None], tokens.shape)], axis=2),
        "sentence_embedding": np.stack([sums, ids.max(axis=1)], axis=1).astype(np.float32),
    }
    if batch.mask_positions is not None:
        rows, columns = batch.mask_positions.T
        found["logits"] = np.stack([tokens[rows, columns], sums[rows], columns], axis=1).astype(np.float32)
    return {name: found[name] for name in outputs}


def joining(engine, *, spec=SPEC, max_rows=64, max_tokens=4000, max_square=10**6, max_queue_tokens=None):
    limits = BatchLimits(max_rows, max_tokens, max_square)
    return JoiningBackend(engine, spec, limits, JoinOptions(max_queue_tokens))


def batch_of(*lengths, first=10):
    return collate(
        [list(range(first + index, first + index + length)) for index, length in enumerate(lengths)], pad_token_id=9
    )


def embed(backend, *lengths, first=10):
    return backend.run(batch_of(*lengths, first=first), ["sentence_embedding"])["sentence_embedding"]


def expected(*lengths, first=10):
    return values_of(batch_of(*lengths, first=first), ["sentence_embedding"])["sentence_embedding"]


def is_empty(backend):
    return (backend.queued_rows, backend.queued_tokens, backend.running, len(backend._shelves)) == (0, 0, 0, 0)


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def callers():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def occupy(backend, engine, callers, gate):
    """Keep the engine busy with a row of 60 tokens, until the gate opens."""
    before = len(engine.batches)
    first = callers.submit(embed, backend, 60)
    wait_until(lambda: len(engine.batches) == before + 1)
    return first


def queue(backend, callers, *all_lengths, **options):
    """Submit calls one after the other, and wait until each is in the queue."""
    futures = []
    for number, lengths in enumerate(all_lengths):
        rows = backend.queued_rows + len(lengths)
        futures.append(callers.submit(embed, backend, *lengths, first=10 + 20 * number, **options))
        wait_until(lambda: backend.queued_rows == rows)  # noqa: B023 - at once
    return futures


def test_a_free_engine_computes_at_once_in_the_callers_thread_and_gets_the_callers_own_batch():
    engine = Engine()
    backend, threads = joining(engine), []
    engine.fails = lambda ids: threads.append(threading.get_ident())
    batch = batch_of(5, 3)
    assert backend.run(batch, ["sentence_embedding"])["sentence_embedding"].tolist() == expected(5, 3).tolist()
    assert engine.batches[0] is batch and threads == [threading.get_ident()]
    assert is_empty(backend)


def test_what_comes_while_the_engine_is_busy_becomes_one_batch(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    others = queue(backend, callers, (5,), (7, 6), (5, 5, 5), (8,))
    assert (backend.queued_rows, backend.queued_tokens, backend.running) == (7, 41, 1)
    gate.set()
    np.testing.assert_array_equal(first.result(WAIT_S), expected(60))
    for number, (future, lengths) in enumerate(zip(others, [(5,), (7, 6), (5, 5, 5), (8,)], strict=True)):
        np.testing.assert_array_equal(future.result(WAIT_S), expected(*lengths, first=10 + 20 * number))
    assert engine.sizes == [(1, 60), (7, 8)] and engine.most == 1
    wait_until(lambda: is_empty(backend))


def test_as_many_batches_at_once_as_the_engine_has_lanes(gate, callers):
    engine = Engine(lanes=3, gate=gate)
    backend = joining(engine)
    assert backend.lanes == 4
    futures = [callers.submit(embed, backend, 10 + number) for number in range(12)]
    wait_until(lambda: engine.inside == 3 and backend.queued_rows == 9)
    gate.set()
    for number, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(WAIT_S), expected(10 + number))
    assert engine.most == 3 and len(engine.batches) < 12


def test_the_oldest_row_is_in_the_next_batch_with_rows_of_like_length(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine, max_tokens=100)  # and so 2 tokens of padding
    first = occupy(backend, engine, callers, gate)
    lengths = [(50,), (10,), (50,), (9,), (12,), (49,), (30,)]
    others = queue(backend, callers, *lengths)
    gate.set()
    for number, future in enumerate([first, *others]):
        expected_here = expected(60) if number == 0 else expected(*lengths[number - 1], first=10 + 20 * (number - 1))
        np.testing.assert_array_equal(future.result(WAIT_S), expected_here)
    # 50 is the oldest, and joins the other 50; then 10 with 9; then 12 (no other is near), 49, 30.
    assert engine.sizes == [(1, 60), (2, 50), (2, 10), (1, 12), (1, 49), (1, 30)]


def test_batches_keep_to_every_limit(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine, max_rows=4, max_tokens=40, max_square=300)
    first = occupy(backend, engine, callers, gate)
    others = queue(backend, callers, *[(8,)] * 6, (10, 10, 10, 10), (15, 15))
    gate.set()
    for future in (first, *others):
        future.result(WAIT_S)
    assert engine.sizes == [(1, 60), (4, 8), (2, 8), (3, 10), (1, 10), (1, 15), (1, 15)]


def test_a_batch_of_one_caller_that_is_too_large_is_split():
    engine = Engine()
    backend = joining(engine, max_rows=3)
    np.testing.assert_array_equal(embed(backend, *[5] * 8), expected(*[5] * 8))
    assert engine.sizes == [(3, 5), (3, 5), (2, 5)]


def test_masks_of_a_batch_are_bounded(gate, callers, monkeypatch):
    monkeypatch.setattr("gte_deploy.backends.joining.MAX_LOGITS", 3000)  # of 1,000 words: 3 masks
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    positions = np.array([[0, 1], [0, 2]])
    batches = [Batch(*(np.ones((1, 4), np.int64),) * 2, positions) for _ in range(3)]
    futures = []
    for number, batch in enumerate(batches):
        futures.append(callers.submit(backend.run, batch, ["logits"]))
        wait_until(lambda: backend.queued_rows == number + 1)  # noqa: B023 - at once
    gate.set()
    assert [future.result(WAIT_S)["logits"].shape for future in futures] == [(2, 3)] * 3
    assert first.result(WAIT_S).shape == (1, 2) and engine.sizes == [(1, 60), (1, 4), (1, 4), (1, 4)]


def test_other_outputs_and_batches_without_masks_are_batches_of_their_own(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    one = batch_of(6)
    with_masks = Batch(one.input_ids, one.attention_mask, np.array([[0, 2]]))
    asked = [
        (one, ["sentence_embedding"]),
        (one, ["last_hidden_state"]),
        (with_masks, ["logits"]),
        (with_masks, ["logits"]),
    ]
    futures = [callers.submit(backend.run, *each) for each in asked]
    wait_until(lambda: backend.queued_rows == 4)
    gate.set()
    for future, (batch, outputs) in zip(futures, asked, strict=True):
        for name, values in values_of(batch, outputs).items():
            np.testing.assert_array_equal(future.result(WAIT_S)[name], values)
    first.result(WAIT_S)
    assert sorted(engine.sizes) == [(1, 6), (1, 6), (1, 60), (2, 6)]


@st.composite
def batches(draw):
    """Batches of any form: mask positions in any order, also none in a row; token types; holes in the mask."""
    outputs = draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=3, unique=True))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(0, 999), min_size=1, max_size=20))
        types = draw(st.integers(0, 3))
        rows.append(TypedRow(ids, [(0, 1), (types, len(ids) - 1)]))
    batch = collate(rows, pad_token_id=9, token_types=draw(st.booleans()))
    if draw(st.booleans()):
        holes = batch.attention_mask.copy()
        holes[:, 1::3] = 0
        batch = Batch(batch.input_ids, holes, None, batch.token_type_ids)
    positions = None
    if "logits" in outputs or draw(st.booleans()):
        positions = np.argwhere(batch.attention_mask == 1).astype(np.int64)
        chosen = draw(st.lists(st.integers(0, len(positions) - 1), max_size=6))
        positions = positions[np.array(chosen, np.int64)]
    return Batch(batch.input_ids, batch.attention_mask, positions, batch.token_type_ids), outputs


@given(st.lists(batches(), min_size=1, max_size=6), st.integers(1, 5), st.integers(10, 200))
@settings(max_examples=60, deadline=None)
def test_any_batches_get_the_answers_that_they_would_get_alone(given_batches, max_rows, max_tokens):
    gate = threading.Event()
    engine = Engine(gate=gate)
    backend = joining(engine, max_rows=max_rows, max_tokens=max_tokens)
    with ThreadPoolExecutor(8) as callers:
        first = callers.submit(embed, backend, 60)
        wait_until(lambda: engine.inside == 1)
        futures = [callers.submit(backend.run, *each) for each in given_batches]
        wait_until(lambda: backend.queued_rows == sum(len(batch.input_ids) for batch, _ in given_batches))
        gate.set()
        first.result(WAIT_S)
        for future, (batch, outputs) in zip(futures, given_batches, strict=True):
            found = future.result(WAIT_S)
            assert list(found) == outputs
            for name, values in values_of(batch, outputs).items():
                if values.ndim == 3:  # values of padding are nobody's
                    ends = batch.input_ids.shape[1] - np.argmax(batch.attention_mask[:, ::-1], axis=1)
                    inside = np.arange(batch.input_ids.shape[1]) < ends[:, None]
                    np.testing.assert_array_equal(found[name][inside], values[inside])
                else:
                    np.testing.assert_array_equal(found[name], values)
                assert found[name].dtype == np.float32 and found[name].shape == values.shape
    assert is_empty(backend)


def test_tokens_without_attention_keep_their_answers_where_a_model_scores_them(gate, callers):
    class OfEveryToken(Engine):
        def run(self, batch, outputs):
            super().run(batch, outputs)
            return {"last_hidden_state": batch.input_ids[..., None].astype(np.float32)}

    expansion = QueryExpansion(token=4, length=8, attended=False, fixed=False)
    spec = ModelSpec(
        "multi-vector", 64, 1000, 1, pad_token_id=9, multi_vector=MultiVectorSpec(8, 8, expansion=expansion)
    )
    assert spec.multi_vector.scores_unattended
    engine = OfEveryToken(gate=gate)
    backend = joining(engine, spec=spec)
    first = callers.submit(backend.run, batch_of(60), ["last_hidden_state"])
    wait_until(lambda: engine.inside == 1)
    rows = [ExpandedRow([7, 8, 4, 4], [(0, 4)], attended=2), ExpandedRow([7, 8, 5, 9, 9, 9], [(0, 6)], attended=3)]
    futures = [callers.submit(backend.run, collate([row], pad_token_id=9), ["last_hidden_state"]) for row in rows]
    wait_until(lambda: backend.queued_rows == 2)
    gate.set()
    for future, row in zip(futures, rows, strict=True):
        assert future.result(WAIT_S)["last_hidden_state"][0, :, 0].tolist() == row
    first.result(WAIT_S)
    assert engine.sizes == [(1, 60), (2, 6)]


def test_batches_too_small_for_a_stream_run_one_at_a_time_and_grow_meanwhile(gate, callers):
    plan = StreamPlan(3, 1, least_tokens=27, fewest_batches=2, packed=False, reason="a test")
    engine = Engine(lanes=3, gate=gate, plan=plan)
    backend = joining(engine)
    assert backend.plan is plan
    small = [callers.submit(embed, backend, 9)]
    wait_until(lambda: engine.inside == 1)
    small += queue(backend, callers, (9,), (9,))
    assert engine.inside == 1, "two batches of nine tokens would wait for each other inside the engine"
    small.append(callers.submit(embed, backend, 9))
    wait_until(lambda: engine.inside == 2)
    assert backend.queued_rows == 0
    gate.set()
    for future in small:
        future.result(WAIT_S)
    assert engine.sizes == [(1, 9), (3, 9)]


def test_batches_of_one_call_that_are_computed_at_once_go_to_the_streams(gate, callers):
    """As those of a list do: see `StreamedBackend`."""
    lanes, opened = [], Engine(gate=gate)
    whole = Engine()
    opened.fails = whole.fails = lambda ids: lanes.append((ids.shape[1], in_a_lane()))
    plan = StreamPlan(2, 1, least_tokens=1, fewest_batches=2, packed=True, reason="a test")
    backend = joining(StreamedBackend(whole, plan, lambda: opened), max_tokens=100)
    both = callers.submit(embed, backend, 50, 5)  # of unlike length
    wait_until(lambda: len(opened.batches) + len(whole.batches) == 2)
    gate.set()
    np.testing.assert_array_equal(both.result(WAIT_S), expected(50, 5))
    assert (50, True) in lanes and (1, 50) in opened.sizes
    embed(backend, 7)
    assert lanes[-1] == (7, False) and whole.sizes[-1] == (1, 7), "alone, on all threads"


# --- errors -----------------------------------------------------------------------------------------------------------


def is_marked(ids):
    return bool((ids >= 900).any())


def test_an_error_of_the_engine_is_that_of_the_caller_whose_rows_cause_it(gate, callers):
    engine = Engine(gate=gate)
    engine.fails = is_marked
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    good = callers.submit(embed, backend, 3)
    bad = callers.submit(embed, backend, 4, first=950)
    others = callers.submit(embed, backend, 5, 3, first=300)
    wait_until(lambda: backend.queued_rows == 4)
    gate.set()
    with pytest.raises(BackendError, match="the engine broke"):
        bad.result(WAIT_S)
    np.testing.assert_array_equal(first.result(WAIT_S), expected(60))
    np.testing.assert_array_equal(good.result(WAIT_S), expected(3))
    np.testing.assert_array_equal(others.result(WAIT_S), expected(5, 3, first=300))
    wait_until(lambda: is_empty(backend))


def test_nan_of_one_caller_is_not_that_of_others(gate, callers):
    engine = Engine(gate=gate)
    engine.spreads_nan = is_marked
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    good, bad = callers.submit(embed, backend, 3, 4), callers.submit(embed, backend, 4, first=950)
    wait_until(lambda: backend.queued_rows == 3)
    gate.set()
    assert np.isnan(bad.result(WAIT_S)).all(), "the model names its inputs in the error"
    np.testing.assert_array_equal(good.result(WAIT_S), expected(3, 4))
    first.result(WAIT_S)
    wait_until(lambda: is_empty(backend))


@pytest.mark.parametrize(
    ("batch", "outputs", "message"),
    [
        (batch_of(4, first=998), ["logits"], r"input_ids\[0, 2\] is 1000"),
        (batch_of(65), ["logits"], "expected at least one row of 1 to 64"),
        (batch_of(4), ["nope"], "no output 'nope'"),
    ],
)
def test_bad_batches_are_refused_before_they_wait(batch, outputs, message):
    engine = Engine()
    backend = joining(engine)
    with pytest.raises((InputError, BackendError), match=message):
        backend.run(batch, outputs)
    assert engine.batches == [] and is_empty(backend)


def test_ctrl_c_in_the_thread_that_computes_for_others_leaves_them_their_answers(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    interrupted, other = batch_of(5, 6), batch_of(5, first=100)

    def interrupt(ids):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    engine.fails = interrupt
    waits = callers.submit(backend.run, other, ["sentence_embedding"])
    wait_until(lambda: backend.queued_rows == 1)
    gate.set()
    for future in (first, waits):
        future.result(WAIT_S)
    with pytest.raises(KeyboardInterrupt):  # the engine is free: the main thread computes
        backend.run(interrupted, ["sentence_embedding"])
    assert is_empty(backend)
    np.testing.assert_array_equal(callers.submit(embed, backend, 3).result(WAIT_S), expected(3))


def test_close_ends_the_calls_that_wait_and_not_the_batch_that_is_computed(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    others = queue(backend, callers, (3,), (4, 5))
    backend.close()
    for future in others:
        with pytest.raises(BackendError, match="closed"):
            future.result(WAIT_S)
    assert engine.is_closed
    gate.set()
    np.testing.assert_array_equal(first.result(WAIT_S), expected(60))
    wait_until(lambda: is_empty(backend))
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        embed(backend, 3)


def test_threads_that_cannot_start_are_no_error(gate, callers, monkeypatch):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    others = queue(backend, callers, (3,), (30,))

    def refuse(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(backend._threads, "submit", refuse)
    gate.set()
    for future in (first, *others):
        future.result(WAIT_S)
    wait_until(lambda: is_empty(backend))


# --- calls ------------------------------------------------------------------------------------------------------------


def in_call(call, function, *args, **options):
    with call:
        return function(*args, **options)


def test_a_cancelled_call_leaves_the_queue_at_once(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    call = Call()
    cancelled = callers.submit(in_call, call, embed, backend, 5, 6)
    wait_until(lambda: backend.queued_rows == 2)
    other = callers.submit(embed, backend, 5)
    wait_until(lambda: backend.queued_rows == 3)
    call.cancel()
    assert (backend.queued_rows, backend.queued_tokens) == (1, 5), "before any thread had to wake up"
    with pytest.raises(CancelledCallError):
        cancelled.result(WAIT_S)
    with pytest.raises(CancelledCallError):
        in_call(call, embed, backend, 5)
    gate.set()
    np.testing.assert_array_equal(other.result(WAIT_S), expected(5))
    first.result(WAIT_S)
    assert engine.sizes == [(1, 60), (1, 5)] and not call._watchers
    wait_until(lambda: is_empty(backend))


def test_a_call_that_is_cancelled_while_it_is_computed_beside_others_does_not_hurt_them(gate, callers):
    engine, opened = Engine(gate=gate), threading.Event()
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    call = Call()
    cancelled = callers.submit(in_call, call, embed, backend, 5)
    other = callers.submit(embed, backend, 6)
    wait_until(lambda: backend.queued_rows == 2)
    engine.gate, before = opened, gate
    before.set()
    wait_until(lambda: len(engine.batches) == 2)
    call.cancel()
    with pytest.raises(CancelledCallError):
        cancelled.result(WAIT_S)  # the engine still computes its row
    assert not opened.is_set()
    opened.set()
    np.testing.assert_array_equal(other.result(WAIT_S), expected(6))
    first.result(WAIT_S)
    assert engine.sizes == [(1, 60), (2, 6)]


def test_a_deadline_ends_the_wait_and_leaves_nothing_behind(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    with pytest.raises(DeadlineError):
        in_call(Call(deadline=time.monotonic() + 0.02), embed, backend, 5)
    assert (backend.queued_rows, backend.queued_tokens) == (0, 0)
    with pytest.raises(DeadlineError):
        in_call(Call(deadline=time.monotonic()), embed, backend, 5)
    gate.set()
    first.result(WAIT_S)
    assert engine.sizes == [(1, 60)]
    np.testing.assert_array_equal(in_call(Call(deadline=time.monotonic() + WAIT_S), embed, backend, 5), expected(5))


def test_a_full_queue_refuses_at_once_and_lets_in_again_what_fits(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine, max_queue_tokens=20)
    first = occupy(backend, engine, callers, gate)
    (large,) = queue(backend, callers, (15, 15))  # alone in the queue: else it could never be computed
    with pytest.raises(OverloadedError, match="30 tokens wait already.*max_queue_tokens=20") as refused:
        embed(backend, 1)
    assert refused.value.retry_after_s > 0 and backend.queued_rows == 2
    gate.set()
    for future in (first, large):
        future.result(WAIT_S)
    np.testing.assert_array_equal(embed(backend, 5), expected(5))
    assert is_empty(backend) and backend._tokens_per_s > 0


def test_a_call_whose_deadline_will_pass_in_the_queue_is_refused_at_once(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    call = Call(deadline=time.monotonic() + WAIT_S)
    own = callers.submit(in_call, call, embed, backend, 15)  # nothing waits, so it may
    wait_until(lambda: backend.queued_rows == 1)
    backend._tokens_per_s = 15 / (2 * WAIT_S)
    with pytest.raises(OverloadedError, match=r"15 tokens wait already, and this call has \d+\.\d s left") as refused:
        in_call(Call(deadline=time.monotonic() + WAIT_S), embed, backend, 1)
    assert refused.value.retry_after_s == pytest.approx(2 * WAIT_S) and backend.queued_rows == 1
    patient = callers.submit(in_call, Call(deadline=time.monotonic() + 4 * WAIT_S), embed, backend, 1)
    endless = callers.submit(embed, backend, 2)
    wait_until(lambda: backend.queued_rows == 3)
    gate.set()
    for future in (first, own, patient, endless):
        future.result(WAIT_S)


def test_a_call_that_was_let_in_is_let_in_with_its_next_batches(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine, max_queue_tokens=20)
    first = occupy(backend, engine, callers, gate)
    call = Call()
    own = callers.submit(in_call, call, embed, backend, 15)
    wait_until(lambda: backend.queued_rows == 1)
    more = callers.submit(in_call, call, embed, backend, 16)
    wait_until(lambda: backend.queued_rows == 2)
    with pytest.raises(OverloadedError):
        in_call(Call(), embed, backend, 1)
    gate.set()
    for future in (first, own, more):
        future.result(WAIT_S)


def test_the_usage_of_a_call_counts_its_own_rows(gate, callers):
    engine = Engine(gate=gate)
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    call = Call()
    own = callers.submit(in_call, call, embed, backend, 5, 3)
    other = callers.submit(embed, backend, 6)
    wait_until(lambda: backend.queued_rows == 3)
    gate.set()
    for future in (first, own, other):
        future.result(WAIT_S)
    usage = call.usage
    assert (usage.rows, usage.tokens, usage.padded_tokens, usage.batches) == (2, 8, 12, 1)
    assert usage.queued_s > 0 and usage.computed_s > 0


def test_observers_see_every_batch_and_cannot_stop_the_queue(gate, callers):
    seen = []

    class Recorder:
        def on_batch(self, rows, tokens, padded_tokens, seconds):
            seen.append((rows, tokens, padded_tokens, seconds > 0))
            raise ValueError("a fault of the observer")

    engine = Engine(gate=gate)
    backend = joining(engine)
    backend.observe(Recorder())
    first = occupy(backend, engine, callers, gate)
    others = queue(backend, callers, (5,), (3, 4))
    gate.set()
    for future in (first, *others):
        future.result(WAIT_S)
    wait_until(lambda: is_empty(backend))
    assert seen == [(1, 60, 60, True), (3, 12, 15, True)]


def test_results_keep_no_other_callers_values_alive(gate, callers):
    engine, alive = Engine(gate=gate), []
    run = engine.run

    def remembered(batch, outputs):
        found = run(batch, outputs)
        alive.extend(weakref.ref(values) for values in found.values())
        return found

    engine.run = remembered
    backend = joining(engine)
    first = occupy(backend, engine, callers, gate)
    others = queue(backend, callers, (5,), (5,))
    gate.set()
    answers = [future.result(WAIT_S) for future in others]
    first.result(WAIT_S)
    wait_until(lambda: (gc.collect(), alive[1]() is None)[1])
    assert all(answer.base is None for answer in answers)


# --- what joining costs, in tokens ------------------------------------------------------------------------------------

CALL_TOKENS = 25  # a call of an engine costs as much as computing so many tokens: see `text/batching.py`


def tokens_of(lengths):
    return CALL_TOKENS + len(lengths) * max(lengths)


def computed_tokens(callers, shortest, longest, *, lanes=1, rows=3000):
    """Tokens that are computed for each token of a text, where callers come back with a new text at each answer.

    Threads and time are simulated: a batch takes as long as it has tokens.
    """
    drawn, clock, running = random.Random(0), 0, []
    backend = joining(Engine(lanes=lanes), max_rows=1000, max_tokens=1024)
    computed = asked = answered = 0

    def ask():
        nonlocal asked
        length = drawn.randint(shortest, longest)
        asked += length
        backend._put(_Row(None, 0, length, None, "a key"))

    def begin():
        nonlocal computed
        for turn in backend._start():
            tokens = tokens_of([row.length for row in turn.rows])
            computed += tokens
            heapq.heappush(running, (clock + tokens, id(turn), turn))

    for _ in range(callers):
        ask()
    begin()
    while answered < rows:
        clock, _, turn = heapq.heappop(running)
        backend._free += 1
        begin()  # the next batch begins before the callers of the last one are back
        for _ in turn.rows:
            answered += 1
            ask()
        begin()
    return computed / (asked - backend.queued_tokens)


@pytest.mark.parametrize(
    ("callers", "lengths", "share"),
    [(8, (5, 300), 0.9), (32, (5, 300), 0.95), (128, (5, 300), 0.98), (32, (5, 40), 0.8), (128, (5, 40), 0.93)],
)
@pytest.mark.parametrize("lanes", [1, 2])
def test_single_texts_of_many_callers_cost_little_more_than_a_list_of_all(callers, lengths, share, lanes):
    drawn = random.Random(1)
    texts = [drawn.randint(*lengths) for _ in range(512)]
    batches_of_list = plan_batches(texts, BatchLimits(32, 1024, 10**6))
    of_list = sum(tokens_of([texts[index] for index in group]) for group in batches_of_list) / sum(texts)
    assert of_list / computed_tokens(callers, *lengths, lanes=lanes) >= share

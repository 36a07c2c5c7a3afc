"""`Model` over a backend with two lanes: batches overlap, answers are those of one lane; and `warm_up`."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import gte_deploy
from gte_deploy.core.errors import BackendError, InputError
from runtime_models import make_word_checkpoint
from tensorrt_doubles import HostRuntime, backend_over, engine_of, plan_of

pytest.importorskip("torch", reason="the backend under the lanes is torch")

TEXTS = [
    f"{first} {last}"
    for last in ("king", "sea", "man", "old")
    for first in ("the king and the", "a", "the old", "the man and the", "old", "the")
]


class TwoLanes:
    """A backend that lets two batches in at once, and waits until there are two."""

    lanes = 2

    def __init__(self, inner, *, together=True):
        self.inner = inner
        self.name, self.device, self.num_threads = inner.name, inner.device, inner.num_threads
        self.outputs, self.precision = inner.outputs, inner.precision
        self.together = threading.Barrier(2, timeout=10) if together else None
        self.lock = threading.Lock()
        self.shapes, self.fails_at = [], None

    def run(self, batch, outputs):
        if self.together is not None:
            self.together.wait()
        with self.lock:
            self.shapes.append(batch.input_ids.shape)
            if self.fails_at is not None and len(self.shapes) == self.fails_at:
                raise BackendError("it broke")
            return self.inner.run(batch, outputs)

    def shapes_to_warm_up(self):
        return [(1, 1), (4, 8), (40, 32)]

    def warm_up(self, batches, outputs):
        self.warmed = [batch.input_ids.shape for batch in batches], list(outputs)

    def close(self):
        self.inner.close()


CALLS = {
    "embed": lambda model: model.encode(TEXTS, batch_size=4),
    "classify": lambda model: model.predict([(text, "the sea") for text in TEXTS], batch_size=4),
    "fill-mask": lambda model: model.fill_mask([text + " [MASK]" for text in TEXTS], batch_size=4, top_k=2),
}


def assert_same(found, expected):
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_same(one, two)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    else:
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("task", CALLS)
def test_two_batches_overlap_and_answers_are_those_of_one_lane(word_checkpoints, task):
    with gte_deploy.load(word_checkpoints[task], num_threads=1) as model:
        expected = CALLS[task](model)
        model._backend = lanes = TwoLanes(model._backend)
        # The barrier breaks if a batch is ever alone, so the number of batches is even.
        assert_same(CALLS[task](model), expected)
        assert len(lanes.shapes) == 6


def test_tokens_and_entities_over_two_lanes(tmp_path):
    checkpoint = make_word_checkpoint(tmp_path / "tags", task="token-classify")
    with gte_deploy.load(checkpoint, num_threads=1) as model:
        calls = (lambda: model.predict(TEXTS, batch_size=4), lambda: model.classify_tokens(TEXTS, batch_size=4))
        expected = [call() for call in calls]
        model._backend = TwoLanes(model._backend)
        for call, answers in zip(calls, expected, strict=True):
            assert_same(call(), answers)


def test_a_failure_in_the_middle_reaches_the_caller(word_checkpoints):
    with gte_deploy.load(word_checkpoints["embed"], num_threads=1) as model:
        model._backend = lanes = TwoLanes(model._backend, together=False)
        lanes.fails_at = 3
        with pytest.raises(BackendError, match="it broke"):
            model.encode(TEXTS, batch_size=2)
        assert len(lanes.shapes) <= 6, "of 12"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("gte-lane")]
        lanes.fails_at = None
        assert model.encode(TEXTS, batch_size=2).shape == (24, model.spec.hidden_size)


def test_a_single_batch_needs_no_thread(word_checkpoints, monkeypatch):
    with gte_deploy.load(word_checkpoints["embed"], num_threads=1) as model:
        model._backend = TwoLanes(model._backend, together=False)
        threads = []
        run = model._backend.run
        monkeypatch.setattr(model._backend, "run", lambda *call: (threads.append(threading.get_ident()), run(*call))[1])
        model.encode("a text")
        assert threads == [threading.get_ident()]


# --- warm_up --------------------------------------------------------------------------------------------------------


def test_a_laned_backend_warms_up_its_own_shapes_within_the_limits_of_encode(word_checkpoints):
    for task, output in (("embed", "sentence_embedding"), ("classify", "logits"), ("fill-mask", "logits")):
        with gte_deploy.load(word_checkpoints[task], num_threads=1, max_batch_tokens=320) as model:
            model._backend = lanes = TwoLanes(model._backend)
            done = model.warm_up()
            assert list(done.shapes) == lanes.warmed[0] == [(10, 32), (4, 8), (1, 1)] and done.seconds >= 0
            assert lanes.warmed[1] == [output if output in model._backend.outputs else "last_hidden_state"]


def test_other_backends_run_short_and_long_batches(word_checkpoints):
    with gte_deploy.load(word_checkpoints["embed"], num_threads=1) as model:
        shapes, run = [], model._backend.run
        model._backend.run = lambda batch, outputs: (shapes.append(batch.input_ids.shape), run(batch, outputs))[1]
        longest = model.spec.max_length
        done = model.warm_up()
        lengths = sorted({min(length, longest) for length in (16, 128, 512)})
        rows = {length: min(32, 1024 // length, (longest // length) ** 2) or 1 for length in lengths}
        assert set(done.shapes) == {(count, length) for length in lengths for count in (1, rows[length])}
        assert shapes == list(done.shapes)
        assert model.warm_up([4, 8], [2]).shapes == ((2, 8), (2, 4))
        assert set(model.warm_up(lengths=[4]).shapes) == {(32, 4), (1, 4)}
        for wrong in ({"lengths": [0]}, {"lengths": [longest + 1]}, {"rows": [0]}, {"lengths": [1.5]}):
            with pytest.raises(InputError, match="each of (lengths|rows) must be an integer"):
                model.warm_up(**wrong)
    with pytest.raises(BackendError, match="closed"):
        model.warm_up()


def test_after_a_warm_up_a_tensorrt_engine_prepares_nothing_for_these_shapes(word_checkpoints):
    with gte_deploy.load(word_checkpoints["fill-mask"], num_threads=1) as model:
        model._backend.close()
        runtime = HostRuntime()
        model._backend = backend = backend_over(runtime, plan_of(), model.spec)
        engine_of(backend).compute = lambda shapes, addresses: None
        done = model.warm_up()
        assert set(done.shapes) == {(1, 1), (4, 8), (4, 16), (1, 17), (2, 32), (2, 64)}
        before = backend.counts()
        batches = [model._sample_batch(*shape) for shape in done.shapes]
        for batch in batches:
            backend.run(batch, ["logits"])
        after = backend.counts()
        assert after["preparations"] == before["preparations"] > 0
        assert after["replays"] - before["replays"] == len(batches)

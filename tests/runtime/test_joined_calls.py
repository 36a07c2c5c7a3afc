"""Models whose calls share batches: on every engine and for every task, as the same model without."""

from __future__ import annotations

import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_tokens, raise_token_weights
from family_checkpoints import make_family_checkpoint
from gte_deploy import (
    BackendError,
    Call,
    CancelledCallError,
    DeadlineError,
    InputError,
    JoinOptions,
    NonFiniteError,
    OverloadedError,
    TokenChunks,
)
from gte_deploy.core.calls import current_call
from gte_deploy.core.lanes import in_lanes
from gte_deploy.tasks.sparse import SparseEmbedding
from runtime_models import make_word_checkpoint
from waiting import WAIT_S, wait_until

WORDS = "paris france capital city river house water light king queen world time year day man woman old new".split()
TEXTS = [" ".join(random.Random(number).choices(WORDS, k=1 + number * 11 % 90)) for number in range(48)]
THREADS = 16
TOLERANCE = 2e-5  # float32 sums in another order


def filled(model, texts):
    """For each text a list of masks, each with a list of (token, score)."""
    found = model.fill_mask([f"{text} the [MASK] {'[MASK] ' * (len(text) % 3)}" for text in texts], top_k=4)
    found = found if len(texts) > 1 else [found]  # as the pipeline does
    masks = [answer if isinstance(answer[0], list) else [answer] for answer in found]
    return [[[(one["token"], one["score"]) for one in mask] for mask in answer] for answer in masks]


CALLS = {
    "embed": lambda model, texts: list(model.encode(texts)),
    "embed, chunks": lambda model, texts: [
        found.embeddings for found in model.encode(texts, chunks=TokenChunks(9), max_length=40)
    ],
    "tokens": lambda model, texts: model.encode(texts, output_value="token_embeddings"),
    "classify": lambda model, texts: list(model.predict([(text, "the old king") for text in texts])),
    "fill-mask": filled,
    "sparse": lambda model, texts: list(model.encode_sparse(texts)),
    "hybrid": lambda model, texts: list(model.encode_hybrid(texts).dense),
    "hybrid, sparse": lambda model, texts: list(model.encode_hybrid(texts).sparse),
    "token types": lambda model, texts: list(model.predict([("the king", text) for text in texts], truncation=True)),
    "token-classify": lambda model, texts: [
        [entity["score"] for entity in entities] for entities in model.classify_tokens(texts)
    ],
    "multi-vector": lambda model, texts: model.encode_query(texts, truncation=True),
    "multi-vector, documents": lambda model, texts: model.encode_document(texts, truncation=True),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, word_checkpoints):
    """A checkpoint for each task, and the task to load it for."""
    folder = tmp_path_factory.mktemp("joined")

    def make(name, task, **options):
        return make_word_checkpoint(folder / name, task=task, **options)

    weights = raise_token_weights(make("weights", "token-classify", seed=3, pooling="cls", normalize=True))
    late = add_tokens(make("late", "embed", seed=4), ["[Q] ", "[D] "])
    lengths = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 64}
    return {
        **{task: (path, task) for task, path in word_checkpoints.items()},
        "tokens": (word_checkpoints["embed"], "embed"),
        "sparse": (make("splade", "fill-mask", seed=7), "sparse"),
        "hybrid": (weights, "hybrid"),
        "token-classify": (make("tags", "token-classify", num_labels=3, seed=5), "token-classify"),
        "multi-vector": (add_multi_vector_modules(late, config=lengths), "multi-vector"),
        "token types": (make_family_checkpoint(folder / "types", "bert", "classify"), "classify"),
    }


@pytest.fixture(scope="module")
def load_joined(checkpoints, bundle_of):
    """`load_joined(backend, name, **options)`: the model of a checkpoint above."""

    def load(backend, name, **options):
        path, task = checkpoints[name]
        if backend == "openvino":
            pytest.importorskip("openvino")
        if backend == "torch":
            return gte_deploy.load(path, backend=backend, task=task, num_threads=2, **options)
        return gte_deploy.load(bundle_of(path, task=task), backend=backend, num_threads=2, **options)

    return load


class Held:
    """Holds the engine of a model with joined calls until `go`, and counts its batches."""

    def __init__(self, model):
        self.queue, self.gate, self.rows = model.joining, threading.Event(), []
        self.engine = self.queue.inner
        self._run = self.engine.run
        self.engine.run = self.run
        self.queue.observe(self)

    def run(self, batch, outputs):
        assert self.gate.wait(WAIT_S)
        return self._run(batch, outputs)

    def on_batch(self, rows, tokens, padded_tokens, seconds):
        self.rows.append(rows)

    def go(self):
        self.gate.set()

    def is_empty(self):
        return (self.queue.queued_rows, self.queue.queued_tokens, self.queue.running) == (0, 0, 0)


def assert_same(found, expected):
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, SparseEmbedding):
        np.testing.assert_allclose(found.to_dense(), expected.to_dense(), rtol=0, atol=TOLERANCE)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_callers_at_once_get_the_answers_that_they_get_one_by_one(backend, name, load_joined):
    ask, kind = CALLS[name], name.split(",")[0]
    with load_joined(backend, kind) as plain:
        expected = ask(plain, TEXTS)
    drawn = random.Random(0)
    chosen = [drawn.sample(range(len(TEXTS)), drawn.choice([1, 1, 1, 2, 5, 20])) for _ in range(40)]
    with load_joined(backend, kind, join_calls=True, max_batch_tokens=300) as model:
        held = Held(model)
        with ThreadPoolExecutor(THREADS) as callers:
            futures = [callers.submit(ask, model, [TEXTS[index] for index in own]) for own in chosen]
            wait_until(lambda: held.queue.queued_rows >= THREADS)
            held.go()
            for own, future in zip(chosen, futures, strict=True):
                assert_same(future.result(60), [expected[index] for index in own])
        assert max(held.rows) > 1 and len(held.rows) < sum(held.rows)
        wait_until(held.is_empty)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_as_a_list_and_with_streams(backend, load_joined):
    with load_joined(backend, "embed") as plain:
        expected = plain.encode(TEXTS)
    with load_joined(backend, "embed", join_calls=True, streams=2, max_batch_tokens=200) as model:
        assert model.info()["lists"]["streams"] == 2 and model.joining.lanes == 3
        assert model.warm_up([16], [1, 4]).shapes == ((4, 16), (1, 16))
        with ThreadPoolExecutor(4) as callers:
            for future in [callers.submit(model.encode, TEXTS) for _ in range(6)]:
                assert_same(future.result(60), expected)


def test_the_error_of_one_caller_names_its_own_input(load_joined):
    with load_joined("onnx", "embed", join_calls=True) as model:
        held = Held(model)
        run, (marker,) = held._run, model.tokenizer.convert_tokens_to_ids(["中"])

        def with_nan(batch, outputs):
            bad = (batch.input_ids == marker).any(axis=1)
            return {
                name: np.where(bad[:, None], np.float32(np.nan), values) for name, values in run(batch, outputs).items()
            }

        held._run = with_nan
        with ThreadPoolExecutor(THREADS) as callers:
            good = [callers.submit(model.encode, text) for text in TEXTS[:2]]
            wait_until(lambda: held.queue.running == 2)
            good += [callers.submit(model.encode, text) for text in TEXTS[2:6]]
            bad = callers.submit(model.encode, ["the king", "a queen", "the 中 queen"])
            wait_until(lambda: held.queue.queued_rows == 7)
            held.go()
            with pytest.raises(NonFiniteError, match="for the inputs 2;"):
                bad.result(WAIT_S)
            for future in good:
                assert np.isfinite(future.result(WAIT_S)).all()
            with pytest.raises(InputError, match="input 1 "):
                callers.submit(model.encode, ["a", "the king " * 200]).result(WAIT_S)
        wait_until(held.is_empty)


# --- calls of a whole method ------------------------------------------------------------------------------------------


def in_call(call, function, *args):
    with call:
        return function(*args)


def test_a_list_that_was_let_in_is_not_refused_in_its_middle(load_joined):
    with load_joined("onnx", "embed") as plain:
        expected = plain.encode(TEXTS)
    options = JoinOptions(max_queue_tokens=150)
    with load_joined("onnx", "embed", join_calls=options, max_batch_tokens=100) as model:
        held = Held(model)
        with ThreadPoolExecutor(THREADS) as callers:
            first = callers.submit(model.encode, TEXTS)
            wait_until(lambda: held.queue.running == 2 and held.queue.queued_rows > 0)
            others = [callers.submit(model.encode, TEXTS[:9]) for _ in range(8)]
            wait_until(lambda: any(other.done() for other in others))
            held.go()
            np.testing.assert_allclose(first.result(60), expected, rtol=0, atol=TOLERANCE)
            refused = [error for other in others if (error := other.exception(60)) is not None]
            assert refused and all(isinstance(error, OverloadedError) and error.retry_after_s > 0 for error in refused)
        wait_until(held.is_empty)


def test_a_cancelled_list_ends_in_all_its_lanes(load_joined):
    with load_joined("onnx", "embed", join_calls=True, max_batch_tokens=100) as model:
        held, call = Held(model), Call()
        with ThreadPoolExecutor(2) as callers:
            cancelled = callers.submit(in_call, call, model.encode, TEXTS)
            wait_until(lambda: held.queue.running == 2 and held.queue.queued_rows > 0)
            call.cancel()
            assert held.queue.queued_rows == 0
            held.go()
            with pytest.raises(CancelledCallError):
                cancelled.result(WAIT_S)
        wait_until(held.is_empty)
        assert len(held.rows) == 2, "those that were computed at that moment"


@pytest.mark.parametrize("join_calls", [False, True])
def test_usage_deadline_and_cancellation_hold_with_and_without_joining(load_joined, join_calls):
    with load_joined("onnx", "embed", join_calls=join_calls, max_batch_tokens=200) as model:
        call = Call(deadline=time.monotonic() + 60)
        with call:
            model.encode([*TEXTS, *TEXTS])
        tokens = sum(map(len, model.tokenizer(TEXTS)["input_ids"]))
        usage = call.usage
        assert (usage.rows, usage.tokens) == (len(TEXTS), tokens), "equal texts are computed once"
        assert usage.padded_tokens >= tokens and usage.batches > 10 and usage.computed_s > 0
        late = Call(deadline=time.monotonic())
        with pytest.raises(DeadlineError):
            in_call(late, model.encode, "a text")
        call.cancel()
        with pytest.raises(CancelledCallError):
            in_call(call, model.encode, "a text")
        model.encode("a text")  # outside of the call
        assert call.usage == usage and late.usage.rows == 0


def test_calls_are_nested_and_seen_in_lanes():
    outer, inner = Call(), Call()
    with outer:
        with inner:
            assert current_call() is inner
        assert current_call() is outer
        assert set(in_lanes(lambda _: current_call(), range(6), 3)) == {outer}
    assert current_call() is None


@pytest.mark.parametrize("deadline", ["soon", float("nan"), float("inf")])
def test_a_deadline_is_a_time(deadline):
    with pytest.raises(InputError, match=r"expected a time of time\.monotonic"):
        Call(deadline=deadline)


@pytest.mark.parametrize("join_calls", [None, 1, "yes"])
def test_what_joins_is_a_choice_or_options(word_checkpoints, join_calls):
    with pytest.raises(InputError, match="expected True, False or gte_deploy.JoinOptions"):
        gte_deploy.load(word_checkpoints["embed"], join_calls=join_calls)
    with pytest.raises(InputError, match="max_queue_tokens is 0"):
        JoinOptions(max_queue_tokens=0)


def test_close_ends_what_waits_and_pickles_join_again(load_joined):
    with load_joined("onnx", "embed", join_calls=JoinOptions(5000)) as model:
        expected = model.encode(TEXTS)
        with pickle.loads(pickle.dumps(model)) as copied:
            assert copied.joining is not None and copied.joining is not model.joining
            np.testing.assert_array_equal(copied.encode(TEXTS), expected)
        held = Held(model)
        with ThreadPoolExecutor(THREADS) as callers:
            futures = [callers.submit(model.encode, text) for text in TEXTS[:8]]
            wait_until(lambda: held.queue.queued_rows + held.queue.running == 8)
            model.close()
            held.go()
            for future in futures:  # two were in the engine, which is closed by now
                assert isinstance(future.exception(WAIT_S), BackendError)
        with pytest.raises(BackendError, match="closed"):
            model.encode("a text")


def test_threads_leave_calls_their_own_results(load_joined):
    """Random callers for a while: what they get is what they asked for, and nothing is left."""
    with load_joined("onnx", "embed") as plain:
        expected = plain.encode(TEXTS)
    with load_joined("onnx", "embed", join_calls=JoinOptions(400), max_batch_tokens=200) as model:

        def caller(seed):
            drawn, answered = random.Random(seed), 0
            for _ in range(15):
                own = drawn.sample(range(len(TEXTS)), drawn.choice([1, 1, 2, 6, 30]))
                call = Call(deadline=time.monotonic() + drawn.choice([0.001, 0.01, 60]))
                if drawn.random() < 0.2:
                    threading.Timer(drawn.random() / 100, call.cancel).start()
                try:
                    found = in_call(call, model.encode, [TEXTS[index] for index in own])
                except (CancelledCallError, DeadlineError, OverloadedError):
                    continue
                np.testing.assert_allclose(found, expected[own], rtol=0, atol=TOLERANCE)
                answered += 1
            return answered

        with ThreadPoolExecutor(THREADS) as callers:
            assert sum(callers.map(caller, range(THREADS))) > THREADS
        queue = model.joining
        wait_until(lambda: (queue.queued_rows, queue.queued_tokens, queue.running) == (0, 0, 0))
        np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=TOLERANCE)

"""Many threads on one model get what the serial run gives, also while it is closed."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from battery import Attempts
from gte_deploy.core.errors import BackendError

THREADS = 64
CALLS = 320
Request = tuple[list[str], int, str]
# How calls reach the engine, and the options of `load` for it. Streams compute several batches of a list at once.
WAYS: dict[str, dict[str, Any]] = {
    "joined": {"join_calls": True, "num_threads": 1},
    "streams": {"streams": 2, "num_threads": 2},
    "joined, streams": {"join_calls": True, "streams": 2, "num_threads": 2},
}


def random_texts(rng: random.Random) -> list[str]:
    words = "the king queen of france walked to a big old city [SEP] unknownword 中国 !".split()
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(rng.randint(1, 4))]


def make_requests(count: int) -> list[Request]:
    rng = random.Random(0)
    return [(random_texts(rng), rng.choice([8, 16, 100]), rng.choice(["cls", "mean"])) for _ in range(count)]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(CALLS)


def encode(model: Any, request: Request) -> np.ndarray:
    texts, max_length, pooling = request
    return model.encode(texts, truncation=True, max_length=max_length, pooling=pooling)


@pytest.fixture
def shape_tolerance(backend: str, row_tolerance: float) -> float:
    """How far an answer may be from itself in a batch of another shape: bfloat16 may be rounded elsewhere."""
    return 0.02 if "bf16" in backend else row_tolerance


# On PyTorch and on a GPU there are no streams; `load` refuses them (tests/runtime/backends/test_streams.py).
BY_WAY = pytest.mark.parametrize(
    ("backend", "way"),
    [("torch", "joined"), *itertools.product(("onnx", "openvino", "openvino bf16"), WAYS)],
    indirect=["backend"],
)


@pytest.fixture
def load_in(backend: str, load_on: Callable[..., Any], word_checkpoints: dict[str, Any]) -> Callable[[str], Any]:
    """`load_in(way)`: the embedding model, with calls that reach the engine in this way."""
    return lambda way: load_on(backend, word_checkpoints["embed"], **WAYS[way])


def assert_equal_to_serial(model: Any, requests: list[Request], serial: list[np.ndarray], tolerance: float) -> None:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        threaded = list(pool.map(lambda request: encode(model, request), requests))
    for one, other in zip(serial, threaded, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


def test_encodes_of_mixed_lengths_equal_the_serial_ones(
    models: dict[str, Any], requests: list[Request], repeat_tolerance: float, backend: str, attempts: Attempts
) -> None:
    model = models["embed"]
    serial = [encode(model, request) for request in requests]
    assert_equal_to_serial(model, requests, serial, max(1e-6, repeat_tolerance))
    attempts(f"calls from {THREADS} threads at once: {backend}", len(requests))


@BY_WAY
def test_calls_that_share_batches_or_streams_equal_the_serial_ones(
    models: dict[str, Any],
    requests: list[Request],
    load_in: Callable[[str], Any],
    way: str,
    shape_tolerance: float,
    attempts: Attempts,
) -> None:
    some = requests[:: 1 if way == "joined, streams" else 4]
    serial = [encode(models["embed"], request) for request in some]
    with load_in(way) as model:
        assert_equal_to_serial(model, some, serial, shape_tolerance)
    attempts(f"calls from {THREADS} threads at once: {way}", len(some))


@pytest.mark.slow
def test_thousands_of_calls_equal_the_serial_ones(
    models: dict[str, Any], load_in: Callable[[str], Any], shape_tolerance: float, backend: str, attempts: Attempts
) -> None:
    requests = make_requests(3000)
    serial = [encode(models["embed"], request) for request in requests]
    assert_equal_to_serial(models["embed"], requests, serial, shape_tolerance)
    with load_in("joined") as model:
        assert_equal_to_serial(model, requests, serial, shape_tolerance)
    attempts(f"calls from {THREADS} threads at once: {backend}", 2 * len(requests))


def test_fill_masks_equal_the_serial_ones(
    models: dict[str, Any], requests: list[Request], repeat_tolerance: float, attempts: Attempts
) -> None:
    model, top_k = models["fill-mask"], 1 if repeat_tolerance else 3

    def work(request: Request) -> list[tuple[int, str]]:
        texts, _, _ = request
        answers = model.fill_mask(f"{texts[0]} [MASK] {texts[-1]}", truncation=True, max_length=128, top_k=top_k)
        return [(answer["token"], answer["sequence"]) for answer in answers]

    some = [request for request in requests if len(request[0][0].split()) < 50][:100]
    serial = [work(request) for request in some]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, some)) == serial
    attempts(f"calls from {THREADS} threads at once: fill_mask", len(some))


def answered_until_closed(
    model: Any, requests: list[Request], serial: list[np.ndarray], tolerance: float, seconds: float
) -> int:
    """Close a model after so many seconds; how many calls of 64 threads were answered, all of them rightly.

    Each thread goes on until a call says that the model is closed.
    """
    numbers, inside = itertools.count(), threading.Barrier(THREADS + 1)

    def work(_: int) -> int:
        inside.wait()
        for answered in itertools.count():
            number = next(numbers) % len(requests)
            try:
                found = encode(model, requests[number])
            except BackendError as error:
                assert "closed" in str(error)
                return answered
            np.testing.assert_allclose(found, serial[number], atol=tolerance)
        raise AssertionError

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(work, thread) for thread in range(THREADS)]
        inside.wait()
        time.sleep(seconds)
        model.close()
        return sum(thread.result(120) for thread in running)


@BY_WAY
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_model_that_is_closed_while_threads_use_it(
    models: dict[str, Any],
    requests: list[Request],
    load_in: Callable[[str], Any],
    way: str,
    rounds: int,
    shape_tolerance: float,
    attempts: Attempts,
) -> None:
    """A call gets its right answer, or an error that says so, and none waits for ever."""
    serial = [encode(models["embed"], request) for request in requests]
    rng = random.Random(rounds)
    seconds = [0.05 * rng.random() for _ in range(rounds)]
    answered = [answered_until_closed(load_in(way), requests, serial, shape_tolerance, each) for each in seconds]
    attempts(f"calls from {THREADS} threads while another one closes the model", sum(answered) + THREADS * rounds)

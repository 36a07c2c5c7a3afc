"""Many threads on one model: what each gets is what the serial run gives."""

import concurrent.futures
import random

import numpy as np
import pytest

THREADS = 64
CALLS = 320


def random_texts(rng):
    words = "the king queen of france walked to a big old city [SEP] unknownword 中国 !".split()
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(rng.randint(1, 4))]


@pytest.fixture(scope="module")
def requests():
    rng = random.Random(0)
    return [(random_texts(rng), rng.choice([8, 16, 100]), rng.choice(["cls", "mean"])) for _ in range(CALLS)]


def test_encodes_of_mixed_lengths_equal_the_serial_ones(models, requests, repeat_tolerance):
    model = models["embed"]

    def work(request):
        texts, max_length, pooling = request
        return model.encode(texts, truncation=True, max_length=max_length, pooling=pooling)

    serial = [work(request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        threaded = list(pool.map(work, requests))
    for one, other in zip(serial, threaded, strict=True):
        np.testing.assert_allclose(one, other, atol=max(1e-6, repeat_tolerance))


def test_fill_masks_equal_the_serial_ones(models, requests, repeat_tolerance):
    model, top_k = models["fill-mask"], 1 if repeat_tolerance else 3

    def work(request):
        texts, _, _ = request
        answers = model.fill_mask(f"{texts[0]} [MASK] {texts[-1]}", truncation=True, max_length=128, top_k=top_k)
        return [(answer["token"], answer["sequence"]) for answer in answers]

    some = [request for request in requests if len(request[0][0].split()) < 50][:100]
    serial = [work(request) for request in some]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, some)) == serial

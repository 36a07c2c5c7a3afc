import numpy as np
import pytest

from gte_deploy.training.data.random import permute, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    # Random123 1.14, tests/kat_vectors, philox4x32 10
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


@pytest.mark.parametrize("size", [*range(1, 40), 100, 1_000, 4_097, 65_537])
def test_permute_visits_every_place_once(size):
    for epoch in range(3):
        places = permute(np.arange(size), size=size, epochs=epoch, key=(1, 2))
        assert np.array_equal(np.sort(places), np.arange(size))


def test_permute_reaches_every_place_from_every_position():
    # 64 x 64 cells; if all are equally likely, 4,096 * 40 draws leave none empty and the chi-square near its mean.
    size, draws = 64, 40 * 64
    counts = np.zeros((size, size), int)
    for epoch in range(draws):
        counts[np.arange(size), permute(np.arange(size), size=size, epochs=epoch, key=(7, 9))] += 1
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_permute_leaves_no_order():
    places = permute(np.arange(10_000), size=10_000, epochs=0, key=(3, 4))
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.04
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04
    assert np.mean(np.abs(np.diff(places)) == 1) < 0.002


def test_permute_handles_a_corpus_of_ten_billion_chunks():
    size = 10**10
    places = permute(np.arange(size - 2_000, size), size=size, epochs=2**33, key=(5, 6))
    assert 0 <= places.min() and places.max() < size
    assert len(np.unique(places)) == 2_000
    assert places.max() > 0.99 * size and places.min() < 0.01 * size

import json

import numpy as np
import pytest

from corpora import random_documents, write_corpus
from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.sampling import ChunkIndex, Chunking
from gte_deploy.training.data.window_order import WindowOrder

SIZES = [10, 0, 25, 1, 40, 17, 3, 31]
SHARD_OF = np.repeat(np.arange(len(SIZES)), SIZES)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 100])
def test_every_epoch_visits_every_chunk_once_window_by_window(width):
    order = WindowOrder(SIZES, width=width)
    total = sum(SIZES)
    epochs, chunks = order.samples_at(np.arange(3 * total), seed=4)
    assert epochs.tolist() == np.repeat(range(3), total).tolist()
    orders = chunks.reshape(3, total)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(total), (3, 1)))
    assert len({tuple(each) for each in orders.tolist()}) == 3
    for epoch in range(3):
        seen = 0
        while seen < total:  # window after window, each of its shards is used up and none of another is touched
            [window] = order.windows_at(epoch * total + seen, seed=4)
            shards = order.shards_of(window, seed=4)
            size = sum(SIZES[shard] for shard in shards)
            assert 1 <= len(shards) <= width
            assert set(SHARD_OF[orders[epoch, seen : seen + size]]) == set(shards)
            seen += size
        assert seen == total


def test_a_sample_alone_equals_the_same_sample_among_many():
    order = WindowOrder(np.full(1_000, 12_345), width=7)
    at = np.array([0, 86_414, 86_415, 10**9, 10**9 + 1])
    epochs, chunks = order.samples_at(at, seed=1)
    for i, index in enumerate(at.tolist()):
        assert order.samples_at(index, seed=1) == (epochs[i], chunks[i])


def test_windows_are_of_nearly_equal_size():
    order = WindowOrder([5] * 10, width=9)
    assert order.num_windows == 2
    assert [len(order.shards_of(window, seed=0)) for window in (0, 1)] == [5, 5]


def test_the_seed_and_the_epoch_choose_the_shards_of_a_window():
    order = WindowOrder([5] * 100, width=10)
    windows = [tuple(order.shards_of(window, seed=seed)) for window, seed in ((0, 1), (0, 1), (0, 2), (10, 1))]
    assert windows[0] == windows[1] and len(set(windows)) == 3


def test_samples_inside_a_window_are_shuffled():
    order = WindowOrder([1_000] * 4, width=2)
    _, chunks = order.samples_at(np.arange(2_000), seed=1)
    shards = chunks // 1_000
    assert 400 < np.count_nonzero(shards[:1_000] == shards[0]) < 600
    assert np.mean(np.diff(chunks) == 1) < 0.01


@pytest.mark.parametrize(("sizes", "width"), [([3], 0), ([], 1), ([0, 0], 1)])
def test_impossible_windows_are_refused(sizes, width):
    with pytest.raises(InputError):
        WindowOrder(sizes, width=width)


def test_a_negative_sample_is_refused():
    with pytest.raises(InputError, match="negative"):
        WindowOrder([3], width=1).samples_at(-1, seed=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two languages, of one shard and of five, whose documents have twenty chunks each."""
    folder = write_corpus(
        tmp_path_factory.mktemp("corpus") / "corpus", {f"l{i}": random_documents([200] * 30, seed=i) for i in range(6)}
    )
    index = json.loads((folder / "index.json").read_text())
    index["languages"] = ["l0", "l1"]
    for shard in index["shards"][1:]:
        shard["language"] = "l1"
    (folder / "index.json").write_text(json.dumps(index))
    return TokenCorpus.open(folder)


def test_the_samples_of_an_index_stay_in_the_windows_of_their_language(corpus):
    weights = {"l0": 1.0, "l1": 3.0}
    plain = ChunkIndex(corpus, Chunking(12, source_weights=weights), seed=5)
    index = ChunkIndex(corpus, Chunking(12, source_weights=weights), seed=5, shuffle_shards=1)
    at = np.arange(0, 65_536, 64)
    epochs, chunks = index.samples_at(at, seed=9)
    # The languages come as without windows; the n-th sample of a language is in its n-th window.
    _, other = plain.samples_at(at, seed=9)
    language = np.searchsorted(index.language_bounds, chunks, side="right") - 1
    np.testing.assert_array_equal(language, np.searchsorted(index.language_bounds, other, side="right") - 1)
    languages, ordinals = index.mixture.ordinals_at(at, seed=9)
    np.testing.assert_array_equal(language, languages)
    np.testing.assert_array_equal(epochs, ordinals // np.array([600, 3_000])[language])
    shard_of_window = {}
    for window, shard in zip((ordinals // 600)[language == 1], (chunks // 600)[language == 1], strict=True):
        assert shard_of_window.setdefault(window, shard) == shard


def test_without_weights_the_windows_are_of_all_shards(corpus):
    index = ChunkIndex(corpus, Chunking(12), seed=5, shuffle_shards=2)
    _, chunks = index.samples_at(np.arange(3_600), seed=9)
    assert sorted(chunks.tolist()) == list(range(3_600))
    assert [len(set(part)) for part in np.split(chunks // 600, 3)] == [2] * 3

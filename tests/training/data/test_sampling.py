import itertools
import json

import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.sampling import (
    ChunkIndex,
    Chunking,
    LanguageMixture,
    Resampling,
    samples_at,
    survey,
    token_shares,
)


def test_samples_visit_each_chunk_once_per_epoch():
    epochs, chunks = samples_at(np.arange(5 * 37), num_chunks=37, seed=11)
    assert epochs.tolist() == [i // 37 for i in range(5 * 37)]
    orders = chunks.reshape(5, 37)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(37), (5, 1)))
    assert len({tuple(order) for order in orders.tolist()}) == 5


def test_a_sample_alone_equals_the_same_sample_among_many():
    epochs, chunks = samples_at(np.arange(10**12, 10**12 + 50), num_chunks=1_234_567, seed=3)
    for i in (0, 17, 49):
        assert samples_at(10**12 + i, num_chunks=1_234_567, seed=3) == (epochs[i], chunks[i])


def test_the_seed_changes_the_order():
    first, second = (samples_at(np.arange(100), num_chunks=100, seed=seed)[1] for seed in (0, 2**32))
    assert np.mean(first == second) < 0.1


@pytest.mark.parametrize("arguments", [(-1, 5, 0), (0, 0, 0), (0, 5, -1), (0, 5, 2**64)])
def test_impossible_samples_are_refused(arguments):
    index, num_chunks, seed = arguments
    with pytest.raises(InputError):
        samples_at(index, num_chunks=num_chunks, seed=seed)


# --- chunks ---------------------------------------------------------------------------------------------------------


def write_corpus(folder, lengths_by_language):
    """Documents of random ordinary ids, by hand: one shard per language, vocabulary 256, special ids 0 … 4."""
    folder.mkdir()
    rng, shards = np.random.default_rng(0), []
    for language, lengths in lengths_by_language.items():
        name, tokens = f"shard-{len(shards)}", int(np.sum(lengths))
        (folder / f"{name}.tokens").write_bytes(rng.integers(5, 256, tokens).astype("<u2").tobytes())
        (folder / f"{name}.offsets").write_bytes(np.cumsum([0, *lengths]).astype("<i8").tobytes())
        shard = {"name": name, "language": language, "documents": len(lengths), "tokens": tokens}
        shards.append({**shard, "tokens_sha256": "", "offsets_sha256": ""})
    vocabulary: dict = {"size": 256, "pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    index = {"format": "gte-token-corpus", "version": 1, "languages": list(lengths_by_language), "shards": shards}
    vocabulary["special_ids"] = [0, 1, 2, 3, 4]
    (folder / "index.json").write_text(json.dumps({**index, "vocabulary": vocabulary}))


@pytest.fixture
def make_index(tmp_path):
    folders = (tmp_path / f"corpus{i}" for i in itertools.count())

    def make(lengths, *, max_length=12, seed=5, **options):
        folder = next(folders)
        write_corpus(folder, lengths if isinstance(lengths, dict) else {"": lengths})
        return ChunkIndex(TokenCorpus.open(folder), Chunking(max_length, **options), seed=seed)

    return make


def test_documents_are_cut_and_never_joined(make_index):
    index = make_index([25, 3, 10, 11, 1])
    assert index.lengths.tolist() == [12, 12, 7, 5, 12, 12, 3, 3]
    for document, parts in {0: [0, 1, 2], 1: [3], 2: [4], 3: [5, 6], 4: [7]}.items():
        chunks = [index.chunk(i) for i in parts]
        assert all(chunk[0] == 2 and chunk[-1] == 3 for chunk in chunks)
        body = np.concatenate([chunk[1:-1] for chunk in chunks])
        np.testing.assert_array_equal(body, index.corpus.tokens(document, 0, int(index.corpus.lengths[document])))


def test_chunks_end_to_end_equal_single_ones(make_index):
    index = make_index([25, 3, 10, 11, 1])
    picked = np.array([7, 0, 0, 5])
    token_ids, ends = index.chunks(picked)
    for i, chunk in enumerate(picked):
        np.testing.assert_array_equal(token_ids[ends[i] : ends[i + 1]], index.chunk(int(chunk)))


def test_resampling_drops_short_chunks_at_the_rate(make_index):
    lengths = np.tile([4, 25], 20_000)  # chunks of 6 tokens, and 12, 12, 7
    index = make_index(lengths, resampling=Resampling(short_threshold=7, keep_prob=0.3))
    kept = np.bincount(index.lengths, minlength=13)
    assert (kept[12], kept[7]) == (40_000, 20_000)
    assert abs(kept[6] / 20_000 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 20_000)
    assert index.num_chunks == kept.sum()


def test_resampling_finds_the_right_documents(make_index):
    index = make_index([25, 3, 10, 11, 1] * 20, resampling=Resampling(short_threshold=12, keep_prob=0.5))
    documents, starts, lengths = index.locate(np.arange(index.num_chunks))
    # A full chunk always stays; of a document's chunks the last alone may be missing.
    full = [(d, s) for d, s, n in zip(documents.tolist(), starts.tolist(), lengths.tolist(), strict=True) if n == 10]
    assert full == [(d, s) for d in range(100) for s in {0: (0, 10), 2: (0,), 3: (0,)}.get(d % 5, ())]
    assert np.all(starts % 10 == 0) and np.all(starts < index.corpus.lengths[documents])
    assert 100 * 4 / 5 < index.num_chunks < 100 * 8 / 5


def test_resampling_is_a_function_of_the_seed(make_index):
    options = {"resampling": Resampling(short_threshold=12, keep_prob=0.5)}
    picks = [make_index([3] * 200, seed=seed, **options).locate(np.arange(50))[0].tolist() for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]


def test_keep_prob_bounds(make_index):
    assert make_index([3, 25], resampling=Resampling(12, 0.0)).num_chunks == 2
    assert make_index([3, 25], resampling=Resampling(12, 1.0)).num_chunks == 4
    with pytest.raises(InputError, match="no chunk"):
        make_index([3, 4], resampling=Resampling(12, 0.0))


def test_the_index_does_not_depend_on_the_block_size(make_index, monkeypatch):
    options = {"resampling": Resampling(short_threshold=12, keep_prob=0.5)}
    whole = make_index([25, 3, 10, 11, 1] * 20, **options)
    monkeypatch.setattr("gte_deploy.training.data.sampling.DOCUMENT_BLOCK", 64)
    blocked = make_index([25, 3, 10, 11, 1] * 20, **options)
    assert np.array_equal(whole.lengths, blocked.lengths)
    assert survey(whole.corpus, whole.chunking, seed=5) == survey(blocked.corpus, blocked.chunking, seed=5)


def test_a_survey_tells_what_a_stage_will_see(make_index):
    resampling = Resampling(short_threshold=7, keep_prob=0.3)
    index = make_index([4, 25] * 1_000, resampling=resampling, max_length=20)
    found = survey(index.corpus, index.chunking, seed=5)
    assert sum(found.before.sequences) == 3_000
    assert sum(found.before.tokens) == 29_000 + 2 * 3_000
    assert sum(found.after.sequences) == index.num_chunks
    lengths = index.lengths
    assert sum(found.after.tokens) == lengths.sum()
    assert (found.cut.mean, found.cut.full) == (35_000 / 3_000, 1_000 / 3_000)
    assert found.sampled.mean == pytest.approx(lengths.mean())
    assert found.sampled.mean_square == pytest.approx((lengths.astype(float) ** 2).mean())
    assert found.sampled.full == pytest.approx((lengths == 20).mean())
    assert found.sampled.late == pytest.approx(np.maximum(lengths - 5, 0).sum() / lengths.sum())
    assert found.passes(2 * index.num_chunks) == pytest.approx(2)
    text = str(found)
    assert "before resampling" in text and "after resampling" in text
    assert "all chunks: 12 tokens on average, 33.3% full, " in text and "of the tokens beyond 5" in text


def test_a_survey_of_languages_is_that_of_the_samples(make_index):
    index = make_index({"en": [25] * 300, "sw": [5] * 120}, source_weights={"en": 3.0, "sw": 1.0})
    found = survey(index.corpus, index.chunking, seed=5)
    _, chunks = index.samples_at(np.arange(65_536), seed=9)
    lengths = index.lengths_of(chunks)
    assert found.sampled.mean == pytest.approx(lengths.mean(), rel=1e-3)
    assert found.sampled.mean_square == pytest.approx((lengths.astype(float) ** 2).mean(), rel=1e-3)
    english, swahili = found.languages
    assert (english.share, swahili.share) == pytest.approx((0.75, 0.25))
    assert english.corpus_share == pytest.approx(7_500 / 8_100)
    languages = index.corpus.language_of[index.locate(chunks)[0]]
    assert swahili.draw == pytest.approx(languages.mean(), rel=1e-3)
    assert found.passes(65_536) == pytest.approx(languages.sum() / 120, rel=1e-3)
    assert "sw: 7.41% of the corpus's tokens, 25.00% of the stage's, 120 chunks" in str(found)


def test_one_histogram_is_shown_where_no_chunk_is_dropped(make_index):
    index = make_index([4, 25] * 10)
    shown = str(survey(index.corpus, index.chunking, seed=5))
    assert shown.count("sequences   share") == 1 and "resampling" not in shown


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 2},
        {"resampling": Resampling(13, 0.5)},
        {"language_exponent": 1.5},
        {"language_exponent": 0.5, "source_weights": {"": 1.0}},
        {"source_weights": {"": 0.0}},
        {"source_weights": {"": -1.0}},
        {"source_weights": {"": float("nan")}},
        {"source_weights": {"en": 1.0}},
    ],
    ids=str,
)
def test_impossible_indexes_are_refused(make_index, options):
    with pytest.raises(InputError):
        make_index([3, 25], **options)


@pytest.mark.parametrize("arguments", [(-1, 1.0), (0, -0.1), (0, 1.1)])
def test_impossible_resampling_is_refused(arguments):
    with pytest.raises(InputError):
        Resampling(*arguments)


@pytest.mark.parametrize("chunk", [-1, 2])
def test_a_chunk_that_is_not_there_is_refused(make_index, chunk):
    with pytest.raises(InputError, match="not in 0..1"):
        make_index([3, 4]).chunk(chunk)


# --- languages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_shares_follow_the_exponent(exponent):
    tokens = np.array([90_000, 9_000, 0, 1_000])
    expected = np.where(tokens > 0, (tokens / tokens.sum()) ** exponent, 0)
    np.testing.assert_allclose(token_shares(tokens, exponent=exponent), expected / expected.sum())


def test_chunks_are_drawn_by_weight():
    sizes, weights = np.array([90_000, 9_000, 0, 1_000]), np.array([0.6, 0.3, 0.2, 0.1])
    mixture = LanguageMixture(sizes, weights)
    np.testing.assert_allclose(mixture.probabilities, [0.6, 0.3, 0, 0.1], atol=4 / 65_536)
    assert mixture.quota.sum() == 65_536

    _, chunks = mixture.samples_at(np.arange(3 * 65_536), seed=1)
    languages = np.searchsorted(np.cumsum(sizes), chunks, side="right")
    assert np.bincount(languages, minlength=4).tolist() == (3 * mixture.quota).tolist()
    # A short run has the shares as well: they are not laid out language by language.
    early = np.bincount(languages[:4_000], minlength=4) / 4_000
    np.testing.assert_allclose(early, mixture.probabilities, atol=0.04)


@pytest.mark.parametrize("max_length", [12, 60, 600])
@pytest.mark.parametrize("resampling", [Resampling(), Resampling(12, 0.5)], ids=["all", "resampled"])
def test_shares_are_of_tokens_whatever_the_length(make_index, max_length, resampling):
    # As many tokens in each of "en" and "de", in documents of other lengths, and a quarter of them in "fr".
    lengths = {"en": [400] * 100, "de": [40] * 1_000, "fr": [100] * 100}
    index = make_index(lengths, max_length=max_length, resampling=resampling, language_exponent=0.5)
    _, chunks = index.samples_at(np.arange(65_536), seed=9)
    languages = index.corpus.language_of[index.locate(chunks)[0]]
    tokens = np.bincount(languages, weights=index.lengths_of(chunks))
    np.testing.assert_allclose(tokens / tokens.sum(), [0.4, 0.4, 0.2], atol=2e-3)


def test_a_weight_of_a_source_without_chunks_is_refused(make_index):
    resampling = Resampling(12, 0.0)
    with pytest.raises(InputError, match="no chunk of 'sw' is left"):
        make_index({"en": [25], "sw": [5]}, resampling=resampling, source_weights={"en": 1.0, "sw": 1.0})
    index = make_index({"en": [25], "sw": [5]}, resampling=resampling, source_weights={"en": 1.0, "sw": 0.0})
    assert index.mixture is not None and index.mixture.probabilities.tolist() == [1.0, 0.0]


def test_a_language_goes_through_its_own_epochs():
    sizes = np.array([50, 7])
    mixture = LanguageMixture(sizes, np.sqrt(sizes))
    epochs, chunks = mixture.samples_at(np.arange(100_000), seed=2)
    for first, size in ((0, 50), (50, 7)):
        here = (chunks >= first) & (chunks < first + size)
        # within a block the places are permuted, so the epoch may go back, but each is visited exactly once
        pairs = np.unique(epochs[here] * 1_000 + chunks[here])
        assert len(pairs) == here.sum()


def test_every_language_is_drawn_however_rare():
    mixture = LanguageMixture([10**12, 1], [1e12, 1.0])
    assert mixture.quota.tolist() == [65_535, 1]


def test_mixture_of_an_index_keeps_languages_apart(make_index):
    index = make_index({"en": [25] * 300, "sw": [5] * 12}, language_exponent=0.0)
    epochs, chunks = index.samples_at(np.arange(65_536), seed=9)
    languages = index.corpus.language_of[index.locate(chunks)[0]]
    # The chunks of 12 and 7 tokens of "en" have 31 / 3 on average, those of "sw" 7; each gets half of the tokens.
    assert np.bincount(languages)[0] / 65_536 == pytest.approx(7 / (7 + 31 / 3), abs=1e-4)
    assert epochs.max() == (np.bincount(languages)[1] - 1) // 12
    again = index.samples_at(np.arange(100, 110), seed=9)
    assert np.array_equal(again[1], chunks[100:110]) and np.array_equal(again[0], epochs[100:110])


def test_without_an_exponent_all_chunks_are_alike(make_index):
    index = make_index({"en": [25] * 30, "sw": [5] * 10})
    _, chunks = index.samples_at(np.arange(index.num_chunks), seed=9)
    assert np.array_equal(np.sort(chunks), np.arange(100))

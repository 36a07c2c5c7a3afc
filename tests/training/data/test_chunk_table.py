import logging
import tracemalloc

import numpy as np
import pytest

from corpora import random_documents, write_corpus, write_empty_corpus
from gte_deploy.core.errors import InputError
from gte_deploy.training.data import sampling
from gte_deploy.training.data.chunk_table import pack_bits, read_table, unpack_bits
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.random import STREAM_RESAMPLE, philox4x32, stream_key
from gte_deploy.training.data.sampling import ChunkIndex, Chunking, Resampling, open_chunk_table

CHUNKING = Chunking(12, Resampling(short_threshold=8, keep_prob=0.4))
SEED = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three shards of 300, 64 and 1 documents: whole blocks, a part of one, and a single document."""
    rng = np.random.default_rng(1)
    texts = {name: random_documents(rng.integers(1, 60, count)) for name, count in (("a", 300), ("b", 64), ("c", 1))}
    return TokenCorpus.open(write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", texts))


def all_chunks(corpus, chunking, seed):
    """The document, start and length of each chunk, one document after the other, in plain Python."""
    key, number, found = stream_key(seed, STREAM_RESAMPLE), 0, []
    for document, length in enumerate(corpus.lengths.tolist()):
        for start in range(0, length, chunking.body):
            size = min(chunking.body, length - start)
            lucky = int(philox4x32((number, 0, 0, 0), key)[0]) < chunking.resampling.keep_prob * 2**32
            if size + 2 >= chunking.resampling.short_threshold or lucky:
                found.append((document, start, size))
            number += 1
    return found


@pytest.mark.parametrize(
    "chunking", [CHUNKING, Chunking(7), Chunking(12, Resampling(12, 0.0))], ids=["resampled", "all", "full ones"]
)
def test_each_chunk_is_where_a_plain_loop_finds_it(corpus, chunking):
    index = ChunkIndex(corpus, chunking, seed=SEED)
    expected = all_chunks(corpus, chunking, SEED)
    assert index.num_chunks == len(expected)
    places = np.stack(index.locate(np.arange(index.num_chunks)), axis=1)
    assert places.tolist() == [list(chunk) for chunk in expected]
    picked = np.random.default_rng(0).integers(0, index.num_chunks, 500)
    np.testing.assert_array_equal(np.stack(index.locate(picked), axis=1), places[picked])
    assert [len(part) for part in index.locate(np.array([], dtype=np.int64))] == [0, 0, 0]


def test_many_chunks_are_located_in_parts(corpus, monkeypatch):
    index = ChunkIndex(corpus, CHUNKING, seed=SEED)
    whole = index.lengths
    monkeypatch.setattr(sampling, "_LOCATED_AT_ONCE", 100)
    np.testing.assert_array_equal(index.lengths, whole)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_bits_are_packed_by_document(count):
    keeps = np.random.default_rng(count).random(count) < 0.5
    packed = pack_bits(keeps)
    assert [bool(int(packed[i // 64]) >> (i % 64) & 1) for i in range(count)] == keeps.tolist()
    np.testing.assert_array_equal(unpack_bits(packed).reshape(-1)[:count], keeps)


def open_table(corpus, folder, *, write=True, seed=SEED):
    return open_chunk_table(corpus, CHUNKING, seed=seed, folder=folder, write=write)


def test_a_table_is_made_once_and_then_mapped(corpus, tmp_path, monkeypatch):
    assert open_table(corpus, tmp_path, write=False) is None
    made = open_table(corpus, tmp_path)
    monkeypatch.setattr(sampling, "build_chunk_table", None)
    for write in (True, False):
        table = open_table(corpus, tmp_path, write=write)
        assert isinstance(table.first_chunk, np.memmap) and isinstance(table.keeps, np.memmap)
        np.testing.assert_array_equal(table.first_chunk, made.first_chunk)
        np.testing.assert_array_equal(table.tokens, made.tokens)
        index = ChunkIndex(corpus, CHUNKING, seed=SEED, table=table)
        assert list(zip(*(part.tolist() for part in index.locate(np.arange(index.num_chunks))), strict=True)) == (
            all_chunks(corpus, CHUNKING, SEED)
        )


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(next(folder.glob("*.npy"))),
    "cut": lambda folder: next(folder.glob("*.npy")).write_bytes(b"\x93NUMPY"),
    "empty": lambda folder: next(folder.glob("*.npy")).write_bytes(b""),
    "no sha256": lambda folder: next(folder.glob("*.json")).write_text("{}"),
    "no JSON": lambda folder: next(folder.glob("*.json")).write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_made_again(corpus, tmp_path, caplog, name):
    before = np.array(open_table(corpus, tmp_path).keeps)
    DAMAGE[name](tmp_path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(open_table(corpus, tmp_path).keeps, before)
    assert "it is made again" in caplog.text
    assert open_table(corpus, tmp_path, write=False) is not None


@pytest.mark.parametrize("name", ["cut", "empty", "no JSON"])
def test_a_rank_that_only_maps_refuses_a_damaged_table(corpus, tmp_path, name):
    open_table(corpus, tmp_path)
    DAMAGE[name](tmp_path)
    with pytest.raises(InputError, match="remove|Remove"):
        open_table(corpus, tmp_path, write=False)


def test_a_table_that_a_kill_left_half_written_is_made_again(corpus, tmp_path):
    open_table(corpus, tmp_path)
    next(tmp_path.glob("*.json")).unlink()
    assert open_table(corpus, tmp_path, write=False) is None
    (tmp_path / ".chunks-0.npy.abc.tmp").write_bytes(b"half")
    assert open_table(corpus, tmp_path) is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_another_seed_corpus_or_length_has_another_table_and_the_old_one_goes(corpus, tmp_path):
    open_table(corpus, tmp_path)
    open_table(corpus, tmp_path, seed=6)
    assert open_table(corpus, tmp_path, write=False) is None
    assert len(list(tmp_path.iterdir())) == 2
    other = TokenCorpus.open(write_corpus(tmp_path / "other", random_documents([20] * 9)))
    folder = tmp_path / "tables"
    open_table(other, folder)
    assert open_table(corpus, folder, write=False) is None
    assert open_chunk_table(other, Chunking(13), seed=SEED, folder=folder, write=False) is None
    assert read_table(folder, "0" * 16, verify=True) is None


def test_an_index_over_a_mapped_table_takes_no_memory_for_its_documents(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 900, 1_000_000)
    corpus = TokenCorpus.open(write_empty_corpus(tmp_path / "corpus", lengths))
    table = open_chunk_table(corpus, CHUNKING, seed=SEED, folder=tmp_path, write=True)
    assert sum(file.stat().st_size for file in tmp_path.glob("chunks-*")) < 0.26 * len(lengths)
    tracemalloc.start()
    try:
        index = ChunkIndex(corpus, CHUNKING, seed=SEED, table=table)
        index.locate(np.arange(0, index.num_chunks, index.num_chunks // 100))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # a byte for each document

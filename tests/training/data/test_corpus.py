import json

import numpy as np
import pytest

from corpora import random_documents, write_corpus
from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import (
    LengthHistogram,
    TokenCorpus,
    Vocabulary,
    describe_corpus,
    document_histogram,
)

LENGTHS = {"en": (3, 20, 700), "": (1, 40), "de": (5,)}


@pytest.fixture
def documents():
    return {name: random_documents(lengths, seed=i) for i, (name, lengths) in enumerate(LENGTHS.items())}


@pytest.fixture
def folder(tmp_path, documents):
    return write_corpus(tmp_path / "corpus", documents)


def test_every_token_is_where_it_was_put(folder, documents):
    corpus = TokenCorpus.open(folder, verify=True)
    flat = [document for texts in documents.values() for document in texts]
    assert (corpus.num_documents, corpus.num_tokens) == (6, 769)
    assert corpus.lengths.tolist() == [3, 20, 700, 1, 40, 5]
    for i, document in enumerate(flat):
        np.testing.assert_array_equal(corpus.tokens(i, 0, len(document)), document)
    np.testing.assert_array_equal(corpus.tokens(2, 100, 250), flat[2][100:250])
    assert corpus.tokens(0, 0, 3).dtype == np.uint16


def test_languages_are_known_per_document(folder):
    corpus = TokenCorpus.open(folder)
    assert corpus.languages == ("en", "", "de")
    assert corpus.language_of.tolist() == [0, 0, 0, 1, 1, 2]
    assert corpus.language_bounds.tolist() == [0, 3, 5, 6]


def test_copied_tokens_equal_those_of_tokens(folder):
    corpus = TokenCorpus.open(folder)
    out = np.full(200, -1, dtype=np.int64)
    pieces = [(2, 600, 90), (5, 1, 4), (0, 0, 3)]
    documents, starts, lengths = (np.array(column) for column in zip(*pieces, strict=True))
    corpus.copy_tokens(documents, starts, lengths, out=out, at=np.array([10, 0, 150]))
    for (document, start, length), at in zip(pieces, (10, 0, 150), strict=True):
        np.testing.assert_array_equal(out[at : at + length], corpus.tokens(document, start, start + length))
    assert np.count_nonzero(out == -1) == 200 - 97


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (6, 0, 1), (0, 0, 4), (0, 2, 1), (0, -1, 1)])
def test_a_range_that_is_not_there_is_refused(folder, arguments):
    with pytest.raises(InputError, match="not in"):
        TokenCorpus.open(folder).tokens(*arguments)


def test_large_vocabularies_take_uint32(tmp_path):
    documents = random_documents([50, 60], vocab_size=250_002)
    corpus = TokenCorpus.open(write_corpus(tmp_path / "xlm", {"": documents}, vocab_size=250_002), verify=True)
    assert corpus.tokens(1, 0, 60).dtype == np.uint32
    np.testing.assert_array_equal(corpus.tokens(1, 0, 60), documents[1])


@pytest.mark.parametrize(
    ("size", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)], ids=["largest uint16", "smallest uint32"]
)
def test_dtype_follows_the_vocabulary(size, dtype):
    assert Vocabulary(size, 2, 3, 4, 0, 1, (0, 1, 2, 3, 4)).dtype == dtype


def test_ordinary_ids_leave_special_ones_and_holes_out():
    vocab = Vocabulary(10, 2, 3, 4, 0, 1, (0, 1, 2, 3, 4, 7))
    assert vocab.ordinary_ids.tolist() == [5, 6, 8, 9]


@pytest.mark.parametrize(
    "special_ids", [(0, 1, 2, 3), (0, 1, 2, 3, 4, 10), tuple(range(10))], ids=["mask missing", "outside", "all special"]
)
def test_an_impossible_vocabulary_is_refused(special_ids):
    with pytest.raises(InputError):
        Vocabulary(10, 2, 3, 4, 0, 1, special_ids)


# --- damaged folders ------------------------------------------------------------------------------------------------


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def cut(folder):
    path = folder / "shard-00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])


def write_offsets(folder, offsets):
    (folder / "shard-00000.offsets").write_bytes(np.array(offsets, dtype="<i8").tobytes())


DAMAGE = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "no index.json"),
    "no JSON": (lambda folder: (folder / "index.json").write_text("{"), "not valid JSON.*prepare` again"),
    "a list": (lambda folder: (folder / "index.json").write_text("[]"), "must hold a JSON object"),
    "another format": (lambda folder: edit_index(folder, lambda i: i.pop("format")), "no index of a token corpus"),
    "another version": (lambda folder: edit_index(folder, lambda i: i.update(version=2)), "format version 2"),
    "no shards": (lambda folder: edit_index(folder, lambda i: i.pop("shards")), "damaged"),
    "shard language unknown": (lambda folder: edit_index(folder, lambda i: i.update(languages=["en"])), "damaged"),
    "path outside": (
        lambda folder: edit_index(folder, lambda i: i["shards"][0].update(name="../x")),
        "plain file name",
    ),
    "tokens missing": (lambda folder: (folder / "shard-00001.tokens").unlink(), "is missing"),
    "tokens cut": (cut, "has 1444 bytes, expected 1446"),
    "offsets descend": (lambda folder: write_offsets(folder, [0, 23, 20, 723]), "ascending"),
    "offsets stand still": (lambda folder: write_offsets(folder, [0, 3, 3, 723]), "ascending"),
    "offsets below 0": (lambda folder: write_offsets(folder, [0, -1, 23, 723]), "ascending"),
    "offsets beyond the tokens": (lambda folder: write_offsets(folder, [0, 3, 900, 723]), "ascending"),
    "offsets do not begin at 0": (lambda folder: write_offsets(folder, [1, 3, 23, 723]), "ascending"),
    "offsets end early": (lambda folder: write_offsets(folder, [0, 3, 23, 722]), "ascending"),
    "empty": (lambda folder: edit_index(folder, lambda i: i.update(shards=[])), "holds no document"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(InputError, match=message):
        TokenCorpus.open(folder)


@pytest.mark.parametrize("file", ["shard-00000.tokens", "shard-00000.offsets"])
def test_verify_finds_one_flipped_bit(folder, file):
    path = folder / file
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="sha256"):
        TokenCorpus.open(folder, verify=True)


def test_verify_finds_an_id_outside_the_vocabulary(tmp_path):
    folder = write_corpus(tmp_path / "corpus", {"": [np.array([5, 300])]})
    TokenCorpus.open(folder)
    with pytest.raises(InputError, match="id 300, outside the vocabulary of 256"):
        TokenCorpus.open(folder, verify=True)


# --- histograms -----------------------------------------------------------------------------------------------------


def test_histogram_counts_in_powers_of_two():
    histogram = LengthHistogram.of([np.array([1, 15, 16]), np.array([31, 32, 100])])
    assert histogram.edges == (0, 16, 32, 64, 128)
    assert histogram.sequences == (2, 2, 1, 1)
    assert histogram.tokens == (16, 47, 32, 100)


def test_histogram_of_nothing_prints():
    assert "0 sequences" in str(LengthHistogram.of([]))


def test_description_names_sizes_and_languages(folder):
    corpus = TokenCorpus.open(folder)
    text = describe_corpus(corpus)
    assert "6 documents, 769 tokens" in text and "vocabulary 256" in text
    assert "en: 3 documents, 723 tokens (94.02%)" in text
    assert "(none): 2 documents, 41 tokens" in text
    assert document_histogram(corpus, "de").sequences == (1,)
    assert sum(document_histogram(corpus).tokens) == 769

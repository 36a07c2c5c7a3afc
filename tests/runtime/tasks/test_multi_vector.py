"""encode_multi_vector and maxsim: against sentence-transformers' MultiVectorEncoder and its MaxSim."""

import string

import numpy as np
import pytest

import gte_deploy
from gte_deploy.tasks.multi_vector import maxsim

QUERIES = ["the king, and the queen?", "a"]
DOCUMENTS = [
    "Paris is the capital of France.",
    "the old man (and the sea) walked!",
    "water",
    "the king isn't old. " * 9,
]
WIDTH, SIZE = 16, 32
TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def projection():
    return np.random.default_rng(0).normal(size=(WIDTH, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def judge(word_checkpoints, projection):
    """The same checkpoint as a MultiVectorEncoder, with that projection and without punctuation in documents."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")
    torch = pytest.importorskip("torch")
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    dense = Dense(SIZE, WIDTH, bias=False, activation_function=torch.nn.Identity(), **names)
    dense.linear.weight = torch.nn.Parameter(torch.from_numpy(projection))
    modules = [
        Transformer(str(word_checkpoints["embed"])),
        dense,
        Normalize(module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=list(string.punctuation)),
    ]
    prompts = {"query": "the query: ", "document": "the passage: "}
    return sentence_transformers.MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")


@pytest.fixture(scope="module")
def model(word_checkpoints):
    with gte_deploy.load(word_checkpoints["embed"], backend="torch") as opened:
        yield opened


def test_as_the_multi_vector_encoder(model, judge, projection):
    queries = model.encode_multi_vector(QUERIES, "query", projection=projection, batch_size=1)
    options = {"projection": projection, "skip_words": list(string.punctuation)}
    documents = model.encode_multi_vector(DOCUMENTS, prompt="the passage: ", **options)
    for found, expected in ((queries, judge.encode_query(QUERIES)), (documents, judge.encode_document(DOCUMENTS))):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)
    wanted = judge.similarity(judge.encode_query(QUERIES), judge.encode_document(DOCUMENTS))
    np.testing.assert_allclose(maxsim(queries, documents), wanted.numpy(), rtol=0, atol=1e-4)


def test_one_text_and_the_options(model, projection):
    torch = pytest.importorskip("torch")
    text = "the king, and the queen?"
    states = model.encode(text, output_value="token_embeddings")
    np.testing.assert_array_equal(model.encode_multi_vector(text, normalize_embeddings=False), states)
    found = model.encode_multi_vector(text)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert len(found) == len(states) and len(model.encode_multi_vector(text, skip_words=[",", "?", "nowhere"])) + 2 == (
        len(states)
    )
    by_tensor = model.encode_multi_vector(text, projection=torch.from_numpy(projection))
    np.testing.assert_array_equal(by_tensor, model.encode_multi_vector(text, projection=projection))
    assert len(model.encode_multi_vector(text, truncation=True, max_length=4)) == 4
    with pytest.raises(gte_deploy.InputError, match=r"projection must be a matrix \[D, 32\]"):
        model.encode_multi_vector(text, projection=projection.T)
    with pytest.raises(gte_deploy.InputError, match="has no option pooling; it has batch_size"):
        model.encode_multi_vector(text, pooling="cls")


def test_maxsim_of_ragged_lists_and_what_is_refused():
    torch = pytest.importorskip("torch")
    pytest.importorskip("sentence_transformers", minversion="6.2")  # older ones have no MaxSim to compare with
    from sentence_transformers.util import similarity

    random = np.random.default_rng(1)
    queries, documents = (
        [random.normal(size=(tokens, 4)).astype(np.float32) for tokens in lengths] for lengths in ((3, 1), (5, 2, 9))
    )
    wanted = similarity.maxsim(*([torch.from_numpy(each) for each in side] for side in (queries, documents)))
    np.testing.assert_allclose(maxsim(queries, documents), wanted.numpy(), rtol=0, atol=1e-5)
    assert maxsim(queries, [np.zeros((0, 4), np.float32)]).tolist() == [[0.0], [0.0]]
    with pytest.raises(gte_deploy.InputError, match="the widths 3, 4"):
        maxsim(queries, [np.zeros((2, 3), np.float32)])
    with pytest.raises(gte_deploy.InputError, match="two lists of arrays"):
        maxsim(queries[0], documents)

"""similarity and similarity_pairwise: against sentence-transformers, for arrays, tensors and sparse embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import SIMILARITIES
from gte_deploy.tasks.similarity import similarity_matrix, similarity_of_pairs, sparsity_of
from gte_deploy.tasks.sparse import as_tensors, sparsify

# float32 sums of up to 64 products in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
SIZE = 64


@pytest.fixture(scope="module")
def library():
    """sentence-transformers' functions by name: (matrix, pairs)."""
    function = pytest.importorskip("sentence_transformers").SimilarityFunction
    return {name: (function.to_similarity_fn(name), function.to_similarity_pairwise_fn(name)) for name in SIMILARITIES}


def dense(count, seed, dtype=np.float32):
    found = np.random.default_rng(seed).normal(size=(count, SIZE)).astype(dtype)
    found[0] = 0  # has no direction
    return found


def sparse(count, seed):
    values = np.abs(dense(count, seed))
    values[values < 1] = 0
    values[-1, :] = dense(2, 99)[1]  # negative entries, too, and more of them
    return [sparsify(row) for row in values]


def rows(embeddings):
    return np.stack([each.to_dense() for each in embeddings])


@pytest.mark.parametrize("name", SIMILARITIES)
def test_arrays_as_in_sentence_transformers(name, library):
    a, b = dense(5, 1), dense(7, 2)
    b[3] = a[2]  # a distance of exactly 0
    matrix, pairs = library[name]
    for left, right in [(a, b), (a.tolist(), list(b)), (a[1], b), (a, b[1]), (a.astype(np.float64), b)]:
        found = similarity_matrix(left, right, name)
        assert isinstance(found, np.ndarray)
        expected = matrix(np.asarray(left, np.float32), np.asarray(right)).numpy()
        np.testing.assert_allclose(found, expected, **TOLERANCE)
    np.testing.assert_allclose(similarity_of_pairs(a, b[:5], name), pairs(a, b[:5]).numpy(), **TOLERANCE)
    assert similarity_of_pairs(a[1], b[1], name) == pytest.approx(pairs(a[1], b[1]).item(), rel=1e-5)
    assert similarity_matrix(a, b, name).dtype == np.float32


@pytest.mark.parametrize("name", SIMILARITIES)
def test_tensors_give_tensors(name, library):
    torch = pytest.importorskip("torch")
    a, b = torch.from_numpy(dense(4, 1)), torch.from_numpy(dense(4, 2))
    matrix, pairs = library[name]
    for left, right in [(a, b), (a, b.numpy()), (a.numpy(), list(b)), (a.half(), b.bfloat16()), (a.double(), b)]:
        found = similarity_matrix(left, right, name)
        assert isinstance(found, torch.Tensor)
        expected = matrix(*(x.to(torch.float32) if isinstance(x, torch.Tensor) else x for x in (left, right)))
        np.testing.assert_allclose(found.float().numpy(), expected.float().numpy(), **TOLERANCE)
    torch.testing.assert_close(similarity_of_pairs(a, b, name), pairs(a, b), rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*scipy.*")
@pytest.mark.parametrize("name", SIMILARITIES)
def test_sparse_embeddings_as_in_sentence_transformers(name, library):
    torch = pytest.importorskip("torch")
    a, b = sparse(4, 3), sparse(6, 4)
    b[2] = a[1]
    tensors = [as_tensors(each, sparse=True) for each in (a, b)]
    matrix, pairs = library[name]
    expected = matrix(*tensors).numpy()
    for left, right in [(a, b), (a, rows(b)), (rows(a), b), (tuple(a), b)]:
        np.testing.assert_allclose(similarity_matrix(left, right, name), expected, **TOLERANCE)
    for left, right in [tensors, (list(tensors[0]), tensors[1]), (tensors[0], tensors[1].to_dense())]:
        found = similarity_matrix(left, right, name)
        assert isinstance(found, torch.Tensor)
        np.testing.assert_allclose(found.numpy(), expected, **TOLERANCE)
    np.testing.assert_allclose(similarity_matrix(a[1], b, name), expected[1:2], **TOLERANCE)
    wanted = pairs(*(as_tensors(each, sparse=True) for each in (a, b[:4]))).numpy()
    np.testing.assert_allclose(similarity_of_pairs(a, b[:4], name), wanted, **TOLERANCE)


def test_sparse_embeddings_without_any_entry():
    empty = sparsify(np.zeros(SIZE, np.float32))
    for name in SIMILARITIES:
        expected = similarity_matrix(np.zeros((2, SIZE)), dense(3, 1), name)
        np.testing.assert_allclose(similarity_matrix([empty, empty], dense(3, 1), name), expected, **TOLERANCE)
        assert similarity_of_pairs([empty], [empty], name) == 0


def test_sparsity_as_in_sentence_transformers():
    encoder = pytest.importorskip("sentence_transformers").SparseEncoder
    embeddings = sparse(5, 3)
    expected = encoder.sparsity(as_tensors(embeddings, sparse=True))
    for given in (embeddings, as_tensors(embeddings, sparse=True), as_tensors(embeddings, sparse=False)):
        assert sparsity_of(given) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "3 and of 4 dimensions"),
        (np.ones((2, 3, 4)), np.ones((2, 4)), r"shape \(2, 3, 4\)"),
        (["a text"], ["another"], "must be an array"),
        ([[1.0, 2.0], [1.0]], [[1.0, 2.0]], "must be an array"),
        ([], [[1.0]], "must be an array"),
        ([{"paris": 1.0}], [{"paris": 1.0}], "must be an array"),
    ],
)
def test_what_is_no_embedding_is_refused(left, right, message):
    with pytest.raises(InputError, match=message):
        similarity_matrix(left, right, "cosine")


def test_pairs_need_equally_many():
    with pytest.raises(InputError, match="equally many"):
        similarity_of_pairs(dense(2, 1), dense(3, 1), "dot")
    with pytest.raises(InputError, match="equally many"):
        similarity_of_pairs(sparse(2, 1), sparse(3, 1), "dot")

"""Pooling, normalising and quantising against torch and sentence-transformers."""

import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.tasks.pooling import l2_normalize, pool, quantize


@pytest.fixture
def embeddings():
    return np.random.default_rng(0).standard_normal((12, 20)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantize_is_sentence_transformers(embeddings, precision):
    from sentence_transformers.util.quantization import quantize_embeddings

    embeddings[:, 3] = 0.5  # a dimension without a range
    expected = quantize_embeddings(embeddings, precision)
    got = quantize(embeddings, precision)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_one_embedding_has_no_range(embeddings, precision):
    with pytest.raises(InputError, match="only one"):
        quantize(embeddings[:1], precision)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pool_is_sentence_transformers(pooling):
    import torch
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    hidden = np.random.default_rng(1).standard_normal((3, 6, 8)).astype(np.float32)
    mask = np.array([[1] * 6, [1] * 2 + [0] * 4, [1] + [0] * 5])
    features = {"token_embeddings": torch.tensor(hidden), "attention_mask": torch.tensor(mask)}
    expected = Pooling(8, pooling_mode=pooling)(features)["sentence_embedding"].numpy()
    got = pool(hidden, mask, pooling)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_mean_ignores_what_stands_in_padding():
    hidden = np.array([[[1.0], [3.0], [np.nan]]], dtype=np.float32)
    assert pool(hidden, np.array([[1, 1, 0]]), "mean").tolist() == [[2.0]]


def test_mean_keeps_its_digits_over_8192_tokens():
    hidden = np.random.default_rng(2).random((1, 8192, 4)).astype(np.float32) + 100
    expected = hidden.astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(pool(hidden, np.ones((1, 8192), dtype=np.int64), "mean"), expected, rtol=1e-7)


def test_l2_normalize(embeddings):
    import torch

    embeddings[0] = 0
    expected = torch.nn.functional.normalize(torch.tensor(embeddings)).numpy()
    np.testing.assert_allclose(l2_normalize(embeddings), expected, atol=1e-7)
    assert l2_normalize(embeddings)[0].tolist() == [0] * 20

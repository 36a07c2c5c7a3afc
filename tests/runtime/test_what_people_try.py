"""What people try first in Python: to print a model, and to give it nothing, a generator or a view."""

import numpy as np
import pytest

import gte_deploy
from gte_deploy.core.errors import InputError


@pytest.fixture(scope="module")
def paths(word_checkpoints):
    return {task: str(path) for task, path in word_checkpoints.items()}


@pytest.fixture(scope="module")
def model(paths):
    with gte_deploy.load(paths["embed"], backend="torch") as opened:
        yield opened


def test_a_model_prints_what_it_is(paths):
    with gte_deploy.load(paths["embed"], backend="torch") as opened:
        shown = str(opened)
        config = opened.spec
    assert shown.startswith("<Model ") and paths["embed"] in shown
    for fact in ("embed", f"{config.hidden_size} dimensions", f"{config.max_length:,} tokens", "fp32 on torch", "cpu"):
        assert fact in shown
    assert "closed" in str(opened)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "int8"},
        {"normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
    ],
)
def test_no_texts_are_answered_as_the_library_answers_them(options, paths, model):
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(paths["embed"], device="cpu")
    expected, found = library.encode([], **options), model.encode([], **options)
    assert type(found) is type(expected)
    if not isinstance(expected, list):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert len(found) == len(expected) == 0


@pytest.mark.parametrize(
    "given",
    [
        lambda texts: (text for text in texts),
        lambda texts: iter(texts),
        lambda texts: dict.fromkeys(texts).keys(),
        lambda texts: map(str, texts),
        lambda texts: np.array(texts),
        tuple,
    ],
    ids=["generator", "iterator", "keys", "map", "array", "tuple"],
)
def test_any_iterable_of_texts_is_a_list(given, model, paths):
    texts = ["the king", "a queen", "water"]
    np.testing.assert_array_equal(model.encode(given(texts)), model.encode(texts))
    masked = ["the [MASK]", "a [MASK]"]
    with gte_deploy.load(paths["fill-mask"], backend="torch") as other:
        assert other.fill_mask(given(masked)) == other.fill_mask(masked)


@pytest.mark.parametrize("given", [{"a": 1}, {"a", "b"}, b"a", 3, None])
def test_what_has_no_order_or_no_texts_is_refused(given, model):
    with pytest.raises(InputError):
        model.encode(given)

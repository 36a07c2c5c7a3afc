"""The battery of bad inputs: a typed error that names index and limit, or a finite answer; and no trace is left."""

import functools
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gte_deploy
from bad_inputs import (
    BAD_ITEMS,
    EMPTY,
    FINITE,
    GOOD,
    MAX_LENGTHS,
    MEGABYTES,
    NESTED,
    NOT_TEXTS,
    SURROGATES,
    TOO_LARGE,
    rows,
)
from gte_deploy import GteDeployError, InputError

CALLS = {
    "fill_mask": lambda models, inputs, **options: models["fill-mask"].fill_mask(inputs, **options),
    "encode": lambda models, inputs, **options: models["embed"].encode(inputs, **options),
    "tokenize": lambda models, inputs, **options: models["embed"].tokenize(inputs, **options),
    "predict": lambda models, inputs, **options: models["classify"].predict(inputs, **options),
    "rank": lambda models, inputs, **options: models["classify"].rank(
        "a king", [inputs] if isinstance(inputs, str) else inputs, **options
    ),
}


@pytest.fixture(params=list(CALLS))
def call(request, models):
    return functools.partial(CALLS[request.param], models)


@pytest.fixture(autouse=True)
def _the_next_good_request_is_unchanged(models, repeat_tolerance):
    before = models["fill-mask"].fill_mask(GOOD), models["embed"].encode(GOOD)
    yield
    after = models["fill-mask"].fill_mask(GOOD), models["embed"].encode(GOOD)
    if repeat_tolerance == 0:
        assert after[0] == before[0]
    np.testing.assert_allclose(after[1], before[1], rtol=0, atol=repeat_tolerance)


@pytest.mark.parametrize("row", rows(NOT_TEXTS))
def test_no_text_at_all(call, row):
    with pytest.raises(InputError, match=row.says):
        call(row.value)


@pytest.mark.parametrize("row", rows(EMPTY))
def test_no_texts(models, row):
    """No embeddings, as from SentenceTransformer (tests/runtime/test_what_people_try.py); else there is no answer."""
    assert len(models["embed"].encode(row.value)) == 0
    for name in ("fill_mask", "tokenize", "predict"):
        with pytest.raises(InputError, match=row.says):
            CALLS[name](models, row.value)


@pytest.mark.parametrize("row", rows(BAD_ITEMS))
def test_one_bad_item_names_its_index(call, row):
    with pytest.raises(InputError, match=r"(inputs|texts|documents)\[0\]"):
        call([row.value, GOOD])
    with pytest.raises(InputError, match=r"(inputs|texts|documents)\[1\]"):
        call([GOOD, row.value])


@pytest.mark.parametrize("row", rows(NESTED))
@pytest.mark.parametrize("name", ["fill_mask", "encode", "tokenize"])
def test_nested_lists(models, name, row):
    with pytest.raises(InputError, match=row.says):
        CALLS[name](models, row.value)


@pytest.mark.parametrize("row", rows(SURROGATES))
def test_lone_surrogates(call, models, row):
    with pytest.raises(InputError, match=row.says):
        call(row.value)
    with pytest.raises(InputError, match=r"\[1\] has a lone surrogate"):
        call([GOOD, row.value])
    with pytest.raises(InputError, match="targets"):
        models["fill-mask"].fill_mask(GOOD, targets=["city", row.value])
    with pytest.raises(InputError, match="lone surrogate"):
        models["embed"].encode("a", prompt=row.value)
    with pytest.raises(InputError, match="lone surrogate"):
        models["classify"].rank(row.value, [GOOD])


@pytest.mark.parametrize("row", rows(MAX_LENGTHS))
def test_max_length(call, row):
    with pytest.raises(InputError, match=row.says):
        call(GOOD, max_length=row.value, truncation=True)


@pytest.mark.parametrize("row", rows(TOO_LARGE))
def test_ten_megabytes_are_refused_at_once(call, row):
    started = time.thread_time()
    with pytest.raises(InputError, match=row.says):
        call(row.value)
    with pytest.raises(InputError, match=r"\[1\] has"):
        call([GOOD, row.value], truncation=True)
    assert (time.thread_time() - started) / 2 < 0.05


@pytest.mark.parametrize("row", rows(MEGABYTES))
def test_a_megabyte_is_cut_quickly(call, row):
    started = time.process_time()
    assert call(row.value, truncation=True) is not None
    # Seconds of CPU; all of the plain text would take two. A word cannot be cut, and takes one.
    assert time.process_time() - started < (2 if "xxx" in row.value else 0.5)


def test_lengths_around_the_limit(models):
    for task, model in models.items():
        limit = model.spec.max_length
        for count, truncation in ((limit, False), (limit, True), (limit + 1, True), (limit * 3, True)):
            text = "[MASK]" + " the" * (count - 3)
            row = model.tokenize(text, truncation=truncation)["input_ids"]
            assert row.shape == (1, min(count, limit))
            assert row[0, -1] == 3  # [SEP] stays
        with pytest.raises(InputError, match=f"input 1 has {limit + 1} tokens.*limit is {limit}"):
            model.tokenize(["a", "the " * (limit - 1)])
        if task == "fill-mask":
            assert len(model.fill_mask("[MASK]" + " the" * (limit - 3))) == 5


@pytest.mark.parametrize("row", rows(FINITE))
def test_odd_texts_give_finite_answers(models, row):
    text = row.value
    embeddings = models["embed"].encode([text, GOOD, text])
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(embeddings[0], embeddings[2], atol=1e-5)
    answers = models["fill-mask"].fill_mask(f"{text} [MASK] {text}", truncation=True, top_k=3)
    assert all(0 <= answer["score"] <= 1 for answer in answers)
    assert np.isfinite(models["classify"].predict([[text, text], ["", text]], truncation=True)).all()


def test_composed_and_decomposed_accents_are_one(models):
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    rows = models["embed"].tokenize([composed, decomposed])["input_ids"]
    assert (rows[0] == rows[1]).all()


def test_a_mask_in_every_place(models):
    text = " ".join(["[MASK]"] * 126)
    answers = models["fill-mask"].fill_mask(text, top_k=1)
    assert len(answers) == 126 and all(len(masks) == 1 for masks in answers)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
# Of every category, lone surrogates too.
wild_text = st.text(st.characters(), max_size=60) | st.sampled_from(["[MASK]", "the [MASK]", "[SEP]", ""])
options = st.fixed_dictionaries(
    {},
    optional={
        "truncation": st.booleans(),
        "max_length": st.integers(-5, 140) | st.just(2**40),
        "batch_size": st.integers(-1, 40),
        "max_batch_tokens": st.integers(-1, 300),
    },
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(inputs=anything | st.lists(wild_text, max_size=4), options=options, top_k=st.integers(-1, 130))
def test_fuzz_fill_mask(models, inputs, options, top_k):
    try:
        answers = models["fill-mask"].fill_mask(inputs, top_k=top_k, **options)
    except GteDeployError as error:
        assert str(error)
        return
    assert isinstance(answers, list) and answers


@quick
@given(
    inputs=anything | wild_text | st.lists(wild_text, max_size=4),
    options=options,
    truncate_dim=st.none() | st.integers(-1, 40),
    output_value=st.sampled_from(["sentence_embedding", "token_embeddings", None, "other"]),
)
def test_fuzz_encode(models, inputs, options, truncate_dim, output_value):
    try:
        result = models["embed"].encode(inputs, truncate_dim=truncate_dim, output_value=output_value, **options)
    except GteDeployError as error:
        assert str(error)
        return
    if output_value == "sentence_embedding":
        assert np.isfinite(result).all()


@quick
@given(inputs=anything | wild_text | st.lists(wild_text, max_size=4), max_length=st.none() | st.integers(-1, 140))
def test_fuzz_tokenize(models, inputs, max_length):
    try:
        features = models["embed"].tokenize(inputs, truncation=True, max_length=max_length)
    except GteDeployError as error:
        assert str(error)
        return
    assert features["input_ids"].shape == features["attention_mask"].shape
    assert features["attention_mask"].any(axis=1).all()
    assert 0 <= features["input_ids"].min() and features["input_ids"].max() < models["embed"].spec.vocab_size


@quick
@given(inputs=anything | st.lists(st.lists(wild_text, max_size=3), max_size=3))
def test_fuzz_predict(models, inputs):
    try:
        scores = models["classify"].predict(inputs, truncation=True)
    except GteDeployError as error:
        assert str(error)
        return
    assert np.isfinite(scores).all()


def test_errors_are_value_errors_too():
    assert issubclass(InputError, ValueError) and issubclass(InputError, gte_deploy.GteDeployError)

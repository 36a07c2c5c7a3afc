"""Model.fill_mask against transformers' own fill-mask pipeline, on PyTorch."""

import logging
import math

import numpy as np
import pytest

import gte_deploy
from gte_deploy.core.activations import softmax
from gte_deploy.tasks.fill_mask import top_tokens

TEXTS = [
    "Paris is the [MASK] of France.",
    "the king walked to the [MASK], and the queen is [MASK]!",
    "[MASK]",
    "the man isn't old ([MASK] is not); readable [MASK] unknownword 中国",
    "[SEP] the [MASK] [PAD] a [CLS] time",
    "a [MASK]" + " the" * 100,
]
# The scores come from the same float32 logits; softmax sums in another order.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def ours(word_checkpoints):
    with gte_deploy.load(word_checkpoints["fill-mask"], num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def pipeline(word_checkpoints):
    import transformers

    return transformers.pipeline("fill-mask", model=str(word_checkpoints["fill-mask"]))


def assert_same(got, expected):
    """Equal keys, order, nesting, tokens and texts, and scores to TOLERANCE."""
    if isinstance(expected, list):
        assert isinstance(got, list) and len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
        return
    assert list(got) == list(expected) == ["score", "token", "token_str", "sequence"]
    assert {name: type(value) for name, value in got.items()} == {name: type(v) for name, v in expected.items()}
    assert math.isclose(got["score"], expected["score"], abs_tol=TOLERANCE)
    assert [got[name] for name in ("token", "token_str", "sequence")] == [
        expected[name] for name in ("token", "token_str", "sequence")
    ]


def known_only(expected, top_k):
    """The pipeline's answers less the rows that pad the vocabulary, which have no token and which we never answer."""
    if isinstance(expected[0], list):
        return [known_only(part, top_k) for part in expected]
    return [answer for answer in expected if answer["token_str"]][:top_k]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_one_text(ours, pipeline, text, top_k):
    assert_same(ours.fill_mask(text, top_k=top_k), known_only(pipeline(text, top_k=128), top_k))


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], TEXTS[::-1]])
def test_a_list_gives_a_list(ours, pipeline, texts):
    expected = [known_only(answer, 3) for answer in pipeline(texts, top_k=128)]
    assert_same(ours.fill_mask(texts, top_k=3), expected)


@pytest.mark.parametrize("text", TEXTS[:2])
def test_a_list_of_one_text_gives_what_the_text_does(ours, pipeline, text):
    assert_same(ours.fill_mask([text], top_k=3), known_only(pipeline([text], top_k=128), 3))
    assert ours.fill_mask([text]) == ours.fill_mask(text)


@pytest.mark.parametrize(
    "targets",
    [
        "city",
        ["city"],
        ["queen", "king", "water", "queen"],
        ["capital", "walking", "zzz", "Paris", "##s"],
        ["the light", "[MASK]", "[PAD]"],
    ],
)
@pytest.mark.parametrize("text", TEXTS[:2])
@pytest.mark.parametrize("top_k", [2, 5])
def test_targets(ours, pipeline, text, targets, top_k):
    assert_same(ours.fill_mask(text, targets=targets, top_k=top_k), pipeline(text, targets=targets, top_k=top_k))


def test_targets_outside_the_vocabulary_are_told(ours, caplog):
    with caplog.at_level(logging.WARNING, logger="gte_deploy"):
        ours.fill_mask(TEXTS[0], targets=["walking", "", "city"])
    assert ["walking" in message for message in caplog.messages] == [True, False]
    assert "walk" in caplog.messages[0] and "ignored" in caplog.messages[1]


@pytest.mark.parametrize("targets", [[], "", [""], [" "]])
def test_no_usable_target(ours, pipeline, targets):
    with pytest.raises(ValueError, match="."):
        pipeline(TEXTS[0], targets=targets)
    with pytest.raises(gte_deploy.InputError, match="target"):
        ours.fill_mask(TEXTS[0], targets=targets)


@pytest.mark.parametrize("targets", [7, [7], [None], {"city": 1}, b"city"])
def test_targets_of_a_wrong_type(ours, targets):
    with pytest.raises(gte_deploy.InputError, match="targets"):
        ours.fill_mask(TEXTS[0], targets=targets)


def test_truncation_is_the_pipelines(ours, pipeline):
    text = "the [MASK] " + "walking to the old house " * 60
    with pytest.raises(gte_deploy.InputError, match=r"input 0 has at least \d+ tokens.*limit is 128"):
        ours.fill_mask(text)
    expected = pipeline(text, top_k=128, tokenizer_kwargs={"truncation": True})
    assert_same(ours.fill_mask(text, truncation=True), known_only(expected, 5))


def test_a_mask_lost_by_truncation_is_an_error(ours):
    with pytest.raises(gte_deploy.InputError, match=r"input 1 lost its \[MASK\]"):
        ours.fill_mask(["[MASK]", "the " * 200 + "[MASK]"], truncation=True)


def test_no_mask_names_the_index(ours):
    with pytest.raises(gte_deploy.InputError, match=r"input 1 has no mask"):
        ours.fill_mask(["[MASK]", "the king"])


@pytest.mark.parametrize("top_k", [0, -1, 115, 2**31, True, 2.0, "5", None])
def test_top_k_out_of_range(ours, top_k):
    with pytest.raises(gte_deploy.InputError, match="top_k"):
        ours.fill_mask(TEXTS[0], top_k=top_k)


def test_every_token_and_no_padding_row_is_answered(ours):
    num_tokens = len(ours._answerable)
    answers = ours.fill_mask(TEXTS[0], top_k=num_tokens)
    assert sorted(answer["token"] for answer in answers) == list(range(num_tokens))
    assert num_tokens < ours.spec.vocab_size  # the rest are rows that pad it
    # They keep their share of the probability, as in the pipeline.
    assert 0.5 < sum(answer["score"] for answer in answers) < 1 - 1e-6


def test_masks_beyond_the_logits_held_at_once(ours, monkeypatch):
    text = "[MASK] the [MASK] a [MASK] of [MASK] [MASK]"
    expected = ours.fill_mask([text, "[MASK] is [MASK]"])
    monkeypatch.setattr("gte_deploy.tasks.fill_mask.MAX_LOGITS", 2 * ours.spec.vocab_size)
    assert_same(ours.fill_mask([text, "[MASK] is [MASK]"]), expected)


def test_other_tasks_are_refused(word_checkpoints):
    with gte_deploy.load(word_checkpoints["embed"]) as model, pytest.raises(gte_deploy.InputError, match="fill-mask"):
        model.fill_mask("[MASK]")


def test_top_tokens_breaks_ties_by_id():
    logits = np.zeros(9, dtype=np.float32)
    logits[4] = 1
    scores, tokens = top_tokens(logits, np.array([8, 3, 4, 1]), 3)
    assert tokens.tolist() == [4, 1, 3]
    np.testing.assert_array_equal(scores, softmax(logits)[[4, 1, 3]])


def test_softmax_of_large_logits_is_finite():
    logits = np.array([[1e30, 0, -1e30], [88.8, 88.8, 88.8]], dtype=np.float32)
    np.testing.assert_allclose(softmax(logits), [[1, 0, 0], [1 / 3] * 3], rtol=1e-6)

import dataclasses
from collections import Counter

import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.text_files import read_texts
from gte_deploy.exporters.verification import texts
from gte_deploy.exporters.verification.accuracy import AccuracyBounds, TextReference, interval
from gte_deploy.exporters.verification.texts import (
    builtin_texts,
    calibration_texts,
    evaluation_rounds,
    evaluation_texts,
    text_batches,
)
from gte_deploy.models import resolve_checkpoint
from gte_deploy.text.tokenization import load_tokenizer

SPEC = ModelSpec(task="fill-mask", max_length=512, vocab_size=30528, hidden_size=8, pad_token_id=0)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_checkpoint(None))


@pytest.fixture(scope="module")
def batches(tokenizer):
    return text_batches(builtin_texts("evaluation"), tokenizer, SPEC, max_tokens=4000)


class Answers:
    """Hidden states and logits that know the right word; `turn` of the tokens get another direction."""

    def __init__(self, right, turn=0.0):
        self.right, self.turn = right, turn

    def run(self, batch, outputs):
        rng = np.random.default_rng(int(batch.input_ids.sum()))
        hidden = rng.standard_normal((*batch.input_ids.shape, 8)).astype(np.float32)
        hidden[batch.attention_mask == 0] = np.nan  # nobody may look there
        logits = np.zeros((len(batch.mask_positions), 30528), np.float32)
        best = np.arange(len(logits)) % 2 if self.right == "half" else np.zeros(len(logits))
        logits[np.arange(len(logits)), 5] = best
        logits[:, 7] = 0.5
        return {
            "last_hidden_state": hidden * (1 - 2 * (rng.random(hidden.shape[:2]) < self.turn))[..., None],
            "logits": logits,
        }


def test_the_same_answers_are_perfect(batches):
    found = TextReference(Answers("half"), {"en": [batches]}, SPEC).compare(Answers("half"))
    assert found.token_cosine_min == pytest.approx(1) and found.sentence_cosine_min == pytest.approx(1)
    assert found.top1_agreement == found.top5_agreement == 1
    assert found.tokens == sum(int(batch.attention_mask.sum()) for batch, _ in batches)
    assert found.masks == sum(len(wanted) for _, wanted in batches)


def test_differences_show(batches):
    found = TextReference(Answers("half"), {"en": [batches]}, SPEC).compare(Answers("none", turn=0.25))
    assert found.token_cosine_mean == pytest.approx(0.5, abs=0.05) and found.token_cosine_min == pytest.approx(-1)
    assert found.top1_agreement == pytest.approx(0.5, abs=0.1)
    assert found.top1 == (0, 0)


LIMITS = (8, 16, 64, 100, 128, 512, 2048, 8192)


@pytest.fixture(scope="module")
def at_every_limit(tokenizer):
    """Longest input -> the batches of three rounds."""
    texts = builtin_texts("evaluation")
    return {
        limit: [
            text_batches(texts, tokenizer, dataclasses.replace(SPEC, max_length=limit), max_tokens=3000, round=i)
            for i in range(3)
        ]
        for limit in LIMITS
    }


@pytest.mark.parametrize("limit", LIMITS)
def test_texts_come_alone_together_and_in_windows_up_to_the_limit(at_every_limit, tokenizer, limit):
    batches = at_every_limit[limit][0]
    lengths = [int(batch.attention_mask.sum(axis=1).max()) for batch, _ in batches]
    longest = max(lengths)
    assert longest == limit or 1400 < longest < 1600 < limit, "half of the words are in one window of up to 2,048"
    assert {min(window, limit) for window in (32, 128, 512)} <= set(lengths)
    assert any(len(batch.input_ids) == 4 and (batch.attention_mask == 0).any() for batch, _ in batches)
    for batch, wanted in batches:
        assert (batch.input_ids[tuple(batch.mask_positions.T)] == tokenizer.mask_token_id).all()
        assert (batch.input_ids[:, 0] == 101).all() and len(wanted) == len(batch.mask_positions) > 0
        assert not np.isin(wanted, (0, 101, 102, 103)).any()


def test_the_words_and_the_masks_are_the_same_at_every_limit(at_every_limit):
    def masked(batches):
        return Counter(word for _, wanted in batches for word in wanted.tolist())

    def words(batches):
        ids = (id for batch, _ in batches for id in batch.input_ids[batch.attention_mask == 1].tolist())
        return sum(id not in (101, 102) for id in ids)

    whole = at_every_limit[8192]
    for limit, rounds in at_every_limit.items():
        for found, expected in zip(rounds, whole, strict=True):
            assert words(found) == words(expected)
            # A batch of a few short pieces may have no mask by chance, and then gets one.
            extra = masked(found) - masked(expected)
            assert not masked(expected) - masked(found) and extra.total() <= (40 if limit < 32 else 2), limit
    shares = [masked(batches).total() / words(batches) for batches in whole]
    assert all(0.13 < share < 0.17 for share in shares)


def test_rounds_are_made_when_they_are_needed(tokenizer, monkeypatch):
    made, make = [], texts.text_batches
    monkeypatch.setattr(
        texts, "text_batches", lambda *args, round, **options: made.append(round) or make(*args, round=round, **options)
    )
    rounds = texts.TextRounds(builtin_texts("evaluation"), tokenizer, SPEC, max_tokens=300)
    bounds = AccuracyBounds(cosine_mean=0, top1_agreement=0)
    judge = TextReference(Answers("half"), {"en": rounds}, SPEC)
    for _ in range(2):  # candidates
        judge.compare(Answers("half"), bounds)
    assert len(rounds) == 3 and made == [0]
    assert len(rounds[2]) == len(rounds[0]) and made == [0, 2]


def test_rounds_mask_other_words(at_every_limit):
    places = [
        {(number, *place) for number, (batch, _) in enumerate(batches) for place in batch.mask_positions.tolist()}
        for batches in at_every_limit[512]
    ]
    assert not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]


def test_the_interval_is_wilsons_and_wider_where_texts_err_together():
    same = np.array([True] * 97 + [False] * 3)
    low, high = interval(same, np.arange(100))
    assert (low, high) == pytest.approx((0.9155, 0.9897), abs=5e-4)  # R: binom.confint(97, 100, methods = "wilson")
    together = interval(same, np.arange(100) // 10)  # the three stand in one text
    assert together[0] < low and together[1] > high
    assert interval(np.ones(50, bool), np.arange(50)) == pytest.approx((0.9287, 1), abs=5e-4)
    assert interval(np.zeros(50, bool), np.arange(50)) == pytest.approx((0, 1 - 0.9287), abs=5e-4)


@pytest.mark.parametrize("rate", [0.90, 0.97])
def test_the_interval_holds_the_true_rate_as_often_as_it_says(rate):
    rng = np.random.default_rng(5)
    texts = np.arange(1500) // 15
    held = 0
    for _ in range(400):  # three words in ten have the luck of their text
        shared = np.where(rng.random(1500) < 0.3, rng.random(100)[texts], rng.random(1500))
        low, high = interval(shared < rate, texts)
        held += low <= rate <= high
    assert 0.92 <= held / 400 <= 0.985


class Flips:
    """The best word of `share` of all masks is another than the reference's, which is always word 5."""

    def __init__(self, share):
        self.share, self.rng, self.masks = share, np.random.default_rng(0), 0

    def run(self, batch, outputs):
        logits = np.zeros((len(batch.mask_positions), 64), np.float32)
        logits[:, 5] = 1
        logits[self.rng.random(len(logits)) < self.share, 7] = 2
        self.masks += len(logits)
        return {"last_hidden_state": np.ones((*batch.input_ids.shape, 8), np.float32), "logits": logits}


@pytest.mark.parametrize(
    ("share", "rounds", "missed"), [(0.0, 1, False), (0.027, 3, False), (0.03, 3, False), (0.1, 1, True)]
)
def test_what_is_open_is_measured_on_more_masks(at_every_limit, share, rounds, missed):
    bounds = AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97)
    rounds_of = at_every_limit[128]
    found = TextReference(Flips(0), {"en": rounds_of}, SPEC).compare(Flips(share), bounds)
    assert found.masks == sum(len(wanted) for batches in rounds_of[:rounds] for _, wanted in batches)
    assert bool(bounds.missed(found)) == missed
    low, high = found.top1_interval
    assert low <= found.top1_agreement <= high
    assert bool(bounds.missed(found, by_estimate=True)) == (found.top1_agreement < 0.97)


class FlipsTextsOf:
    """Knows the best word, but for the masks of one language."""

    def __init__(self, batches, share):
        self.rows = {row.tobytes() for batch, _ in batches for row in batch.input_ids}
        self.right, self.wrong = Flips(0), Flips(share)

    def run(self, batch, outputs):
        return (self.wrong if batch.input_ids[0].tobytes() in self.rows else self.right).run(batch, outputs)


def test_one_language_that_falls_short_shows_in_its_own_numbers(tokenizer):
    """Among many masks of other languages, the errors of one are within the bounds of all."""
    texts_of = evaluation_texts(tokenizer, 30528, languages="multilingual").texts
    assert len(texts_of) == 20 and next(iter(texts_of)) == "en"
    rounds = evaluation_rounds({key: texts_of[key] for key in ("en", "fr", "de")}, tokenizer, SPEC, max_tokens=6000)
    bounds = AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97)
    found = TextReference(Flips(0), rounds, SPEC).compare(FlipsTextsOf(rounds["fr"][0], 0.5))
    assert found.top1_agreement > 0.97 and found.languages["fr"].top1_agreement < 0.7
    assert found.languages["en"].top1_agreement == found.languages["de"].top1_agreement == 1
    assert sum(own.masks for own in found.languages.values()) == found.masks
    assert sum(own.tokens for own in found.languages.values()) == found.tokens
    (line,) = bounds.missed(found)
    assert line.startswith("in language fr: the best answer for a mask")
    assert not bounds.missed(TextReference(Flips(0), rounds, SPEC).compare(Flips(0)))


def test_what_chooses_and_what_judges_share_no_text(tokenizer):
    texts_of = evaluation_texts(tokenizer, 30528, languages="multilingual").texts
    calibration = set(calibration_texts(tokenizer, 30528, languages="multilingual").texts)
    for language, each in texts_of.items():
        assert len(each) == len(set(each)) > 12 and not calibration & set(each), language
        most = 6000 if language == "en" else texts.LANGUAGE_TOKENS
        left = texts.texts_left_out(each, tokenizer, max_tokens=most)
        assert len(left) < len(each), language
        assert left or language == "th", "bert-base-uncased has no Thai: each text is one unknown token"
    for languages in ("english", "auto"):
        assert [*evaluation_texts(tokenizer, 30528, languages=languages).texts] == ["en"]


def test_the_same_every_time(batches, tokenizer):
    again = text_batches(builtin_texts("evaluation"), tokenizer, SPEC, max_tokens=4000)
    for (first, _), (second, _) in zip(batches, again, strict=True):
        np.testing.assert_array_equal(first.input_ids, second.input_ids)


def test_calibration_and_evaluation_share_no_text():
    assert not set(filter(None, builtin_texts("calibration"))) & set(builtin_texts("evaluation"))


def test_a_short_text_is_enough(tokenizer):
    for batch, wanted in text_batches(["Hello"], tokenizer, SPEC, max_tokens=1000):
        assert batch.input_ids.shape == (1, 3) and len(wanted) == 1


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "holds no text"), (b"\xff\xfe\xff", "cannot be read")])
def test_a_users_file_without_text_is_refused(tmp_path, content, reason):
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_texts(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(tmp_path / "missing.txt")

"""The metrics of XTREME-R against seqeval, torchmetrics' SQuAD and scikit-learn, and against values by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gte_deploy.training.evaluation.xtreme_data import UPOS_TAGS, WIKIANN_TAGS
from gte_deploy.training.evaluation.xtreme_metrics import (
    Chunk,
    answer_f1,
    answer_match,
    chunk_f1,
    chunks,
    mean_average_precision,
)

# --- tags -------------------------------------------------------------------------------------------------------------

# 100 * seqeval.metrics.f1_score(labels, predictions) of seqeval 1.2.2, for the sentences of `tagged` with seeds 0 to 5
SEQEVAL = {
    "ner": [59.01639344, 56.25, 33.33333333, 45.16129032, 58.18181818, 70.96774194],
    "pos": [62.85714286, 60.21505376, 52.27272727, 42.85714286, 59.01639344, 57.14285714],
    "other": [58.66666667, 64.61538462, 52.0, 50.0, 64.28571429, 62.5],
}
TAGS = {
    "ner": WIKIANN_TAGS,
    "pos": UPOS_TAGS,
    "other": ("O", "E-A", "S-A", "I-A", "B-A", "I-B", "E-B", "PER", "X", "_", "B-PER-X"),
}


def tagged(tags: tuple[str, ...], seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Eight sentences of random tags, and predictions of which six of ten are right."""
    rng = random.Random(seed)
    labels = [[rng.choice(tags) for _ in range(rng.randint(1, 9))] for _ in range(8)]
    return labels, [[tag if rng.random() < 0.6 else rng.choice(tags) for tag in sentence] for sentence in labels]


@pytest.mark.parametrize("kind", SEQEVAL)
def test_f1_of_chunks_is_that_of_seqeval(kind):
    for seed, expected in enumerate(SEQEVAL[kind]):
        labels, predictions = tagged(TAGS[kind], seed)
        assert chunk_f1(predictions, labels) == pytest.approx(expected, abs=1e-7)


def test_chunks_by_hand():
    assert chunks([["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]]) == {
        Chunk("PER", 0, 2),
        Chunk("LOC", 3, 4),
        Chunk("LOC", 4, 5),
    }
    # Sentences do not touch; neighbours of one part of speech are one chunk.
    assert chunks([["NOUN", "NOUN"], ["NOUN"]]) == {Chunk("OUN", 0, 2), Chunk("OUN", 3, 4)}
    assert chunk_f1([["O", "O"]], [["B-PER", "O"]]) == 0


# --- answers ----------------------------------------------------------------------------------------------------------

# answer, references, F1 and exact match of torchmetrics.functional.text.squad, 1.9.0
SQUAD: list[tuple[str, list[str], float, float]] = [
    ("New-York cats, 日本 日本語", ["日本 É 日本 'old'"], 25.0, 0.0),
    ("river. a New-York 日本", ["cat New-York", "الكتاب 'old' New-York The"], 40.0, 0.0),
    ("cat New-York الكتاب 3,000 New-York", ["'old' cats, cats, New-York"], 22.2222, 0.0),
    ("3,000 3,000", ["3,000 3,000", "river. cat 'old'"], 100.0, 100.0),
    ("river. 'old' The 日本 الكتاب", ["日本 日本 New-York An"], 28.5714, 0.0),
    ("über الكتاب New-York", ["cats, An", "الكتاب"], 50.0, 0.0),
    ("日本語", ["日本語", "The 日本 the"], 100.0, 100.0),
    ("日本語 über über 'old' cats,", ["É É the"], 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "references", "f1", "exact"), SQUAD)
def test_answers_are_scored_as_by_squad(answer, references, f1, exact):
    assert answer_f1(answer, references) == pytest.approx(f1, abs=1e-4)
    assert answer_match(answer, references) == exact


def test_articles_punctuation_and_case_do_not_count():
    assert answer_match("The River!", ["a river"]) == 100
    assert answer_f1("an old river", ["old the city"]) == pytest.approx(50)


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_mean_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(30.0), (20, 1)), axis=1)
    relevant = [set(rng.choice(30, size=rng.integers(1, 6), replace=False).tolist()) for _ in range(20)]
    ranked = np.argsort(-scores, axis=1)
    expected = np.mean(
        [
            average_precision_score([place in wanted for place in range(30)], row)
            for row, wanted in zip(scores, relevant, strict=True)
        ]
    )
    assert mean_average_precision(ranked, relevant, top=30) == pytest.approx(100 * expected)


def test_mean_average_precision_counts_only_the_top():
    # relevant at ranks 2 and 4 of [5, 1, 6, 2], cut after three: only 1/2 of the first counts, over two relevant ones
    assert mean_average_precision([[5, 1, 6, 2]], [{1, 2}], top=3) == pytest.approx(100 * 0.5 / 2)
    assert mean_average_precision([[5, 1, 6, 2]], [{1, 2}], top=4) == pytest.approx(100 * (0.5 + 2 / 4) / 2)
    assert mean_average_precision([[7], [8]], [{7}, {7}], top=20) == 50

"""Accuracy of a precision on real text: the candidate's answers against PyTorch's FP32 answers.

Parity checks that a graph computes the same numbers as the model. This module measures how closely the answers of
a less exact graph match the model's. Shapes: T real tokens, N rows, M masks, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import ModelSpec, Precision
from gte_deploy.exporters.verification.cases import last_row_alone
from gte_deploy.exporters.verification.texts import OWN, Rounds
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import HIDDEN, Outputs
from gte_deploy.tasks.fill_mask import logits_of_masks
from gte_deploy.tasks.pooling import pool

Needed = Mapping[str, NDArray[Any]]

_Z = 1.96
"""z of a 95 % interval: of 100 models that just keep a bound, two to five are refused within up to three rounds."""


class Runs(Protocol):
    """The part of `Backend` that a comparison needs."""

    def run(self, batch: Batch, outputs: Sequence[str]) -> Outputs:
        """See `gte_deploy.backends.base.Backend.run`."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Means over all tokens, rows and masks of the texts.

    Args:
        token_cosine_mean: mean cosine of the candidate's hidden states with the reference's.
        token_cosine_min: the smallest of these cosines.
        sentence_cosine_mean: mean cosine of the sentence or sparse embeddings; of mean-pooled hidden states if the task
            has neither.
        sentence_cosine_min: the smallest of these cosines.
        alone_cosine_mean: mean cosine of the candidate's hidden states of a row in a padded batch with those of the
            same row alone; 1 if no batch has several rows.
        top1_agreement: share of masks whose best word is the reference's; None for tasks other than fill-mask.
        top1_interval: the 95 % interval of `top1_agreement`, see `interval`.
        top5_agreement: share of the five best words that are among the reference's five; fill-mask only.
        top1: share of masks whose best word is the original one, [candidate, reference]; fill-mask only.
        top5: share of masks whose five best words include the original one, [candidate, reference]; fill-mask only.
        tokens: number of tokens, T.
        masks: number of masks, M.
        languages: language (BCP 47) -> the accuracy on its texts alone; empty where all texts are in one language.
        is_own: whether the texts are a user's.
    """

    token_cosine_mean: float
    token_cosine_min: float
    sentence_cosine_mean: float
    sentence_cosine_min: float
    alone_cosine_mean: float
    top1_agreement: float | None = None
    top1_interval: tuple[float, float] | None = None
    top5_agreement: float | None = None
    top1: tuple[float, float] | None = None
    top5: tuple[float, float] | None = None
    tokens: int = 0
    masks: int = 0
    languages: "Mapping[str, Accuracy]" = field(default_factory=dict)
    is_own: bool = False

    @property
    def kind_of_texts(self) -> str:
        """What the texts are, for people."""
        if self.languages:
            return f"texts in {len(self.languages)} languages"
        return "your texts" if self.is_own else "English prose"


@dataclass(frozen=True)
class AccuracyBounds:
    """The lower bounds of a precision; see `Accuracy`. They hold for all texts together and for each language.

    The agreement of words is an estimate, so the upper end of its interval is compared with the bound: the agreement
    falls short only if the whole interval lies below. `open` tells whether more text could change the result. A
    quantizer, which can choose other options, compares the estimate itself (`by_estimate`): this leaves a margin of
    half an interval for texts that it has not seen. For a single language, with its few words, the interval decides.
    """

    cosine_mean: float
    top1_agreement: float

    def missed(self, found: Accuracy, *, by_estimate: bool = False) -> list[str]:
        """Return one sentence for each bound that is missed; NaN misses a bound.

        `by_estimate` compares the agreement itself in place of the upper end of its interval.
        """
        parts = [
            f"{name} cosine {value:.5f} on average, at least {self.cosine_mean:g} wanted"
            for name, value in (
                ("token", found.token_cosine_mean),
                ("sentence", found.sentence_cosine_mean),
                ("row alone", found.alone_cosine_mean),
            )
            if not value >= self.cosine_mean
        ]
        low, high = found.top1_interval or (1.0, 1.0)
        compared = found.top1_agreement if by_estimate and found.top1_agreement is not None else high
        if not compared >= self.top1_agreement:
            parts.append(
                f"the best answer for a mask is PyTorch's in {found.top1_agreement:.1%} of {found.masks:,} (95 % "
                f"interval {low:.1%} to {high:.1%}), at least {100 * self.top1_agreement:g}% wanted"
            )
        return parts + [
            f"{_name(language)}: {line}" for language, own in found.languages.items() for line in self.missed(own)
        ]

    def open(self, found: Accuracy) -> bool:
        """Whether the interval of the agreement contains the bound."""
        low, high = found.top1_interval or (1.0, 1.0)
        return low < self.top1_agreement <= high


def _name(language: str) -> str:
    return "on your texts" if language == OWN else f"in language {language}"


ACCURACY_BOUNDS: Mapping[Precision, AccuracyBounds] = {
    "fp16": AccuracyBounds(cosine_mean=0.9999, top1_agreement=0.99),
    "bf16": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.98),
    "int8": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97),
    "fp8": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97),
    "int8-weight": AccuracyBounds(cosine_mean=0.9995, top1_agreement=0.98),
    "int4-weight": AccuracyBounds(cosine_mean=0.99, top1_agreement=0.9),
}


class TextReference:
    """The reference's answers to texts, computed once and only for as many rounds as are needed.

    Args:
        reference: computes the right answers.
        texts: language of the texts -> the batches of each round, see `text_batches`. The first round measures
            everything; further rounds add masks.
        spec: the facts about the model.
    """

    def __init__(self, reference: Runs, texts: Mapping[str, Rounds], spec: ModelSpec) -> None:
        self._reference, self._texts, self._spec = reference, texts, spec
        self._answers: dict[tuple[str, int], list[Needed]] = {}

    def compare(self, candidate: Runs, bounds: AccuracyBounds | None = None) -> Accuracy:
        """Measure accuracy on the first round; with `bounds`, on further rounds too while their result is `open`."""
        found = {language: (_Cosines(), _Words()) for language in self._texts}
        rounds = min(map(len, self._texts.values()), default=0)
        for number in range(rounds):
            for language, (cosines, words) in found.items():
                self._measure(candidate, language, number, cosines, words)
            accuracy = _accuracy_of(found)
            if bounds is None or not bounds.open(accuracy) or number == rounds - 1:
                return accuracy
        raise ValueError("there is no round of texts to compare answers on")

    def _measure(self, candidate: Runs, language: str, number: int, cosines: "_Cosines", words: "_Words") -> None:
        """Add the candidate's answers to one round of one language."""
        batches, answers = self._texts[language][number], self._expected(language, number)
        for (batch, wanted), expected in zip(batches, answers, strict=True):
            found = _needed(candidate.run(batch, self._names(number)), batch, self._spec)
            if number == 0:
                cosines.add(found, expected, batch, candidate)
            if "best" in found:
                words.add(found["best"], expected["best"], wanted, batch)

    def _expected(self, language: str, number: int) -> list[Needed]:
        """Return the reference's answers to one round of one language, reduced to what the comparison needs."""
        if (language, number) not in self._answers:
            self._answers[language, number] = [
                _needed(self._reference.run(batch, self._names(number)), batch, self._spec)
                for batch, _ in self._texts[language][number]
            ]
        return self._answers[language, number]

    def _names(self, number: int) -> tuple[str, ...]:
        task = TASKS[self._spec.task]
        extra = () if task.has_labels else task.answers  # labels say little about a text
        return (HIDDEN, *extra) if number == 0 else extra


def _accuracy_of(found: "Mapping[str, tuple[_Cosines, _Words]]") -> Accuracy:
    """The accuracy on all texts, and that on the texts of each language if there are several."""
    cosines, words = _Cosines(), _Words()
    for own_cosines, own_words in found.values():
        cosines.join(own_cosines)
        words.join(own_words)
    each = {
        language: Accuracy(**own_cosines.measures(), **own_words.measures())
        for language, (own_cosines, own_words) in found.items()
    }
    languages = each if len(each) > 1 else {}
    return Accuracy(**cosines.measures(), **words.measures(), languages=languages, is_own=[*each] == [OWN])


class _Cosines:
    """Collects the cosines of hidden states and sentence embeddings, batch by batch."""

    def __init__(self) -> None:
        self._tokens: list[NDArray[np.float64]] = []
        self._sentences: list[NDArray[np.float64]] = []
        self._alone: list[NDArray[np.float64]] = []

    def add(self, found: Needed, expected: Needed, batch: Batch, candidate: Runs) -> None:
        self._tokens.append(_cosine(found["tokens"], expected["tokens"]))
        self._sentences.append(_cosine(found["sentences"], expected["sentences"]))
        if len(batch.input_ids) > 1:
            single = last_row_alone(batch)
            (row,) = candidate.run(single, ("last_hidden_state",))["last_hidden_state"]
            self._alone.append(_cosine(found["tokens"][-len(row) :], row))

    def join(self, other: "_Cosines") -> None:
        """Add what another has collected."""
        self._tokens += other._tokens
        self._sentences += other._sentences
        self._alone += other._alone

    def measures(self) -> dict[str, Any]:
        token, sentence = np.concatenate(self._tokens), np.concatenate(self._sentences)
        return {
            "token_cosine_mean": float(token.mean()),
            "token_cosine_min": float(token.min()),
            "sentence_cosine_mean": float(sentence.mean()),
            "sentence_cosine_min": float(sentence.min()),
            "alone_cosine_mean": float(np.concatenate(self._alone or [np.ones(1)]).mean()),
            "tokens": len(token),
        }


_SENTENCES = ("sentence_embedding", "sparse_embedding")


class _Words:
    """Collects the five best words of candidate and reference, batch by batch."""

    def __init__(self) -> None:
        self._found: list[NDArray[np.int64]] = []
        self._expected: list[NDArray[np.int64]] = []
        self._wanted: list[NDArray[np.int64]] = []
        self._texts: list[NDArray[np.int64]] = []

    def add(
        self, found: NDArray[np.int64], expected: NDArray[np.int64], wanted: NDArray[np.int64], batch: Batch
    ) -> None:
        """Add a batch: `found` and `expected` are ids [M, 5], best first; `wanted` [M] are the original ids."""
        assert batch.mask_positions is not None
        self._found.append(found)
        self._expected.append(expected)
        self._wanted.append(wanted)
        self._texts.append(batch.mask_positions[:, 0] + self._next_text())

    def join(self, other: "_Words") -> None:
        """Add what another has collected, on other texts."""
        first = self._next_text()
        self._found += other._found
        self._expected += other._expected
        self._wanted += other._wanted
        self._texts += [texts + first for texts in other._texts]

    def _next_text(self) -> int:
        return int(self._texts[-1].max()) + 1 if self._texts else 0

    def measures(self) -> dict[str, Any]:
        if not self._found:
            return {}
        found, expected = np.concatenate(self._found), np.concatenate(self._expected)
        wanted, same = np.concatenate(self._wanted), found[:, 0] == expected[:, 0]
        return {
            "top1_agreement": float(same.mean()),
            "top1_interval": interval(same, np.concatenate(self._texts)),
            "top5_agreement": float((found[:, :, None] == expected[:, None]).any(axis=2).mean()),
            "top1": tuple(float((best[:, 0] == wanted).mean()) for best in (found, expected)),
            "top5": tuple(float((best == wanted[:, None]).any(axis=1).mean()) for best in (found, expected)),
            "masks": len(wanted),
        }


def interval(same: NDArray[np.bool_], texts: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of the rate of `same` [M], for the words of `texts` [M].

    It is Wilson's interval (1927), which holds for rates near 1 and for few words; the normal interval does not. Errors
    within one text are correlated, so its words count as fewer: the number of words is divided by the design effect
    (Kish 1965), the ratio of the variance between texts to the variance of independent words, if it is above 1.

    Args:
        same: whether the best words for each mask agree; at least one mask.
        texts: the number of the text that each mask is in.
    """
    count, rate = float(len(same)), float(same.mean())
    _, cluster = np.unique(texts, return_inverse=True)
    clusters = int(cluster.max()) + 1
    independent = rate * (1 - rate) / count
    if clusters > 1 and independent > 0:
        between = float((np.bincount(cluster, same - rate) ** 2).sum()) / count**2 * clusters / (clusters - 1)
        count /= max(1.0, between / independent)
    spread = _Z**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return centre - half if rate > 0 else 0.0, centre + half if rate < 1 else 1.0


def _needed(outputs: Outputs, batch: Batch, spec: ModelSpec) -> Needed:
    """Reduce `outputs` to what is compared.

    Hidden states become `tokens` [T, H] and `sentences` [N, H]; logits become the ids `best` [M, 5], best first
    (fill-mask).
    """
    needed: dict[str, Any] = {}
    if (hidden := outputs.get("last_hidden_state")) is not None:
        sentences = next((outputs[name] for name in _SENTENCES if name in outputs), None)
        if sentences is None:
            sentences = pool(hidden, batch.attention_mask, "mean")
        needed = {"tokens": hidden[batch.attention_mask.astype(bool)], "sentences": sentences}
    if spec.task == "fill-mask" and batch.mask_positions is not None:
        needed["best"] = five_best(logits_of_masks(spec, batch.mask_positions, outputs["logits"]))
    return needed


def five_best(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the ids [M, 5] of the five largest logits [M, V], largest first; of equal ones the lower id."""
    left, best = logits.copy(), np.empty((len(logits), 5), np.int64)
    for rank in range(5):  # a dozen times as fast as sorting or partitioning a vocabulary
        best[:, rank] = left.argmax(axis=1)
        left[np.arange(len(left)), best[:, rank]] = -np.inf
    return best


def _cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    # A text may have no sparse weight at all: two such vectors are equal, and one alone has a cosine of 0.
    none = ~a.any(axis=1), ~b.any(axis=1)
    norms = np.where(none[0] | none[1], 1.0, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.where(none[0] & none[1], 1.0, np.einsum("ij,ij->i", a, b) / norms)

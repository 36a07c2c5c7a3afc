"""Accuracy of a precision on real text: the candidate's answers against PyTorch's FP32 answers.

Parity checks that a graph computes the same numbers as the model. This module measures how far the answers of a less
exact graph agree with those of the model. Shapes: T real tokens, N rows, M masks, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import ModelSpec, Precision
from gte_deploy.exporters.verification.cases import last_row_alone
from gte_deploy.exporters.verification.texts import Rounds
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.fill_mask import logits_of_masks
from gte_deploy.tasks.pooling import pool

Outputs = Mapping[str, NDArray[np.float32]]
Needed = Mapping[str, NDArray[Any]]

_Z = 1.96
"""Of the 95 % interval: of a hundred models that just keep a bound, two to five are refused in up to three rounds."""


class Runs(Protocol):
    """The part of `Backend` that a comparison needs."""

    def run(self, batch: Batch, outputs: Sequence[str]) -> Outputs:
        """See `gte_deploy.backends.base.Backend.run`."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Means over all tokens, rows and masks of the texts.

    Args:
        token_cosine_mean: of hidden states with the reference's.
        token_cosine_min: the smallest of them.
        sentence_cosine_mean: of sentence embeddings, or of sparse ones; of mean-pooled hidden states where the task has
            neither.
        sentence_cosine_min: the smallest of them.
        alone_cosine_mean: of the candidate's hidden states of a row in a padded batch with those of the row alone; 1
            where no batch has several rows.
        top1_agreement: share of masks whose best word is the reference's; None for other tasks than fill-mask.
        top1_interval: the 95 % interval of that share, see `interval`.
        top5_agreement: share of the five best words that are among the reference's five; fill-mask only.
        top1: share of masks whose best word is the one that stood there, [candidate, reference]; fill-mask only.
        top5: the same of the five best words.
        tokens: T.
        masks: M.
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


@dataclass(frozen=True)
class AccuracyBounds:
    """The least that a precision may keep; see `Accuracy`.

    An agreement of words is an estimate, so it is judged by its interval: it falls short only where the data contradict
    the bound, that is where the whole interval lies below. `open` says whether more text could change the verdict. A
    quantizer, which has a choice, is judged `by_estimate`: half an interval is left for texts that it has not seen.
    """

    cosine_mean: float
    top1_agreement: float

    def missed(self, found: Accuracy, *, by_estimate: bool = False) -> list[str]:
        """What falls short, in words; empty where all is well. NaN falls short.

        `by_estimate` judges the agreement itself in place of its interval.
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
        judged = found.top1_agreement if by_estimate and found.top1_agreement is not None else high
        if not judged >= self.top1_agreement:
            parts.append(
                f"the best answer for a mask is PyTorch's in {found.top1_agreement:.1%} of {found.masks:,} (95 % "
                f"interval {low:.1%} to {high:.1%}), at least {100 * self.top1_agreement:g}% wanted"
            )
        return parts

    def open(self, found: Accuracy) -> bool:
        """Whether the interval of the agreement holds the bound."""
        low, high = found.top1_interval or (1.0, 1.0)
        return low < self.top1_agreement <= high


ACCURACY_BOUNDS: Mapping[Precision, AccuracyBounds] = {
    "fp16": AccuracyBounds(cosine_mean=0.9999, top1_agreement=0.99),
    "bf16": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.98),
    "int8": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97),
    "fp8": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97),
    "int8-weight": AccuracyBounds(cosine_mean=0.9995, top1_agreement=0.98),
    "int4-weight": AccuracyBounds(cosine_mean=0.99, top1_agreement=0.9),
}


class TextReference:
    """The reference's answers to texts, asked once and only for as many rounds as are needed.

    Args:
        reference: computes the right answers.
        rounds: the batches of each round, see `text_batches`: the first measures everything, the others add masks.
        spec: of the model.
    """

    def __init__(self, reference: Runs, rounds: Rounds, spec: ModelSpec) -> None:
        self._reference, self._rounds, self._spec = reference, rounds, spec
        self._answers: dict[int, list[Needed]] = {}

    def compare(self, candidate: Runs, bounds: AccuracyBounds | None = None) -> Accuracy:
        """The candidate's accuracy on the first round, and with `bounds` on further ones while these are `open`."""
        cosines, words = _Cosines(), _Words()
        for number in range(len(self._rounds)):
            for (batch, wanted), expected in zip(self._rounds[number], self._expected(number), strict=True):
                found = _needed(candidate.run(batch, self._names(number)), batch, self._spec)
                if number == 0:
                    cosines.add(found, expected, batch, candidate)
                if "best" in found:
                    words.add(found["best"], expected["best"], wanted, batch)
            accuracy = Accuracy(**cosines.measures(), **words.measures())
            if bounds is None or not bounds.open(accuracy) or number == len(self._rounds) - 1:
                return accuracy
        raise ValueError("there is no round of texts to compare answers on")

    def _expected(self, number: int) -> list[Needed]:
        """Of one round, kept as small as the comparison needs them."""
        if number not in self._answers:
            self._answers[number] = [
                _needed(self._reference.run(batch, self._names(number)), batch, self._spec)
                for batch, _ in self._rounds[number]
            ]
        return self._answers[number]

    def _names(self, number: int) -> tuple[str, ...]:
        hidden, *more = TASKS[self._spec.task].outputs
        extra = () if TASKS[self._spec.task].has_labels else tuple(more)  # labels say little of a text
        return (hidden, *extra) if number == 0 else extra


class _Cosines:
    """Of hidden states and sentence embeddings, batch after batch."""

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
    """The five best words of candidate and reference, batch after batch."""

    def __init__(self) -> None:
        self._found: list[NDArray[np.int64]] = []
        self._expected: list[NDArray[np.int64]] = []
        self._wanted: list[NDArray[np.int64]] = []
        self._texts: list[NDArray[np.int64]] = []

    def add(
        self, found: NDArray[np.int64], expected: NDArray[np.int64], wanted: NDArray[np.int64], batch: Batch
    ) -> None:
        """`found` and `expected` are [M, 5], best first, and `wanted` [M] what stood there."""
        assert batch.mask_positions is not None
        self._found.append(found)
        self._expected.append(expected)
        self._wanted.append(wanted)
        first = int(self._texts[-1].max()) + 1 if self._texts else 0
        self._texts.append(batch.mask_positions[:, 0] + first)

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
    """The 95 % interval of the rate of `same` [M], of words that stand in `texts` [M].

    Wilson's (1927), which holds for rates near 1 and for few words, where the normal one does not. Words of one text
    err together, so that they count for fewer: their number is divided by the ratio of the variance between texts to
    that of independent words (the design effect; Kish 1965), where that is above 1.

    Args:
        same: at least one.
        texts: number of the text of each.
    """
    count, rate = float(len(same)), float(same.mean())
    _, of = np.unique(texts, return_inverse=True)
    clusters = int(of.max()) + 1
    independent = rate * (1 - rate) / count
    if clusters > 1 and independent > 0:
        between = float((np.bincount(of, same - rate) ** 2).sum()) / count**2 * clusters / (clusters - 1)
        count /= max(1.0, between / independent)
    spread = _Z**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return centre - half if rate > 0 else 0.0, centre + half if rate < 1 else 1.0


def _needed(outputs: Outputs, batch: Batch, spec: ModelSpec) -> Needed:
    """What is kept of `outputs`: of hidden states `tokens` [T, H] and `sentences` [N, H], of logits `best` [M, 5]
    ids, best first (fill-mask).
    """
    needed: dict[str, Any] = {}
    if (hidden := outputs.get("last_hidden_state")) is not None:
        sentences = next((outputs[name] for name in _SENTENCES if name in outputs), None)
        if sentences is None:
            sentences = pool(hidden, batch.attention_mask, "mean")
        needed = {"tokens": hidden[batch.attention_mask.astype(bool)], "sentences": sentences}
    if spec.task == "fill-mask" and batch.mask_positions is not None:
        needed["best"] = _five_best(logits_of_masks(spec, batch.mask_positions, outputs["logits"]))
    return needed


def _five_best(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    left, best = logits.copy(), np.empty((len(logits), 5), np.int64)
    for rank in range(5):  # a dozen times as fast as to sort or to partition a vocabulary
        best[:, rank] = left.argmax(axis=1)
        left[np.arange(len(left)), best[:, rank]] = -np.inf
    return best


def _cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    # A text may have no sparse weight at all: the same on both sides is equal, on one side alone as far as can be.
    none = ~a.any(axis=1), ~b.any(axis=1)
    norms = np.where(none[0] | none[1], 1.0, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.where(none[0] & none[1], 1.0, np.einsum("ij,ij->i", a, b) / norms)

"""What a precision costs on real text: the candidate's answers beside PyTorch's FP32 answers.

Parity says that a graph computes what the model does; this says how much of the model's use is left where it does not
quite. Shapes: T real tokens, N rows, M masks, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.exporters.parity_batches import last_row_alone
from gte_deploy.spec import ModelSpec, Precision

Outputs = Mapping[str, NDArray[np.float32]]
TextBatch = tuple[Batch, NDArray[np.int64]]


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
    top1_agreement: float | None
    top5_agreement: float | None
    top1: tuple[float, float] | None
    top5: tuple[float, float] | None
    tokens: int
    masks: int


@dataclass(frozen=True)
class AccuracyBounds:
    """The least that a precision may keep; see `Accuracy`."""

    cosine_mean: float
    top1_agreement: float

    def missed(self, found: Accuracy) -> list[str]:
        """What falls short, in words; empty where all is well. NaN falls short."""
        parts = [
            f"{name} cosine {value:.5f} on average, at least {self.cosine_mean} wanted"
            for name, value in (
                ("token", found.token_cosine_mean),
                ("sentence", found.sentence_cosine_mean),
                ("row alone", found.alone_cosine_mean),
            )
            if not value >= self.cosine_mean
        ]
        if found.top1_agreement is not None and not found.top1_agreement >= self.top1_agreement:
            parts.append(
                f"the best answer for a mask is PyTorch's in {found.top1_agreement:.1%} of {found.masks:,}, at least "
                f"{self.top1_agreement:.0%} wanted"
            )
        return parts


ACCURACY_BOUNDS: Mapping[Precision, AccuracyBounds] = {
    "fp16": AccuracyBounds(cosine_mean=0.9999, top1_agreement=0.99),
    "bf16": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.98),
    "int8": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97),
    "fp8": AccuracyBounds(cosine_mean=0.999, top1_agreement=0.97),
    "int8-weight": AccuracyBounds(cosine_mean=0.9995, top1_agreement=0.98),
    "int4-weight": AccuracyBounds(cosine_mean=0.99, top1_agreement=0.9),
}


def reference_outputs(reference: Runs, batches: Sequence[TextBatch], spec: ModelSpec) -> list[Outputs]:
    """The reference's answers to every batch, kept as small as the comparison needs them."""
    return [_needed(reference.run(batch, _names(spec)), batch, spec) for batch, _ in batches]


def measure_accuracy(
    candidate: Runs,
    references: Iterable[Outputs],
    batches: Sequence[TextBatch],
    spec: ModelSpec,
) -> Accuracy:
    """Run `batches` through the candidate and compare with `reference_outputs` of the same."""
    tokens, sentences, masks, alone = [], [], [], [np.ones(1)]
    for (batch, wanted), expected in zip(batches, references, strict=True):
        found = _needed(candidate.run(batch, _names(spec)), batch, spec)
        tokens.append(_cosine(found["tokens"], expected["tokens"]))
        sentences.append(_cosine(found["sentences"], expected["sentences"]))
        if "best" in found:
            masks.append((found["best"], expected["best"], wanted))
        if len(batch.input_ids) > 1:
            single = last_row_alone(batch)
            (row,) = candidate.run(single, ("last_hidden_state",))["last_hidden_state"]
            alone.append(_cosine(found["tokens"][-len(row) :], row))
    token, sentence = np.concatenate(tokens), np.concatenate(sentences)
    words = _words(*(np.concatenate(parts) for parts in zip(*masks, strict=True))) if masks else _NO_WORDS
    return Accuracy(
        token_cosine_mean=float(token.mean()),
        token_cosine_min=float(token.min()),
        sentence_cosine_mean=float(sentence.mean()),
        sentence_cosine_min=float(sentence.min()),
        alone_cosine_mean=float(np.concatenate(alone[1:] or alone).mean()),
        tokens=len(token),
        **words,
    )


_SENTENCES = ("sentence_embedding", "sparse_embedding")
_NO_WORDS: dict[str, Any] = {"top1_agreement": None, "top5_agreement": None, "top1": None, "top5": None, "masks": 0}


def _words(found: NDArray[np.int64], expected: NDArray[np.int64], wanted: NDArray[np.int64]) -> dict[str, Any]:
    """The five best words of candidate and reference, [M, 5] each, and the right ones [M]."""
    shared = [len(np.intersect1d(a, b)) / 5 for a, b in zip(found, expected, strict=True)]
    return {
        "top1_agreement": float((found[:, 0] == expected[:, 0]).mean()),
        "top5_agreement": float(np.mean(shared)),
        "top1": tuple(float((best[:, 0] == wanted).mean()) for best in (found, expected)),
        "top5": tuple(float((best == wanted[:, None]).any(axis=1).mean()) for best in (found, expected)),
        "masks": len(wanted),
    }


def _names(spec: ModelSpec) -> tuple[str, ...]:
    extra = {"fill-mask": ("logits",), "embed": ("sentence_embedding",), "sparse": ("sparse_embedding",)}
    return ("last_hidden_state", *extra.get(spec.task, ()))


def _needed(outputs: Outputs, batch: Batch, spec: ModelSpec) -> Outputs:
    """`tokens` [T, H], `sentences` [N, H] and, for fill-mask, `best` [M, 5] ids, best first."""
    hidden, real = outputs["last_hidden_state"], batch.attention_mask.astype(bool)
    mean = [rows[mask].mean(axis=0) for rows, mask in zip(hidden, real, strict=True)]
    sentences = next((outputs[name] for name in _SENTENCES if name in outputs), np.array(mean))
    needed = {"tokens": hidden[real], "sentences": sentences}
    if spec.task == "fill-mask" and batch.mask_positions is not None:
        logits = outputs["logits"]
        if spec.logits == "all":
            logits = logits[tuple(batch.mask_positions.T)]
        needed["best"] = _five_best(logits)
    return needed


def _five_best(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    some = np.argpartition(-logits, 5, axis=1)[:, :5]
    order = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)


def _cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    # A text may have no sparse weight at all: the same on both sides is equal, on one side alone as far as can be.
    none = ~a.any(axis=1), ~b.any(axis=1)
    norms = np.where(none[0] | none[1], 1.0, np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.where(none[0] & none[1], 1.0, np.einsum("ij,ij->i", a, b) / norms)

"""Measures how the outputs of a candidate differ from those of PyTorch.

Shapes: B rows, S tokens of the longest row, T real (not padding) tokens, M masks, V vocabulary, L labels, D the last
axis of a compared array.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import ParityError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.verification.accuracy import Runs, five_best
from gte_deploy.exporters.verification.bounds import Tolerance
from gte_deploy.exporters.verification.cases import Case, last_row_alone
from gte_deploy.tasks.base import Outputs
from gte_deploy.tasks.fill_mask import logits_of_masks
from gte_deploy.tasks.sparse import TOKEN_WEIGHTS

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Difference:
    """The difference between a candidate and a reference; NaN if the candidate is not finite.

    Args:
        max_abs: largest |candidate − reference|.
        max_rel: largest |candidate − reference|, divided by the scale of its component; see `Scales`.
        cosine_mean: mean cosine of the vectors along the last axis; 1 for labels.
        cosine_min: the smallest of these cosines.
        labels: whether the components are labels.
    """

    max_abs: float
    max_rel: float
    cosine_mean: float
    cosine_min: float
    labels: bool = False

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the difference keeps the bounds of a single comparison; NaN never does."""
        relative = tolerance.labels if self.labels and tolerance.labels is not None else tolerance.max_rel
        return (
            self.cosine_min >= tolerance.cosine_min
            and math.isfinite(self.max_rel)
            and (relative is None or self.max_rel <= relative)
        )


@dataclass(frozen=True)
class CaseResult:
    """The result of one case.

    Args:
        case: the shape of the batch.
        outputs: output's name -> difference from PyTorch on the real tokens.
        alone: output's name -> difference of the shortest row in the batch from the same row alone; ragged cases only.
        parts: output's name -> difference from PyTorch on the real tokens, computed by a part of the graph.
        all_logits: output's name -> difference from PyTorch, computed by the graph with all logits: hidden states on
            the real tokens, logits at the masks. Empty if there is none, or if the batch has too many tokens for it.
        finite: whether every number of every output is finite, padding included.
        masks: number of masks in the batch.
        top1: share of masks whose best token is PyTorch's; fill-mask only.
        top5: mean overlap of the five best tokens with PyTorch's; fill-mask only.
    """

    case: Case
    outputs: Mapping[str, Difference]
    alone: Mapping[str, Difference]
    parts: Mapping[str, Difference]
    all_logits: Mapping[str, Difference]
    finite: bool
    masks: int
    top1: float | None
    top5: float | None

    def compared(self) -> dict[str, Difference]:
        """Return every difference from PyTorch by its name."""
        parts = {f"{name}, by a part of the graph": found for name, found in self.parts.items()}
        all_logits = {f"{name}, by the graph with all logits": found for name, found in self.all_logits.items()}
        return {**self.outputs, **parts, **all_logits}

    def differences(self) -> list[tuple[str, Difference]]:
        """Return every difference of the case with its name."""
        return [
            *self.compared().items(),
            *((f"{name}, row alone", found) for name, found in self.alone.items()),
        ]

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the case is finite and every comparison is within the bounds."""
        return self.finite and all(found.within(tolerance) for _, found in self.differences())


@dataclass(frozen=True)
class Deviation:
    """A difference before the scale of its output is known.

    Args:
        max_abs: [D] float64, the largest |candidate − reference| of each component.
        cosine_mean: see `Difference`.
        cosine_min: see `Difference`.
        labels: see `Difference`.
    """

    max_abs: NDArray[np.float64]
    cosine_mean: float
    cosine_min: float
    labels: bool

    def over(self, scale: NDArray[np.float64]) -> Difference:
        """Return the difference for components of size `scale` [D]."""
        relative = self.max_abs / np.maximum(scale, np.finfo(np.float32).tiny)
        return Difference(
            float(self.max_abs.max()), float(relative.max()), self.cosine_mean, self.cosine_min, self.labels
        )


class Scales:
    """The sizes of a reference's outputs, by which differences are divided.

    The scale of a component is its largest |value| over the real tokens, rows and masks of all cases. So a fault shows
    even in the smallest of several channels or labels, and a number near 0 may be as far off as a larger number of the
    same component. A component that is near 0 everywhere gets a larger scale:

    * in a wide output (hidden states, embeddings, a vocabulary's logits), the root mean square of the whole output;
    * for a label, whose terms may cancel in the sum, √(Σ(w·x)² + b²) of the terms, since the terms are what is rounded.
      The scale of a label does not depend on other labels.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = labels
        self._amax: dict[str, NDArray[np.float64]] = {}
        self._squares: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: NDArray[np.float32]) -> None:
        """Record an output's real vectors [..., D]."""
        rows = values.reshape(-1, values.shape[-1])
        amax = np.maximum(rows.max(axis=0), -rows.min(axis=0)).astype(np.float64)
        self._amax[name] = np.maximum(self._amax.get(name, 0.0), amax)
        squares, count = self._squares.get(name, (0.0, 0))
        self._squares[name] = squares + float(np.square(rows, dtype=np.float64).sum()), count + rows.size

    def of(self, name: str, terms: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Return the scale [D] of an output; `terms` [L] are the √(Σ(w·x)² + b²) of labels, if known."""
        squares, count = self._squares[name]
        floor = math.sqrt(squares / count) if name not in self.labels else 0.0 if terms is None else terms
        return np.maximum(self._amax[name], floor)


def compare(reference: NDArray[np.float32], candidate: NDArray[np.float32], *, labels: bool = False) -> Difference:
    """Compare two arrays of vectors [..., D] in float64, relative to the scale of `reference` itself.

    Raises:
        ParityError: the shapes differ.
    """
    scales = Scales(["output"] if labels else [])
    scales.add("output", reference)
    return deviation(reference, candidate, labels=labels).over(scales.of("output"))


def deviation(reference: NDArray[np.float32], candidate: NDArray[np.float32], *, labels: bool = False) -> Deviation:
    """Compare two arrays of vectors [..., D] in float64.

    Raises:
        ParityError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ParityError(f"PyTorch gives shape {list(reference.shape)} and the graph {list(candidate.shape)}")
    width = reference.shape[-1]
    expected, found = reference.reshape(-1, width), candidate.reshape(-1, width)
    step = max(1, CHUNK_ELEMENTS // width)  # float64 copies of 1 GiB of logits would be 4 GiB
    parts = [
        _deviation(expected[i : i + step], found[i : i + step], labels=labels) for i in range(0, len(expected), step)
    ]
    cosine = np.concatenate([cosines for _, cosines in parts])
    return Deviation(
        max_abs=np.max([part for part, _ in parts], axis=0),  # numpy's max keeps a NaN
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        labels=labels,
    )


def _deviation(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], *, labels: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the largest |difference| of each component, and the cosine of each pair of rows."""
    expected, found = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.abs(found - expected).max(axis=0)
        if labels:  # the cosine of one label is only its sign, and that of several hides errors of the smaller ones
            return difference, np.where(np.isfinite(found).all(axis=1), 1.0, np.nan)
        norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
        cosine = np.einsum("ij,ij->i", expected, found) / norms
    both_zero = ~expected.any(axis=1) & ~found.any(axis=1)
    return difference, np.where(both_zero, 1.0, cosine)


@dataclass(frozen=True)
class CaseRun:
    """A candidate's run of a case, before the scales of all cases are known."""

    result: CaseResult
    outputs: Mapping[str, Deviation]
    alone: Mapping[str, Deviation]
    parts: Mapping[str, Deviation]
    all_logits: Mapping[str, Deviation]

    def over(self, scale_of: Mapping[str, NDArray[np.float64]]) -> CaseResult:
        """Return the result for outputs whose components are of size `scale_of`."""
        outputs, alone, parts, all_logits = (
            {name: found.over(scale_of[name]) for name, found in side.items()}
            for side in (self.outputs, self.alone, self.parts, self.all_logits)
        )
        return dataclasses.replace(self.result, outputs=outputs, alone=alone, parts=parts, all_logits=all_logits)


class CaseComparison:
    """Runs batches on the reference and on candidates, and measures their differences.

    Args:
        outputs: names of the compared outputs.
        spec: the model's facts.
    """

    def __init__(self, outputs: Sequence[str], spec: ModelSpec) -> None:
        self._outputs, self._spec = outputs, spec
        labels = {"classify": "logits", "token-classify": "logits", "hybrid": TOKEN_WEIGHTS}.get(spec.task)
        self.scales = Scales([] if labels is None else [labels])
        self.rounding: list[tuple[str, Deviation]] = []
        """(output, difference of the reference's own results for a row in a batch and for the row alone)."""

    def reference(self, side: Runs, case: Case, batch: Batch) -> Outputs:
        """Run the reference, and add its outputs to `scales` and its own rounding to `rounding`."""
        expected = side.run(batch, self._outputs)
        for name in self._outputs:
            self.scales.add(name, self._real(expected[name], batch))
        if case.ragged:
            self.rounding += self._alone(side, expected, batch).items()
        return expected

    def candidate(
        self,
        side: Runs,
        case: Case,
        batch: Batch,
        expected: Outputs,
        parts: Sequence[Sequence[str]] = (),
        all_logits: Runs | None = None,
    ) -> CaseRun:
        """Run a candidate, the parts of its graph (see `Comparison`), and its graph with all logits, if there is one.

        Compare the outputs with the reference's.
        """
        found = side.run(batch, self._outputs)
        alone = self._alone(side, found, batch) if case.ragged else {}
        whole = {name: found[name] for name in self._outputs}
        by_parts: dict[str, NDArray[np.float32]] = {}
        for names in parts:
            outputs = side.run(batch, names)
            by_parts |= {name: outputs[name] for name in names}
        by_all = {} if all_logits is None else _at_masks(all_logits.run(batch, self._outputs), batch)
        top1, top5 = _agreement(expected, found, batch, self._spec)
        result = CaseResult(
            case=case,
            outputs={},
            alone={},
            parts={},
            all_logits={},
            finite=all(np.isfinite(values).all() for side in (whole, by_parts, by_all) for values in side.values()),
            masks=0 if batch.mask_positions is None else len(batch.mask_positions),
            top1=top1,
            top5=top5,
        )
        compared, of_parts, of_all = (
            {
                name: self._deviation(name, self._real(expected[name], batch), self._real(values, batch))
                for name, values in computed.items()
            }
            for computed in (whole, by_parts, by_all)
        )
        return CaseRun(result, compared, alone, of_parts, of_all)

    def _alone(self, side: Runs, found: Outputs, batch: Batch) -> dict[str, Deviation]:
        """Compare the last row of `found`, which `side` computed in a batch, with the same row alone."""
        single = side.run(last_row_alone(batch), self._outputs)
        return {name: self._deviation(name, single[name], _of_last_row(found[name], batch)) for name in self._outputs}

    def _real(self, values: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
        """Drop padding: [B, S, D] -> [T, D]; outputs with one vector for each row or mask have no padding.

        A multi-vector model that scores tokens without attention computes them as padding. So padding is compared in
        the places that queries are lengthened to.
        """
        if values.ndim != 3:
            return values
        compared = batch.attention_mask.astype(bool)
        late = self._spec.multi_vector
        if late is not None and late.expansion is not None and not late.expansion.attended:
            compared[:, : late.expansion.length] = True
        return values[compared]

    def _deviation(self, name: str, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> Deviation:
        return deviation(reference, candidate, labels=name in self.scales.labels)


def _at_masks(found: Outputs, batch: Batch) -> dict[str, NDArray[np.float32]]:
    """Return the outputs with the logits of masked tokens alone, [B, S, V] -> [M, V]."""
    assert batch.mask_positions is not None  # only fill-mask has logits of all tokens
    rows, tokens = batch.mask_positions.T
    return {name: values[rows, tokens] if name == "logits" else values for name, values in found.items()}


def _of_last_row(values: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """Return the last row's part of a batch's `values`, in the shapes of a run of `last_row_alone`."""
    if values.ndim == 3:  # [B, S, D]
        return values[-1:, : int(batch.attention_mask[-1].sum())]
    if batch.mask_positions is not None:  # [M, V]
        return values[batch.mask_positions[:, 0] == len(batch.input_ids) - 1]
    return values[-1:]  # [B, D]


def _agreement(expected: Outputs, found: Outputs, batch: Batch, spec: ModelSpec) -> tuple[float | None, float | None]:
    """Return fill-mask's top-1 agreement and top-5 overlap at the masks; (None, None) for other tasks."""
    if batch.mask_positions is None:
        return None, None
    best = [five_best(logits_of_masks(spec, batch.mask_positions, side["logits"])) for side in (expected, found)]
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*best, strict=True)]
    return float(np.mean(best[0][:, 0] == best[1][:, 0])), float(np.mean(shared))

"""How far an exported graph may be from PyTorch, and how a difference is measured.

Shapes: T rows that are compared, D the last axis of whatever is compared, L labels.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import ParityError
from gte_deploy.core.spec import ComputePrecision, Precision

Bounds = Literal["strict", "report"]


CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Tolerance:
    """How far from PyTorch FP32 a candidate may be. None leaves a measure unbounded.

    Nothing is bounded in absolute terms: what a checkpoint's last LayerNorm or head is scaled by changes no answer, so
    it must change no verdict. See `Scales` for what a difference is divided by.

    Args:
        max_rel: largest difference of hidden states, embeddings and vocabulary logits over the scale of its component.
        cosine_min: smallest cosine between any two corresponding vectors.
        cosine_mean: mean cosine of an output over all cases, each case counting the same.
        labels: as `max_rel`, of the labels' logits, which are numbers of their own and have no cosine; None for
            `max_rel`.
        top1: share of all masks whose best token is PyTorch's.
    """

    cosine_min: float
    cosine_mean: float | None = None
    max_rel: float | None = None
    labels: float | None = None
    top1: float | None = None

    def __str__(self) -> str:
        """The bounds in words."""
        bounds = ((field.name.replace("_", " "), getattr(self, field.name)) for field in dataclasses.fields(self))
        return ", ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)


TOLERANCES: Mapping[Precision | ComputePrecision, Tolerance] = {
    # Both sides take FP32 rotation angles from the same table, so what is left is the order of FP32 sums. Measured with
    # outputs multiplied by 1e-3 to 1e4 (benchmarks/parity_scales.py, docs/numerics.md): 1e-6 to 1e-5 for models of few
    # layers and trained ones, the same at every scale; 1e-4 to 4e-4 for random ones of twelve, see `widened`. A bias
    # dropped, an angle or a weight wrong, or padding that leaks gives some 1e-2 to 1.
    "fp32": Tolerance(max_rel=1e-4, cosine_min=0.99999),
    # Eleven bits of significand in every product, sums in FP32.
    "fp16": Tolerance(max_rel=0.02, cosine_min=0.9999, cosine_mean=0.99999),
    # Eight bits of significand in every product.
    "bf16": Tolerance(max_rel=0.05, cosine_min=0.999, cosine_mean=0.9999),
    # Half of these tokens are random ids, far from any calibration text: that nothing is broken. What a precision is
    # good for is measured on text, see accuracy.py. A label may be as far off as a vector at the smallest cosine c:
    # √(2(1 − c)) of its size.
    "int8": Tolerance(cosine_min=0.9, cosine_mean=0.99, labels=0.45),
    "fp8": Tolerance(cosine_min=0.8, cosine_mean=0.97, labels=0.63),
    "int8-weight": Tolerance(cosine_min=0.98, cosine_mean=0.999, labels=0.2),
    "int4-weight": Tolerance(cosine_min=0.8, cosine_mean=0.97, labels=0.63),
}


def tolerance_of(precision: Precision, compute: Precision) -> Tolerance:
    """The row for a bundle's precision and what an engine computes in: the coarser of the two decides."""
    return TOLERANCES[compute if precision == "fp32" else precision]


@dataclass(frozen=True)
class Difference:
    """How a candidate differs from a reference; NaN where the candidate is not finite.

    Args:
        max_abs: largest |candidate − reference|.
        max_rel: largest |candidate − reference| over the scale of its component, see `Scales`.
        cosine_mean: mean cosine of the vectors along the last axis; 1 for labels.
        cosine_min: the smallest of them.
        labels: whether the components are labels.
    """

    max_abs: float
    max_rel: float
    cosine_mean: float
    cosine_min: float
    labels: bool = False

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the bounds of a single comparison hold; never for NaN."""
        relative = tolerance.labels if self.labels and tolerance.labels is not None else tolerance.max_rel
        return (
            self.cosine_min >= tolerance.cosine_min
            and math.isfinite(self.max_rel)
            and (relative is None or self.max_rel <= relative)
        )


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
        """The difference where the components are of size `scale` [D]."""
        relative = self.max_abs / np.maximum(scale, np.finfo(np.float32).tiny)
        return Difference(
            float(self.max_abs.max()), float(relative.max()), self.cosine_mean, self.cosine_min, self.labels
        )


class Scales:
    """How large the outputs of a reference are: what a difference is divided by.

    The scale of a component is its largest |value| over every real token, row and mask of all cases. So a fault shows
    in the smallest of several channels or labels, and a number near 0 may be as far off as its larger neighbours.
    Where that says too little, something larger stands in:

    * a component of a wide output (hidden states, embeddings, a vocabulary's logits) that happens to be near 0
      everywhere: the root mean square of the whole output;
    * a label that is near 0 everywhere because what it sums cancels: √(Σ(w·x)² + b²) of the terms themselves, since it
      is these that are rounded. Labels are not measured by each other.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = labels
        self._peaks: dict[str, NDArray[np.float64]] = {}
        self._squares: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: NDArray[np.float32]) -> None:
        """Take note of an output's real vectors [..., D]."""
        rows = values.reshape(-1, values.shape[-1])
        peak = np.maximum(rows.max(axis=0), -rows.min(axis=0)).astype(np.float64)
        self._peaks[name] = np.maximum(self._peaks.get(name, 0.0), peak)
        squares, count = self._squares.get(name, (0.0, 0))
        self._squares[name] = squares + float(np.square(rows, dtype=np.float64).sum()), count + rows.size

    def of(self, name: str, terms: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """[D] of an output; `terms` [L] are those of labels, where they are known."""
        squares, count = self._squares[name]
        floor = math.sqrt(squares / count) if name not in self.labels else 0.0 if terms is None else terms
        return np.maximum(self._peaks[name], floor)


# Deep models with peaked attention, and saturated poolers, amplify FP32's rounding. How much shows in PyTorch itself,
# where a row alone is summed in another order than in a batch. That sample is of few rows, hence the factor; a wrong
# graph of such a model is off by more than the cap, since it is amplified too (docs/numerics.md).
_ROUNDING_FACTOR = 20


_ROUNDING_CAP = 1e-3


def widened(tolerance: Tolerance, rounding: Sequence[Difference]) -> Tolerance:
    """FP32's row for a model in which PyTorch's own rounding makes the differences `rounding`."""

    def bound(labels: bool) -> float | None:
        found = [each.max_rel for each in rounding if each.labels == labels]
        if tolerance.max_rel is None or not found:
            return None
        return max(tolerance.max_rel, min(_ROUNDING_CAP, float(f"{_ROUNDING_FACTOR * max(found):.2g}")))

    return dataclasses.replace(tolerance, max_rel=bound(False) or tolerance.max_rel, labels=bound(True))


def compare(reference: NDArray[np.float32], candidate: NDArray[np.float32], *, labels: bool = False) -> Difference:
    """Compare two arrays of vectors [..., D] in float64, by the scale of `reference` itself.

    Raises:
        ParityError: the shapes differ.
    """
    scales = Scales(["it"] if labels else [])
    scales.add("it", reference)
    return deviation(reference, candidate, labels=labels).over(scales.of("it"))


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
    """Largest |difference| of each component, and the cosine of each pair of rows."""
    expected, found = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.abs(found - expected).max(axis=0)
        if labels:  # of one label a cosine would be a sign, and of several it would say nothing of the smaller ones
            return difference, np.where(np.isfinite(found).all(axis=1), 1.0, np.nan)
        norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
        cosine = np.einsum("ij,ij->i", expected, found) / norms
    both_zero = ~expected.any(axis=1) & ~found.any(axis=1)
    return difference, np.where(both_zero, 1.0, cosine)

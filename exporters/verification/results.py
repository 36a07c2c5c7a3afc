"""The results of a comparison with PyTorch, for each engine and as the report of an export."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gte_deploy.bundle.manifest import TextsEntry
from gte_deploy.core.errors import ParityError
from gte_deploy.core.spec import PRECISIONS, DeviceType, Engine, Precision, engine_title
from gte_deploy.exporters.verification.accuracy import Accuracy, AccuracyBounds
from gte_deploy.exporters.verification.bounds import Bounds, Tolerance
from gte_deploy.exporters.verification.cases import Case
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.exporters.verification.differences import CaseResult

_CALIBRATE = (
    "Calibrate on texts like those that will be served (--calibration, or --languages multilingual for texts in other "
    "scripts than Latin), or take a finer precision."
)
# Advice for a precision that misses its bounds.
_FINER: Mapping[Precision, str] = {
    "int8": _CALIBRATE,
    "fp8": _CALIBRATE,
    "int8-weight": "Take a finer precision: fp32.",
    "int4-weight": "Take a finer precision: int8-weight or fp32.",
    "fp16": "Take bf16, which has the range of fp32, or fp32.",
    "bf16": "Take fp16, which has three bits more, or fp32.",
}
FP16_OVERFLOWS = f"FP16 ends at 65,504, and this model has larger values. {_FINER['fp16']}"
_REPORT = "--bounds report writes the bundle, and its manifest lists the misses."
# A relative difference below this may be FP32's rounding, which the model's weights amplify; a wrong graph gives more.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class EngineParity:
    """All cases of one engine, its accuracy on text if it was measured, and the bounds of both.

    Args:
        engine: the engine.
        compute: the precision that it computes in where its graph leaves it the choice, else that of the graph.
        precision: the precision of the bundle.
        tolerance: the bounds on the cases.
        cases: the result of each batch.
        accuracy: the accuracy on text, if it was measured.
        accuracy_bounds: the bounds on it.
        optional: whether the bundle is valid if this engine misses its bounds in this precision.
        emulated: whether an emulation computed the numbers in place of the engine.
        device: the device that ONNX Runtime's graph is for.
    """

    engine: Engine
    compute: Precision
    precision: Precision
    tolerance: Tolerance
    cases: tuple[CaseResult, ...]
    accuracy: Accuracy | None = None
    accuracy_bounds: AccuracyBounds | None = None
    optional: bool = False
    emulated: bool = False
    device: DeviceType = "cpu"

    @property
    def title(self) -> str:
        """The engine and what it computes in, see `engine_title`."""
        return engine_title(self.engine, self.precision, self.compute, device=self.device, emulated=self.emulated)

    @property
    def bounds(self) -> str:
        """The bounds on the cases in words; the one on labels only for a model that has labels."""
        has_labels = any(found.labels for result in self.cases for _, found in result.differences())
        return str(self.tolerance if has_labels else dataclasses.replace(self.tolerance, labels=None))

    @property
    def passed(self) -> bool:
        """Whether every case and the means over them are within the bounds."""
        return not self.failures()

    @property
    def max_abs(self) -> float:
        """The largest absolute difference of all cases; NaN if any is."""
        return float(np.max([found.max_abs for result in self.cases for _, found in result.differences()]))

    @property
    def max_rel(self) -> float:
        """The largest relative difference of all cases; NaN if any is."""
        return float(np.max([found.max_rel for result in self.cases for _, found in result.differences()]))

    @property
    def cosine_min(self) -> float:
        """The smallest cosine of all cases; NaN if any is."""
        return float(np.min([found.cosine_min for result in self.cases for _, found in result.differences()]))

    @property
    def cosine_mean(self) -> float:
        """The mean cosine over the cases of the output where it is lowest; NaN if any is."""
        found: dict[str, list[float]] = {}
        for result in self.cases:
            for name, difference in result.compared().items():
                found.setdefault(name, []).append(difference.cosine_mean)
        return float(np.min([np.mean(cosines) for cosines in found.values()]))

    @property
    def top1(self) -> float | None:
        """Share of all masks whose best token is PyTorch's; fill-mask only."""
        shares = [(result.top1, result.masks) for result in self.cases if result.top1 is not None]
        return sum(share * masks for share, masks in shares) / sum(masks for _, masks in shares) if shares else None

    def broken(self) -> list[str]:
        """Return the defects that no bundle may have, whatever its bounds: numbers that are not finite."""
        lines = [f"{_title(result.case)}: a number is not finite" for result in self.cases if not result.finite]
        if self.accuracy is not None and not math.isfinite(self.accuracy.token_cosine_mean):
            lines.append("on text: a number is not finite")
        return lines

    def failures(self) -> list[str]:
        """Return one line for each missed bound."""
        failed = [_failure(result, self.tolerance) for result in self.cases if not result.within(self.tolerance)]
        for name, found, bound in (
            ("mean cosine", self.cosine_mean, self.tolerance.cosine_mean),
            ("top-1 agreement", self.top1, self.tolerance.top1),
        ):
            if bound is not None and found is not None and not found >= bound:
                failed.append(f"{name} over all cases {found:.7f}")
        if self.accuracy is not None and self.accuracy_bounds is not None:
            failed += [f"on text: {part}" for part in self.accuracy_bounds.missed(self.accuracy)]
        return failed

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON data."""
        cases = [{**dataclasses.asdict(r), "passed": r.within(self.tolerance)} for r in self.cases]
        return {
            "engine": self.engine,
            "compute": self.compute,
            "title": self.title,
            "emulated": self.emulated,
            "optional": self.optional,
            "passed": self.passed,
            "bounds": dataclasses.asdict(self.tolerance),
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "cosine_min": self.cosine_min,
            "cosine_mean": self.cosine_mean,
            "top1": self.top1,
            "accuracy": self.accuracy and dataclasses.asdict(self.accuracy),
            "accuracy_bounds": self.accuracy_bounds and dataclasses.asdict(self.accuracy_bounds),
            "cases": [{**case.pop("case"), **case} for case in cases],
        }


@dataclass(frozen=True)
class ReferenceUse:
    """The source of PyTorch's outputs.

    Args:
        batches: number of batches on which PyTorch's outputs were needed.
        cached: number of these whose hidden states came from the cache; see `reference_cache`.
        oldest: the earliest day on which cached hidden states were computed, in ISO format; None if none are cached.
    """

    batches: int = 0
    cached: int = 0
    oldest: str | None = None

    def with_batch(self, cached_on: str | None) -> "ReferenceUse":
        """Return the counts with one more batch, cached on a day or computed now (None)."""
        if cached_on is None:
            return ReferenceUse(self.batches + 1, self.cached, self.oldest)
        return ReferenceUse(self.batches + 1, self.cached + 1, min(cached_on, self.oldest or cached_on))


@dataclass(frozen=True)
class ParityReport:
    """The comparison of every engine of one export with PyTorch.

    Args:
        precision: the bundle's precision.
        engines: the engines, each with its own bounds, over the same cases.
        caveats: one sentence for each thing that could not be compared here or is not verified.
        checks: the checks besides the comparison of graphs; see `with_checks`.
        reference: the source of PyTorch's outputs; None if no cache was used.
        texts: the texts that the accuracy was measured on; None if it was not.
    """

    precision: Precision
    engines: tuple[EngineParity, ...]
    caveats: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    reference: ReferenceUse | None = None
    texts: TextsEntry | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed and every engine is within its bounds; `optional` engines do not count."""
        return not self.failures()

    def with_checks(self, *checks: Check) -> "ParityReport":
        """Return the report with further checks, whose failures count like missed bounds."""
        return dataclasses.replace(self, checks=(*self.checks, *checks))

    def failures(self) -> list[str]:
        """Return one line for each missed bound and each failure of a check."""
        required = (engine for engine in self.engines if not engine.optional)
        return [f"{engine.title}: {line}" for engine in required for line in engine.failures()] + [
            f"{check.name}: {line}" for check in self.checks for line in (*check.broken, *check.failures)
        ]

    def broken(self) -> list[str]:
        """Return the defects that no bundle may have, whatever the bounds of the export."""
        required = (engine for engine in self.engines if not engine.optional)
        return [f"{engine.title}: {line}" for engine in required for line in engine.broken()] + [
            f"{check.name}: {line}" for check in self.checks for line in check.broken
        ]

    def verified(self, engine: Engine, *, emulated: bool = False) -> tuple[Precision, ...]:
        """Return the precisions that `engine` was verified to compute in; with `emulated`, only by an emulation."""
        passed = [found for found in self.engines if found.engine == engine and found.passed]
        computes = [found.compute for found in passed if found.emulated or not emulated]
        return tuple(compute for compute in PRECISIONS if compute in computes)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data; a number that is not finite becomes null."""
        return _finite_or_null(
            {
                "passed": self.passed,
                "precision": self.precision,
                "engines": [engine.to_json() for engine in self.engines],
                "not_proven": list(self.caveats),
                "checks": [check.to_json() for check in self.checks],
                "reference": self.reference and dataclasses.asdict(self.reference),
                "texts": self.texts and dataclasses.asdict(self.texts),
            }
        )

    def require(self, bounds: Bounds = "strict") -> None:
        """Raise unless `passed`; with bounds "report", only if something is `broken`.

        Raises:
            BoundMissedError: a comparison failed. The error names each failure with its numbers, and the bounds.
        """
        if self.broken() if bounds == "report" else self.failures():
            raise BoundMissedError(self)


class BoundMissedError(ParityError):
    """An engine misses its bounds, or a check failed; `report` holds every number."""

    def __init__(self, report: ParityReport) -> None:
        parts = [
            f"{engine.title} differs from PyTorch FP32 in {len(failures)} respects, over {len(engine.cases)} cases "
            f"(bounds: {engine.bounds}):\n  " + "\n  ".join(failures)
            for engine in report.engines
            if not engine.optional and (failures := engine.failures())
        ]
        parts += [
            f"the {check.name} differ from the checkpoint's own:\n  " + "\n  ".join((*check.broken, *check.failures))
            for check in report.checks
            if not check.passed
        ]
        super().__init__(
            f"the {report.precision} bundle: " + "\n".join(parts) + f"\nNo bundle was written. {_advice(report)}"
        )
        self.report = report


def _advice(report: ParityReport) -> str:
    """Return advice on what to do next."""
    missed = [engine for engine in report.engines if not engine.optional and engine.failures()]
    if report.broken():
        # TensorRT computes in FP16 between its 8-bit GEMMs.
        has_tensorrt = any(engine.engine == "tensorrt" for engine in report.engines)
        if report.precision == "fp16" or (has_tensorrt and report.precision in ("int8", "fp8")):
            return FP16_OVERFLOWS
        return "PyTorch's numbers are finite, and these are not: please report it, with the model's name."
    if not missed:
        please = "please report it, with the checkpoint's files"
        if report.precision == "fp32":
            return f"The checkpoint's own library is right: {please}. {_REPORT}"
        # PyTorch's numbers are close, so rounding moved these answers past their bounds, or a wrong reading did.
        return f"{_FINER[report.precision]} If an fp32 bundle differs too, {please}. {_REPORT}"
    if report.precision != "fp32":
        return f"{_FINER[report.precision]} {_REPORT}"
    fine = [engine.title for engine in report.engines if engine.passed and not engine.optional]
    if fine:
        blame = f"{' and '.join(fine)} agrees, so {' and '.join(engine.engine for engine in missed)} is at fault"
    elif max(engine.max_rel for engine in missed) < _ROUNDING:
        return f"The differences are small for a wrong graph: the weights may amplify FP32's rounding. {_REPORT}"
    else:
        blame = "The differences are too large for rounding"
    return f"{blame}: please report it, with the versions of the libraries. {_REPORT}"


def _title(case: Case) -> str:
    return f"length {case.length:,}, batch {case.batch}"


def _failure(result: CaseResult, tolerance: Tolerance) -> str:
    parts = [
        f"{name}: max abs {found.max_abs:.3g} (relative {found.max_rel:.2g}), smallest cosine {found.cosine_min:.7f}"
        for name, found in result.differences()
        if not found.within(tolerance)
    ]
    if not result.finite:
        parts.append("a number is not finite")
    return f"{_title(result.case)}: {'; '.join(parts)}"


def _finite_or_null(value: Any) -> Any:
    # JSON has neither NaN nor Infinity.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return value

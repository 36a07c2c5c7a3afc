"""Proof that an exported graph computes what PyTorch computes.

Shapes: B rows, S tokens of the longest row, T real (not padding) tokens, M masks, H hidden size, V vocabulary,
L labels, D the last axis of whatever is compared.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import CheckpointError, ParityError
from gte_deploy.core.spec import (
    COMPUTE_PRECISIONS,
    ComputePrecision,
    Engine,
    Logits,
    ModelSpec,
    Pooling,
    Precision,
    SparseSpec,
    Task,
)
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, Accuracy, AccuracyBounds, Runs, TextReference
from gte_deploy.exporters.verification.cases import (
    Case,
    TokenSource,
    last_row_alone,
    make_batch,
    max_tokens_of,
    parity_cases,
)
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.exporters.verification.texts import TextBatch
from gte_deploy.models.heads import (
    ClassifyHead,
    Head,
    HeadOptions,
    States,
    TokenClassifyHead,
    encode_padded,
    make_head,
)
from gte_deploy.tasks.base import HIDDEN

Bounds = Literal["strict", "report"]
_CHUNK_ELEMENTS = 1 << 22
_SEED = 20240729
# Of which the reference has the whole vocabulary's logits at the same time.
_TOKENS_AT_ONCE = 256


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
    # layers and trained ones, the same at every scale; 1e-4 to 4e-4 for random ones of twelve, see `_widened`. A bias
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


def _widened(tolerance: Tolerance, rounding: Sequence[Difference]) -> Tolerance:
    """FP32's row for a model in which PyTorch's own rounding makes the differences `rounding`."""

    def bound(labels: bool) -> float | None:
        found = [each.max_rel for each in rounding if each.labels == labels]
        if tolerance.max_rel is None or not found:
            return None
        return max(tolerance.max_rel, min(_ROUNDING_CAP, float(f"{_ROUNDING_FACTOR * max(found):.2g}")))

    return dataclasses.replace(tolerance, max_rel=bound(False) or tolerance.max_rel, labels=bound(True))


@dataclass(frozen=True)
class CaseResult:
    """What came of one case.

    Args:
        case: the batch.
        outputs: output's name -> difference from PyTorch on the real tokens.
        alone: output's name -> difference of the shortest row in the batch from the same row alone; ragged cases only.
        finite: whether every number of every output is finite, padding included.
        masks: how many masks the batch has.
        top1: share of masks whose best token is PyTorch's; fill-mask only.
        top5: mean overlap of the five best tokens with PyTorch's; fill-mask only.
        reference_ms: time of PyTorch's run.
        candidate_ms: time of the candidate's run.
    """

    case: Case
    outputs: Mapping[str, Difference]
    alone: Mapping[str, Difference]
    finite: bool
    masks: int
    top1: float | None
    top5: float | None
    reference_ms: float
    candidate_ms: float

    def differences(self) -> list[tuple[str, Difference]]:
        """Every comparison of the case, named."""
        return [*self.outputs.items(), *((f"{name}, row alone", found) for name, found in self.alone.items())]

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the case is finite and every comparison is within the bounds."""
        return self.finite and all(found.within(tolerance) for _, found in self.differences())


@dataclass(frozen=True)
class EngineParity:
    """All cases of one engine, its accuracy on text where that was asked for, and the bounds they were held to."""

    engine: Engine
    compute: Precision
    tolerance: Tolerance
    cases: tuple[CaseResult, ...]
    accuracy: Accuracy | None = None
    accuracy_bounds: AccuracyBounds | None = None

    @property
    def title(self) -> str:
        """Engine and what it computes in."""
        return f"{self.engine} {self.compute}"

    @property
    def optional(self) -> bool:
        """Whether this is a choice at load: the bundle is good without it, and then does not claim it."""
        return self.engine == "openvino" and self.compute != "fp32"

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
        """Of the output with the lowest: its mean cosine over the cases; NaN if any is."""
        means = [[found.cosine_mean for found in result.outputs.values()] for result in self.cases]
        return float(np.min(np.mean(means, axis=0)))

    @property
    def top1(self) -> float | None:
        """Share of all masks whose best token is PyTorch's; fill-mask only."""
        shares = [(result.top1, result.masks) for result in self.cases if result.top1 is not None]
        return sum(share * masks for share, masks in shares) / sum(masks for _, masks in shares) if shares else None

    def broken(self) -> list[str]:
        """What no bundle may do, whatever its bounds: numbers that are not finite."""
        lines = [f"{_title(result.case)}: a number is not finite" for result in self.cases if not result.finite]
        if self.accuracy is not None and not math.isfinite(self.accuracy.token_cosine_mean):
            lines.append("on text: a number is not finite")
        return lines

    def failures(self) -> list[str]:
        """What misses the bounds, one line each."""
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
        """As plain JSON data."""
        cases = [{**dataclasses.asdict(r), "passed": r.within(self.tolerance)} for r in self.cases]
        return {
            "engine": self.engine,
            "compute": self.compute,
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
class ParityReport:
    """How every engine of one export compared with PyTorch.

    Args:
        precision: of the bundle.
        engines: each with its own bounds, over the same cases.
        caveats: what could not be compared here, or is not claimed, one sentence each.
        checks: others than the comparison of graphs; see `with_checks`.
    """

    precision: Precision
    engines: tuple[EngineParity, ...]
    caveats: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed and every engine is within its bounds, but for those that are `optional`."""
        return not self.failures()

    def with_checks(self, *checks: Check) -> "ParityReport":
        """The same with further checks, whose failures count like missed bounds."""
        return dataclasses.replace(self, checks=(*self.checks, *checks))

    def failures(self) -> list[str]:
        """Everything that misses a bound or fails a check, one line each."""
        required = (engine for engine in self.engines if not engine.optional)
        return [f"{engine.title}: {line}" for engine in required for line in engine.failures()] + [
            f"{check.name}: {line}" for check in self.checks for line in (*check.broken, *check.failures)
        ]

    def broken(self) -> list[str]:
        """Those of them that no bundle may do, whatever bounds were asked for."""
        required = (engine for engine in self.engines if not engine.optional)
        return [f"{engine.title}: {line}" for engine in required for line in engine.broken()] + [
            f"{check.name}: {line}" for check in self.checks for line in check.broken
        ]

    def verified(self, engine: Engine) -> tuple[ComputePrecision, ...]:
        """What `engine` was shown to compute in."""
        passed = [found.compute for found in self.engines if found.engine == engine and found.passed]
        return tuple(compute for compute in COMPUTE_PRECISIONS if compute in passed)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data; a number that is not finite becomes null."""
        return _finite_or_null(
            {
                "passed": self.passed,
                "precision": self.precision,
                "engines": [engine.to_json() for engine in self.engines],
                "not_proven": list(self.caveats),
                "checks": [check.to_json() for check in self.checks],
            }
        )

    def require(self, bounds: Bounds = "strict") -> None:
        """Raise unless `passed`; with bounds "report", only where something is `broken`.

        Raises:
            BoundMissedError: naming each failed comparison with its numbers, and the bounds.
        """
        if self.broken() if bounds == "report" else self.failures():
            raise BoundMissedError(self)


class BoundMissedError(ParityError):
    """An engine that misses its bounds, or a check that failed; `report` holds every number."""

    def __init__(self, report: ParityReport) -> None:
        parts = [
            f"{engine.title} differs from PyTorch FP32 in {len(failures)} respects, over {len(engine.cases)} cases "
            f"(bounds: {engine.tolerance}):\n  " + "\n  ".join(failures)
            for engine in report.engines
            if not engine.optional and (failures := engine.failures())
        ]
        parts += [
            f"the {check.name} are not the checkpoint's own:\n  " + "\n  ".join((*check.broken, *check.failures))
            for check in report.checks
            if not check.passed
        ]
        super().__init__(
            f"the {report.precision} bundle: " + "\n".join(parts) + f"\nNo bundle was written. {_advice(report)}"
        )
        self.report = report


# What may be tried where a precision costs too much.
_FINER: Mapping[Precision, str] = {
    "int8": "Calibrate on texts like those that will be served (--calibration), or take a finer precision.",
    "fp8": "Calibrate on texts like those that will be served (--calibration), or take a finer precision.",
    "int8-weight": "Take a finer precision: fp32.",
    "int4-weight": "Take a finer precision: int8-weight or fp32.",
    "fp16": "Take bf16, which has the range of fp32, or fp32.",
    "bf16": "Take fp16, which has three bits more, or fp32.",
}
_REPORT = "--bounds report writes the bundle with its misses stamped into it."
# A relative difference below this may be FP32's rounding, which the model's weights amplify; a wrong graph gives more.
_ROUNDING = 1e-3


def _advice(report: ParityReport) -> str:
    """What to do next."""
    missed = [engine for engine in report.engines if not engine.optional and engine.failures()]
    if report.broken():
        if report.precision == "fp16":
            return f"FP16 ends at 65,504, and values of this model lie beyond. {_FINER['fp16']}"
        return "PyTorch's numbers are finite, and these are not: please report it, with the model's name."
    if not missed:
        return f"The checkpoint's own library is right: please report it, with the checkpoint's files. {_REPORT}"
    if report.precision != "fp32":
        return f"{_FINER[report.precision]} {_REPORT}"
    fine = [engine.title for engine in report.engines if engine.passed and not engine.optional]
    if fine:
        blame = f"{' and '.join(fine)} agrees, so {' and '.join(engine.engine for engine in missed)} is at fault"
    elif max(engine.max_rel for engine in missed) < _ROUNDING:
        return f"That is little for a wrong graph: the weights may amplify FP32's rounding. {_REPORT}"
    else:
        blame = "That is no rounding"
    return f"{blame}: please report it, with the versions of the libraries. {_REPORT}"


class TorchReference:
    """transformers' own module in the model's dtype, with the heads that the torch backend has.

    The sparse head is another one: it follows the definitions token by token, so that it can find an error in the head
    that graphs are traced from.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        task: Task,
        pooling: Pooling,
        logits: Logits,
        sparse: SparseSpec | None = None,
    ) -> None:
        self._model: Any = model.eval()
        options = HeadOptions(task, pooling, logits, sparse)
        self._head: Head = make_head(model, options) if sparse is None else _SparseByDefinition(model, sparse)
        self.terms: dict[str, NDArray[np.float64]] = {}
        """Output with labels -> [L], the largest √(Σ(w·x)² + b²) that was summed for each so far; see `Scales`."""

    @torch.inference_mode()
    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`; every output of the task is returned, whatever is asked."""
        states = encode_padded(self._model.base_model, batch)
        if isinstance(self._head, (ClassifyHead, TokenClassifyHead)):
            self._keep_terms(self._head.features(states))
        results = {HIDDEN: states.hidden, self._head.output: self._head(states)}
        return {name: value.float().numpy() for name, value in results.items()}

    def _keep_terms(self, features: torch.Tensor) -> None:
        """Update `terms` by the classifier's features [..., H]."""
        linear = self._model.classifier
        terms = features.double().square() @ linear.weight.double().square().T
        if linear.bias is not None:
            terms = terms + linear.bias.double().square()
        largest = terms.sqrt().reshape(-1, terms.shape[-1]).amax(0).numpy()
        self.terms["logits"] = np.maximum(self.terms.get("logits", 0.0), largest)


@dataclass(frozen=True)
class _SparseByDefinition:
    """Sparse embeddings [B, V] token by token: padding is a logit of 0, and no weight is below 0."""

    output: ClassVar[str] = "sparse_embedding"
    model: Any
    sparse: SparseSpec

    def __call__(self, states: States) -> torch.Tensor:
        """See `Head`."""
        hidden, mask, input_ids = states.tokens_of_batch()
        weights = hidden.new_zeros(len(hidden), self.model.config.vocab_size)
        if self.sparse.head == "token-weights":
            rows = torch.arange(len(hidden))
            for place, ids in enumerate(input_ids.T):
                found = (self.model.classifier(hidden[:, place])[:, 0] * mask[:, place]).relu()
                weights[rows, ids] = torch.maximum(weights[rows, ids], found)
            weights[:, list(self.sparse.unweighted)] = 0
            return weights
        is_max = self.sparse.pooling == "max"
        for part, kept in zip(hidden.split(_TOKENS_AT_ONCE, 1), mask.split(_TOKENS_AT_ONCE, 1), strict=True):
            active = (self.model.lm_head(part) * kept[:, :, None]).relu().log1p()
            active = active.log1p() if self.sparse.activation == "log1p_relu" else active
            weights = torch.maximum(weights, active.amax(1)) if is_max else weights + active.sum(1)
        return weights


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
    step = max(1, _CHUNK_ELEMENTS // width)  # float64 copies of 1 GiB of logits would be 4 GiB
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


def check_parity(
    reference: Runs,
    candidates: Mapping[tuple[Engine, Precision], Runs],
    *,
    outputs: Sequence[str],
    spec: ModelSpec,
    precision: Precision,
    tokens: TokenSource,
    caveats: Sequence[str] = (),
    cases: Sequence[Case] | None = None,
    texts: Sequence[Sequence[TextBatch]] = (),
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Run the reference and every candidate over `cases` (default `parity_cases`) and compare the named outputs.

    With `texts`, in rounds as `TextReference` takes them, the accuracy of every candidate is measured as well, and held
    to the precision's bounds.
    Nothing is raised for a difference: see `ParityReport.require`.
    """
    if cases is None:
        cases = parity_cases(spec.max_length, max_tokens=max_tokens_of(spec))
    rng = np.random.default_rng(_SEED)
    scales = Scales(["logits"] if spec.task in ("classify", "token-classify") else [])
    runs: dict[tuple[Engine, Precision], list[_CaseRun]] = {key: [] for key in candidates}
    rounding: list[tuple[str, Deviation]] = []
    for number, case in enumerate(cases, 1):
        if progress is not None:
            progress(f"parity {number}/{len(cases)}: length {case.length:,}, batch {case.batch}")
        batch = make_batch(case, spec, tokens, rng, text_first=number % 2 == 0)
        if number == 1:  # what is allocated and compiled at a first run is no latency
            for side in (reference, *candidates.values()):
                side.run(batch, outputs)
        expected = _timed(reference, batch, outputs)
        for name in outputs:
            scales.add(name, _real(expected[0][name], batch))
        if case.ragged:
            rounding += _alone(reference, expected[0], batch, outputs, scales).items()
        for key, candidate in candidates.items():
            runs[key].append(_run_case(case, batch, expected, candidate, outputs=outputs, spec=spec, scales=scales))
    _require_finite(scales, outputs)
    terms = reference.terms if isinstance(reference, TorchReference) else {}
    scale_of = {name: scales.of(name, terms.get(name)) for name in outputs}
    own = [found.over(scale_of[name]) for name, found in rounding]
    if progress is not None and texts:
        progress(f"accuracy on {sum(int(batch.attention_mask.sum()) for batch, _ in texts[0]):,} tokens of text")
    bounds, on_text = ACCURACY_BOUNDS.get(precision), TextReference(reference, texts, spec)
    engines = tuple(
        EngineParity(
            engine,
            compute,
            _widened(TOLERANCES["fp32"], own) if precision == compute == "fp32" else tolerance_of(precision, compute),
            tuple(run.over(scale_of) for run in runs[engine, compute]),
            on_text.compare(candidate, bounds) if texts else None,
            bounds,
        )
        for (engine, compute), candidate in candidates.items()
    )
    missed = [
        f"{engine.title} misses its bounds with these weights, and the bundle does not claim it."
        for engine in engines
        if engine.optional and not engine.passed
    ]
    return ParityReport(precision=precision, engines=engines, caveats=(*caveats, *missed))


def _require_finite(scales: Scales, outputs: Sequence[str]) -> None:
    for name in outputs:
        if not np.isfinite(scales.of(name)).all():
            raise CheckpointError(
                f"PyTorch itself computes {name} with numbers that are not finite: weights of the checkpoint are NaN, "
                "infinite or overflow FP32. Nothing can be compared with that; look at the weights."
            )


@dataclass(frozen=True)
class _CaseRun:
    """A case that was run, before the scales of all cases are known."""

    result: CaseResult
    outputs: Mapping[str, Deviation]
    alone: Mapping[str, Deviation]

    def over(self, scale_of: Mapping[str, NDArray[np.float64]]) -> CaseResult:
        outputs, alone = (
            {name: found.over(scale_of[name]) for name, found in side.items()} for side in (self.outputs, self.alone)
        )
        return dataclasses.replace(self.result, outputs=outputs, alone=alone)


def _run_case(
    case: Case,
    batch: Batch,
    reference: tuple[Mapping[str, NDArray[np.float32]], float],
    candidate: Runs,
    *,
    outputs: Sequence[str],
    spec: ModelSpec,
    scales: Scales,
) -> _CaseRun:
    expected, reference_ms = reference
    found, candidate_ms = _timed(candidate, batch, outputs)
    labels = {name: name in scales.labels for name in outputs}
    alone = _alone(candidate, found, batch, outputs, scales) if case.ragged else {}
    top1, top5 = _agreement(expected, found, batch, spec)
    result = CaseResult(
        case=case,
        outputs={},
        alone={},
        finite=all(bool(np.isfinite(found[name]).all()) for name in outputs),
        masks=0 if batch.mask_positions is None else len(batch.mask_positions),
        top1=top1,
        top5=top5,
        reference_ms=reference_ms,
        candidate_ms=candidate_ms,
    )
    compared = {
        name: deviation(_real(expected[name], batch), _real(found[name], batch), labels=labels[name])
        for name in outputs
    }
    return _CaseRun(result, compared, alone)


def _alone(
    side: Runs, found: Mapping[str, NDArray[np.float32]], batch: Batch, outputs: Sequence[str], scales: Scales
) -> dict[str, Deviation]:
    """The last row of `found`, which `side` computed in a batch, against the same row alone."""
    single = side.run(last_row_alone(batch), outputs)
    return {
        name: deviation(single[name], _of_last_row(found[name], batch), labels=name in scales.labels)
        for name in outputs
    }


def _timed(side: Runs, batch: Batch, outputs: Sequence[str]) -> tuple[Mapping[str, NDArray[np.float32]], float]:
    started = time.perf_counter()
    results = side.run(batch, outputs)
    return results, (time.perf_counter() - started) * 1000


def _of_last_row(values: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """The part of a batch's `values` that belongs to its last row, in the shapes that `last_row_alone` gives."""
    if values.ndim == 3:  # [B, S, D]
        return values[-1:, : int(batch.attention_mask[-1].sum())]
    if batch.mask_positions is not None:  # [M, V]
        return values[batch.mask_positions[:, 0] == len(batch.input_ids) - 1]
    return values[-1:]  # [B, D]


def _real(values: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """Drop padding: [B, S, D] -> [T, D]; the outputs with one vector a row or mask have none."""
    return values[batch.attention_mask.astype(bool)] if values.ndim == 3 else values


def _agreement(
    expected: Mapping[str, NDArray[np.float32]],
    found: Mapping[str, NDArray[np.float32]],
    batch: Batch,
    spec: ModelSpec,
) -> tuple[float | None, float | None]:
    """Top-1 agreement and top-5 overlap of fill-mask at the mask positions; (None, None) for other tasks."""
    if batch.mask_positions is None:
        return None, None
    pair = [expected["logits"], found["logits"]]
    if spec.logits == "all":  # [B, S, V] -> [M, V]
        rows, places = batch.mask_positions.T
        pair = [logits[rows, places] for logits in pair]
    best = [np.argsort(-logits, axis=-1, kind="stable")[:, :5] for logits in pair]
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*best, strict=True)]
    return float(np.mean(best[0][:, 0] == best[1][:, 0])), float(np.mean(shared))


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
    # NaN and Infinity are no JSON.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return value

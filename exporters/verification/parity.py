"""Runs an exported graph beside PyTorch and compares their outputs.

Shapes: B rows, S tokens of the longest row, T real (not padding) tokens, M masks, H hidden size, V vocabulary,
L labels, D the last axis of whatever is compared.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.spec import Engine, ModelSpec, Precision
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, Runs, TextReference
from gte_deploy.exporters.verification.bounds import TOLERANCES, Deviation, Scales, deviation, tolerance_of, widened
from gte_deploy.exporters.verification.cases import (
    Case,
    TokenSource,
    last_row_alone,
    make_batch,
    max_tokens_of,
    parity_cases,
)
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.exporters.verification.results import CaseResult, EngineParity, ParityReport
from gte_deploy.exporters.verification.texts import TextBatch

_SEED = 20240729


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        outputs: names of the outputs.
        spec: the model's facts.
        precision: the precision of the graphs, which sets the bounds.
        tokens: where token ids come from.
        cases: shapes of the batches; None for `parity_cases`.
        texts: texts on which the accuracy of every candidate is measured as well and held to the precision's bounds, in
            rounds as `TextReference` takes them; none for no such measurement.
    """

    outputs: Sequence[str]
    spec: ModelSpec
    precision: Precision
    tokens: TokenSource
    cases: Sequence[Case] | None = None
    texts: Sequence[Sequence[TextBatch]] = ()


def check_parity(
    reference: Runs,
    candidates: Mapping[tuple[Engine, Precision], Runs],
    asked: Comparison,
    *,
    caveats: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Run the reference and every candidate over the cases and compare the named outputs.

    Nothing is raised for a difference: see `ParityReport.require`.

    Args:
        reference: PyTorch.
        candidates: (engine, precision that it computes in) -> what runs batches.
        asked: what is compared.
        caveats: what is not compared, one sentence each; they become part of the report.
        progress: called with one line for every case.

    Raises:
        CheckpointError: PyTorch itself gives numbers that are not finite.
    """
    report_line = progress or (lambda line: None)
    outputs, spec, precision = asked.outputs, asked.spec, asked.precision
    cases = parity_cases(spec.max_length, max_tokens=max_tokens_of(spec)) if asked.cases is None else asked.cases
    rng = np.random.default_rng(_SEED)
    scales = Scales(["logits"] if spec.task in ("classify", "token-classify") else [])
    runs: dict[tuple[Engine, Precision], list[_CaseRun]] = {key: [] for key in candidates}
    rounding: list[tuple[str, Deviation]] = []
    for number, case in enumerate(cases, 1):
        report_line(f"parity {number}/{len(cases)}: length {case.length:,}, batch {case.batch}")
        batch = make_batch(case, spec, asked.tokens, rng, text_first=number % 2 == 0)
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
    if asked.texts:
        words = sum(int(batch.attention_mask.sum()) for batch, _ in asked.texts[0])
        report_line(f"accuracy on {words:,} tokens of text")
    bounds, on_text = ACCURACY_BOUNDS.get(precision), TextReference(reference, asked.texts, spec)
    engines = tuple(
        EngineParity(
            engine,
            compute,
            widened(TOLERANCES["fp32"], own) if precision == compute == "fp32" else tolerance_of(precision, compute),
            tuple(run.over(scale_of) for run in runs[engine, compute]),
            on_text.compare(candidate, bounds) if asked.texts else None,
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

"""Runs exported graphs and PyTorch on batches of many shapes, and compares their outputs."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gte_deploy.bundle.manifest import TextsEntry
from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.spec import DeviceType, Engine, ModelSpec, Precision
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, Runs, TextReference
from gte_deploy.exporters.verification.bounds import TOLERANCES, Tolerance, tolerance_of
from gte_deploy.exporters.verification.cases import Case, TokenSource, make_batch, max_tokens_of, parity_cases
from gte_deploy.exporters.verification.differences import CaseComparison, CaseRun, Difference
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.exporters.verification.results import EngineParity, ParityReport
from gte_deploy.exporters.verification.texts import Rounds

_SEED = 20240729
# Deep models with peaked attention, and saturated poolers, amplify the rounding of FP32. PyTorch's own results show how
# much: it sums a row alone in another order than the same row in a batch. Few rows are compared in this way, hence the
# factor. The error of a wrong graph is above the cap, since the model amplifies this error too (docs/numerics.md).
_ROUNDING_FACTOR = 20
_ROUNDING_CAP = 1e-3
# Tokens. Longer inputs would take an emulation more than a fifth of the time of an export; a bundle that needs the
# emulation's verdict waits for it.
LONGEST_OPTIONAL_EMULATION = 2048
# Tokens of a batch. Its 30,528 logits for each token take 62 MB; a longer batch takes other paths in no operator behind
# the hidden states, and the graph with masked logits shares everything before them.
_MOST_TOKENS_OF_ALL_LOGITS = 512


@dataclass(frozen=True)
class Comparison:
    """The inputs of a comparison.

    Args:
        outputs: names of the compared outputs.
        spec: the model's facts.
        precision: the precision of the graphs, which sets the bounds.
        tokens: the source of the token ids.
        cases: shapes of the batches; None for `parity_cases`.
        texts: language -> rounds of texts for `TextReference`, on which every candidate's accuracy is measured too and
            compared with the precision's bounds; empty to leave this out.
        texts_entry: what the report says about these texts.
        parts: the names of the outputs of each part of the graphs; a run for these alone computes them by the part.
        device: the device that ONNX Runtime's graph is for.
    """

    outputs: Sequence[str]
    spec: ModelSpec
    precision: Precision
    tokens: TokenSource
    cases: Sequence[Case] | None = None
    texts: Mapping[str, Rounds] = field(default_factory=dict)
    texts_entry: TextsEntry | None = None
    parts: Sequence[Sequence[str]] = ()
    device: DeviceType = "cpu"


def check_parity(
    reference: Runs,
    candidates: Mapping[tuple[Engine, Precision], Runs],
    asked: Comparison,
    *,
    emulated: Collection[tuple[Engine, Precision]] = (),
    without_parts: Collection[tuple[Engine, Precision]] = (),
    caveats: Sequence[str] = (),
    all_logits: Mapping[tuple[Engine, Precision], Runs] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Run the reference and every candidate over the cases and compare the named outputs.

    A difference raises no error; see `ParityReport.require`.

    Args:
        reference: PyTorch.
        candidates: (engine, precision that it computes in) -> the backend that runs batches.
        asked: the inputs of the comparison.
        emulated: the candidates that emulate their engine.
        without_parts: the candidates that have the whole graph alone.
        caveats: one sentence for each thing that is not compared; they become part of the report.
        all_logits: candidate -> the backend of its graph with all logits, for those that have one.
        progress: called with one line for every case.

    Raises:
        CheckpointError: PyTorch itself gives numbers that are not finite.
    """
    report_line = progress or (lambda line: None)
    outputs, spec, precision = asked.outputs, asked.spec, asked.precision
    cases = parity_cases(spec.max_length, max_tokens=max_tokens_of(spec)) if asked.cases is None else asked.cases
    rng = np.random.default_rng(_SEED)
    comparison = CaseComparison(outputs, spec)
    runs: dict[tuple[Engine, Precision], list[CaseRun]] = {key: [] for key in candidates}
    for number, case in enumerate(cases, 1):
        report_line(f"parity {number}/{len(cases)}: length {case.length:,}, batch {case.batch}")
        batch = make_batch(case, spec, asked.tokens, rng, text_first=number % 2 == 0)
        expected = comparison.reference(reference, case, batch)
        for key, candidate in candidates.items():
            if key in emulated and _is_optional(*key, precision) and case.length > LONGEST_OPTIONAL_EMULATION:
                continue
            parts = () if key in without_parts else asked.parts
            is_short = case.length * case.batch <= _MOST_TOKENS_OF_ALL_LOGITS
            every = (all_logits or {}).get(key) if is_short else None
            runs[key].append(comparison.candidate(candidate, case, batch, expected, parts, every))
    terms = reference.terms if isinstance(reference, TorchReference) else {}
    scale_of = {name: comparison.scales.of(name, terms.get(name)) for name in outputs}
    _require_finite(scale_of)
    own = [found.over(scale_of[name]) for name, found in comparison.rounding]
    if asked.texts:
        words = sum(int(batch.attention_mask.sum()) for rounds in asked.texts.values() for batch, _ in rounds[0])
        report_line(f"accuracy on {words:,} tokens{asked.texts_entry and f' of {asked.texts_entry.source}' or ''}")
    bounds, on_text = ACCURACY_BOUNDS.get(precision), TextReference(reference, asked.texts, spec)
    engines = tuple(
        EngineParity(
            engine,
            compute,
            precision,
            # In a CPU's bundle for bfloat16, OpenVINO rounds the weights; the graphs are those of FP32.
            _widened(TOLERANCES["fp32"], own)
            if compute == "fp32" and (precision == "fp32" or ("openvino", precision) in candidates)
            else tolerance_of(precision, compute),
            tuple(run.over(scale_of) for run in runs[engine, compute]),
            on_text.compare(candidate, bounds) if asked.texts else None,
            bounds,
            optional=_is_optional(engine, compute, precision),
            emulated=(engine, compute) in emulated,
            device=asked.device,
        )
        for (engine, compute), candidate in candidates.items()
    )
    missed = [
        f"{engine.title} misses its bounds with these weights, so the bundle does not list it as verified."
        for engine in engines
        if engine.optional and not engine.passed
    ]
    use = reference.use if isinstance(reference, TorchReference) else None
    return ParityReport(
        precision=precision,
        engines=engines,
        caveats=(*caveats, *missed),
        reference=use,
        texts=asked.texts_entry if asked.texts else None,
    )


def _is_optional(engine: Engine, compute: Precision, precision: Precision) -> bool:
    """Whether a bundle is valid without an engine in a precision: OpenVINO's, unless it is the bundle's own."""
    return engine == "openvino" and compute not in ("fp32", precision)


def _require_finite(scale_of: Mapping[str, NDArray[np.float64]]) -> None:
    for name, scale in scale_of.items():
        if not np.isfinite(scale).all():
            raise CheckpointError(
                f"PyTorch itself computes {name} with numbers that are not finite: weights of the checkpoint are NaN, "
                "infinite or overflow FP32. No comparison is possible; check the weights."
            )


def _widened(tolerance: Tolerance, rounding: Sequence[Difference]) -> Tolerance:
    """Widen the FP32 bounds for a model whose rounding in PyTorch itself causes the differences `rounding`."""

    def bound(labels: bool) -> float | None:
        found = [each.max_rel for each in rounding if each.labels == labels]
        if tolerance.max_rel is None or not found:
            return None
        return max(tolerance.max_rel, min(_ROUNDING_CAP, float(f"{_ROUNDING_FACTOR * max(found):.2g}")))

    return dataclasses.replace(tolerance, max_rel=bound(False) or tolerance.max_rel, labels=bound(True))

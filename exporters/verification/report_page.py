"""report.html: the parity report for people, the verdict and the accuracy first."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gte_deploy.bundle.facts import made_for
from gte_deploy.bundle.manifest import Manifest, TextsEntry
from gte_deploy.core.pages import (
    Html,
    bars,
    code,
    definitions,
    element,
    escaped,
    items,
    joined,
    page,
    page_section,
    rows,
    table,
)
from gte_deploy.exporters.bundle.uses import MASK, PLACEHOLDER, first_steps, uses
from gte_deploy.exporters.verification.accuracy import Accuracy
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.exporters.verification.difference_chart import difference_chart
from gte_deploy.exporters.verification.report import case_columns, parts_compared, reference_line
from gte_deploy.exporters.verification.results import EngineParity, ParityReport

_DASH = "–"
_EMULATED = (
    "“Emulated” means: ONNX Runtime on this CPU ran the engine's graph, with values rounded where the engine rounds "
    "them."
)
_SHOWN_MISSES = 5
_TOLD = "The comparison ran"  # how a target's own caveat about its emulation says it


_COLUMNS: Mapping[str, str] = {
    "by a part": "“by a part” is the same for the smaller graph that computes this output alone.",
    "by all logits": "“by all logits” is the same for the graph with the logits of every token.",
    "relative": "“relative” is the largest difference over the largest value that PyTorch gives for the same channel, "
    "word or label in any batch.",
    "row alone": "“row alone” is the largest difference between the shortest row of the batch and the same row run "
    "alone.",
    "cosine": "“cosine” is the smallest of all compared vectors; labels are numbers and have none.",
    "top-1": "“top-1” and “top-5” are the agreement of the best words at the masks.",
}
"""Column of the tables of batches -> what it has."""


@dataclass(frozen=True)
class ReportPage:
    """What report.html shows.

    Args:
        parity: the comparison.
        report: report.json, see `build_report`.
        described: the manifest of the bundle, without the list of files.
        model_type: that of config.json.
        mask_token: the mask of the tokenizer, for the examples; None if it has none.
    """

    parity: ParityReport
    report: Mapping[str, Any]
    described: Manifest
    model_type: str = "gte"
    mask_token: str | None = None

    def render(self) -> str:
        """Return the page: one file, which asks no host for anything."""
        report, spec = self.report, self.described.spec
        lead = f"{spec.task} in {self.described.precision}, compared with PyTorch in FP32"
        return page(
            f"{report['source']['name']}: report of the export",
            element("p", lead, class_="lead"),
            _verdict(self.parity),
            _accuracy(self.parity),
            page_section("Differences by length", difference_chart(self.parity.engines)),
            _checks(self.parity.checks),
            _sensitivity(report, self.described),
            self._use(),
            page_section("The bundle", definitions(_facts(report, self.described))),
            _every_case(self.parity.engines),
            _surroundings(report),
        )

    def _use(self) -> Html:
        parts = []
        for use in uses(self.described, self.model_type):
            text = use.text.replace(MASK, self.mask_token or MASK)
            parts += [element("h3", _with_code(use.title)), code(text)]
        note = (
            "How fast it is depends on the machine, so this report has no times: `gte-deploy bench MODEL` measures "
            "them, and `gte-deploy compare A B` puts two bundles side by side."
        )
        before = filter(None, [first_steps(self.described), PLACEHOLDER])
        return page_section(
            "How to use it",
            *(element("p", _with_code(text)) for text in before),
            *parts,
            element("p", _with_code(note)),
        )


def _with_code(text: str) -> Html:
    """Return text as HTML, with what is between backticks as code."""
    parts = re.split(r"`([^`]+)`", text)
    return joined(element("code", part) if number % 2 else part for number, part in enumerate(parts))


def _verdict(parity: ParityReport) -> Html:
    missed = parity.failures()
    partly = [engine.title for engine in parity.engines if engine.optional and not engine.passed]
    emulated = [engine.title for engine in parity.engines if engine.emulated]
    if missed:
        kind, title = "failed", "Missed: this bundle is less accurate than it should be"
    elif len(emulated) == len(parity.engines):
        kind, title = "partly", "Passed by emulation: the engine itself did not run here"
    elif partly:
        kind, title = "partly", f"Passed, but {' and '.join(partly)} misses its bounds"
    else:
        within = "" if parity.precision == "fp32" else f", within the bounds of {parity.precision}"
        kind, title = "passed", f"Passed: it answers as PyTorch does{within}"
    engines = [
        joined(
            [_word(engine), " ", engine.title, ": ", f"{len(engine.cases)} batches compared{parts_compared(engine)}"]
        )
        for engine in parity.engines
    ]
    checks = [joined([_check_word(check), f" {check.name}{_how_many(check)}"]) for check in parity.checks]
    notes = list(parity.caveats)
    if emulated and not any(_TOLD in caveat for caveat in notes):
        notes.insert(0, _EMULATED)
    notes += filter(None, [reference_line(parity)])
    return page_section(
        title,
        items([*engines, *checks]),
        items(missed[:_SHOWN_MISSES]),
        _more(missed[_SHOWN_MISSES:]),
        *([element("h3", "What to know"), items(map(_lines, notes))] if notes else []),
        class_=f"verdict {kind}",
    )


def _more(missed: Sequence[str]) -> Html:
    """Return what is below the first misses, folded so that the numbers come soon; paper shows it unfolded."""
    return element("details", element("summary", f"{len(missed)} more misses"), items(missed)) if missed else Html()


def _lines(text: str) -> Html:
    """Return a sentence of several lines; those that do not begin like a sentence are commands to copy."""
    first, *others = text.split("\n")
    return joined([first, *(code(line) if line[:1].islower() else element("div", line) for line in others)])


def _word(engine: EngineParity) -> Html:
    if engine.passed:
        return element("span", "passed", class_="passed-word")
    if engine.optional:
        return element("span", "missed, not needed", class_="missed-word")
    return element("span", "MISSED", class_="failed-word")


def _check_word(check: Check) -> Html:
    word = "passed" if check.passed else "MISSED"
    return element("span", word, class_="passed-word" if check.passed else "failed-word")


def _how_many(check: Check) -> str:
    """Return what a check compared with what, to follow its name; empty if it does not say so."""
    answers, library = check.compared.get("answers"), check.compared.get("library")
    return "" if answers is None or library is None else f": {answers} compared with those of {library}"


def _with_bound(value: float, form: str, bound: float | None, kind: str = "at least") -> Html:
    """Return a value in this format and its bound; a value that misses its bound stands out."""
    shown = format(value, form)
    if bound is None:
        return escaped(shown)
    kept = value >= bound if kind == "at least" else value <= bound
    return joined(
        [shown if kept else element("span", shown, class_="failed-word"), element("small", f"{kind} {bound:g}")]
    )


def _accuracy(parity: ParityReport) -> Html:
    """Return the table of measures as rows and engines as columns, which suits a phone."""
    engines = parity.engines
    outputs: list[tuple[str, Callable[[EngineParity], object]]] = [
        ("verdict", _word),
        (
            "largest relative difference",
            lambda e: _with_bound(e.max_rel, ".1e", e.tolerance.max_rel, "at most"),
        ),
        ("smallest cosine", lambda e: _with_bound(e.cosine_min, ".7f", e.tolerance.cosine_min)),
        ("mean cosine", lambda e: _with_bound(e.cosine_mean, ".7f", e.tolerance.cosine_mean)),
    ]
    if any(engine.top1 is not None for engine in engines):
        outputs.append(
            (
                "same best word at masks",
                lambda e: _DASH if e.top1 is None else _with_bound(e.top1, ".1%", e.tolerance.top1),
            )
        )
    bodies = [_body("On test batches: real text and random tokens", outputs, engines)]
    measured = [engine for engine in engines if engine.accuracy is not None]
    if measured:
        bodies.append(_body(_texts_of(measured[0].accuracy), _on_text(measured), engines))
    header = ["", *(engine.title for engine in engines)]
    caption = (
        "Agreement with PyTorch FP32. A difference is divided by the size of its output. Cosines are of all compared "
        "vectors; 1 is equal."
    )
    return page_section("Accuracy", table(caption, header, *bodies, class_="fit"), _by_language(measured))


def _body(
    title: str, measures: Sequence[tuple[str, Callable[[EngineParity], object]]], engines: Sequence[EngineParity]
) -> Html:
    return rows([[name, *(value(engine) for engine in engines)] for name, value in measures], title=title)


def _texts_of(found: Accuracy | None) -> str:
    assert found is not None  # the engines were chosen by it
    return f"On {found.tokens:,} tokens of {found.kind_of_texts}"


def _on_text(measured: Sequence[EngineParity]) -> list[tuple[str, Callable[[EngineParity], object]]]:
    def of(value: Callable[[Accuracy, EngineParity], object]) -> Callable[[EngineParity], object]:
        return lambda engine: _DASH if engine.accuracy is None else value(engine.accuracy, engine)

    def mean(cosine: float, engine: EngineParity) -> Html:
        bounds = engine.accuracy_bounds
        return _with_bound(cosine, ".5f", None if bounds is None else bounds.cosine_mean)

    found = [
        ("mean cosine of tokens", of(lambda a, e: mean(a.token_cosine_mean, e))),
        ("smallest cosine of tokens", of(lambda a, e: f"{a.token_cosine_min:.5f}")),
        ("mean cosine of sentences", of(lambda a, e: mean(a.sentence_cosine_mean, e))),
        ("smallest cosine of sentences", of(lambda a, e: f"{a.sentence_cosine_min:.5f}")),
        ("a text in a batch against alone", of(lambda a, e: mean(a.alone_cosine_mean, e))),
    ]
    if any(engine.accuracy is not None and engine.accuracy.top1 is not None for engine in measured):
        found += [
            ("same best word as PyTorch", of(_same_word)),
            ("right word first", of(lambda a, e: _beside_pytorch(a.top1))),
            ("right word among five", of(lambda a, e: _beside_pytorch(a.top5))),
        ]
    return found


def _same_word(found: Accuracy, engine: EngineParity) -> Html:
    low, high = found.top1_interval or (math.nan, math.nan)
    bounds, shown = engine.accuracy_bounds, f"{found.top1_agreement:.1%}"
    return joined(
        [
            # The interval is compared with the bound, not the share of these few masks alone.
            shown if bounds is None or high >= bounds.top1_agreement else element("span", shown, class_="failed-word"),
            element("small", f"of {found.masks:,} masks"),
            element("small", f"95 %: {low:.1%} to {high:.1%}"),
            *([] if bounds is None else [element("small", f"at least {bounds.top1_agreement:.0%}")]),
        ]
    )


def _beside_pytorch(shares: tuple[float, float] | None) -> object:
    if shares is None:
        return _DASH
    return joined([f"{shares[0]:.1%}", element("small", f"PyTorch {shares[1]:.1%}")])


def _by_language(measured: Sequence[EngineParity]) -> Html:
    tables = []
    for engine in measured:
        languages = {} if engine.accuracy is None else engine.accuracy.languages
        if not languages:
            continue
        has_words = any(own.top1_agreement is not None for own in languages.values())
        header = ["language", "tokens", "sentences", *(["same best word", "masks"] if has_words else [])]
        cells = [
            [
                language,
                f"{own.token_cosine_mean:.5f}",
                f"{own.sentence_cosine_mean:.5f}",
                *([f"{own.top1_agreement or 0:.1%}", f"{own.masks:,}"] if has_words else []),
            ]
            for language, own in languages.items()
        ]
        tables.append(table(f"{engine.title}, by language: mean cosine", header, rows(cells)))
    return element("div", *tables, class_="columns") if tables else Html()


def _checks(checks: Sequence[Check]) -> Html:
    parts: list[object] = []
    for check in checks:
        parts += [element("h3", f"{check.name}: ", _check_word(check)), definitions(check.compared)]
        if not check.passed:
            parts.append(element("p", "The verdict above lists what differs."))
        if check.skipped:
            parts += [element("p", "Not compared:"), items(check.skipped)]
    if not parts:
        return Html()
    return page_section("The same answers as the checkpoint's own library", *parts)


def _sensitivity(report: Mapping[str, Any], described: Manifest) -> Html:
    """Return the loss of each group of layers, and which groups stay in a higher precision."""
    loss, kept = report["sensitivity"], report["kept_groups"]
    if described.precision not in ("int8", "fp8"):
        return Html()
    title, name = "Sensitivity of the layers", described.precision.upper()
    if not loss:
        sentence = (
            f"With every group of layers in {name}, the graph keeps its bounds on the calibration texts. So no group "
            "had to stay in a higher precision, and the groups were not measured one by one."
        )
        return page_section(title, element("p", sentence))
    sentence = (
        f"{len(kept)} of {len(loss)} groups of layers stay in a higher precision: the graph would miss its bounds with "
        f"them in {name}. A bar is what a group costs if it alone is in {name}."
    )
    drawn = [
        (
            Html(escaped(group).replace(".", ".<wbr>")),
            cost,
            f"{cost:.1e}{', kept higher' if group in kept else ''}",
            group in kept,
        )
        for group, cost in loss.items()
    ]
    caption = (
        "Loss of the mean cosine of tokens (1 − cosine, no unit) by each group alone. First comes the group that uses "
        "up most of a bound, which may also be that of sentences or of masked words."
    )
    return page_section(title, element("p", sentence), bars(caption, ["group of layers", "loss", "value"], drawn))


def _facts(report: Mapping[str, Any], described: Manifest) -> dict[str, Any]:
    calibration, measured = report["calibration"], report["parity"]["texts"]
    return {
        "task": report["task"],
        "precision": described.precision,
        "made for": made_for(described),
        "longest input": f"{report['max_length']:,} tokens",
        **({"calibration texts": TextsEntry(**calibration).describe()} if calibration else {}),
        **({"texts for the accuracy": TextsEntry(**measured).describe()} if measured else {}),
        **{f"graph for {engine}": _graph(graph) for engine, graph in report["graphs"].items()},
        **({"engine": joined(_engine_lines(described))} if described.plan else {}),
    }


def _engine_lines(described: Manifest) -> list[Html]:
    lines = [] if described.plan is None else described.plan.describe()
    return [element("div", line.removeprefix("engine: ")) for line in lines]


def _graph(graph: Mapping[str, Any]) -> Html:
    fusions = ", ".join(f"{fusion} {count}" for fusion, count in graph["fusions"].items() if count)
    files = [f"{path} gives {', '.join(outputs)}" for path, outputs in graph["compared"].items()]
    made = f"opset {graph['opset']}; fusions: {fusions}" if fusions else f"opset {graph['opset']}; standard operators"
    return joined(element("div", line) for line in (made, *files))


def _every_case(engines: Sequence[EngineParity]) -> Html:
    tables, columns = [], set[str]()
    for engine in engines:
        header, cells = case_columns(engine.cases)
        columns |= set(header)
        failed = [not result.within(engine.tolerance) for result in engine.cases]
        tables.append(table(f"{engine.title}: every batch", header, rows(cells, failed=failed), class_="every"))
    explained = ["The column of an output has its largest absolute difference from PyTorch FP32 over all real tokens."]
    explained += [text for column, text in _COLUMNS.items() if column in columns]
    return page_section("Every batch", *tables, element("p", " ".join(explained), class_="note"))


def _surroundings(report: Mapping[str, Any]) -> Html:
    seconds = {step: f"{found:.1f}\u00a0s" for step, found in report["timings_s"].items()}
    columns = [
        ("Machine", {**report["machine"], "created": report["created"]}),
        ("Versions", report["versions"]),
        ("Steps of this export", seconds),
    ]
    return page_section(
        "Where it was made",
        element(
            "div",
            *(element("div", element("h3", name), definitions(facts)) for name, facts in columns),
            class_="columns",
        ),
    )

"""Makes ratios, bars and tables from the numbers of a run, which its JSON file holds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gte_deploy.tuning.measure import Spread
from side_by_side.contestants import REFERENCE, TEXT_REFERENCE, reference_of
from side_by_side.machine import NOISE_RULE
from side_by_side.workloads import DENSE, LISTS, NAMES

Report = dict[str, Any]
Row = dict[str, Any]

PRECISIONS = ("fp32", "16-bit", "int8")
SUBJECT = "base"

# How many times as fast as the fastest peer our fastest contestant has to be.
BARS = {**dict.fromkeys(DENSE, 1.05), **dict.fromkeys(("mixed", *LISTS), 1.3), "1x8192": 1.2}
COSINE_MARGIN = 0.0005
BARS_RULE = (
    "Each line compares the fastest peer of a precision with the fastest contestant of gte-deploy in that precision "
    f"whose token cosine with torch fp32 is at most {COSINE_MARGIN:g} lower than the peer's (the sentence cosine, for "
    "contestants that give no embeddings of tokens)."
)


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars.

    Args:
        workload: subject and workload.
        precision: of PRECISIONS.
        bar: how many times as fast as the fastest peer ours has to be.
        reached: how many times as fast ours is; None if the comparison is missing.
        by: the two contestants with their cosines, or why the comparison is missing.
        is_noisy: whether a compared measurement is marked as noisy.
    """

    workload: str
    precision: str
    bar: float
    reached: float | None
    by: str
    is_noisy: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None if the comparison is missing."""
        return None if self.reached is None else self.reached >= self.bar


def measured(report: Report, subject: str, workload: str | None = None) -> list[Row]:
    """Return the rows that have numbers."""
    return [
        row
        for row in report["measurements"]
        if row["subject"] == subject and workload in (None, row["workload"]) and row["error"] is None and row["seconds"]
    ]


def find(report: Report, contestant: str, workload: str, subject: str = SUBJECT) -> Row | None:
    """Return the row of one contestant, if it has numbers."""
    return next((row for row in measured(report, subject, workload) if row["contestant"] == contestant), None)


def relative(row: Row | None, report: Report) -> float | None:
    """Return the speed relative to `reference_of`, of the same rounds or, for workloads that run alone, of its own."""
    if row is None:
        return None
    reference = row["reference_seconds"]
    if not reference:
        alone = find(report, reference_of(row["workload"]), row["workload"], row["subject"])
        reference = alone["seconds"] if alone else []
    return statistics.median(reference) / statistics.median(row["seconds"]) if reference else None


def share_of_peak(row: Row, report: Report) -> float | None:
    """Return model FLOPs of real tokens per second, over the measured GEMM peak of the precision."""
    peak = report["gemm_peak"].get(row["precision"])
    return None if peak is None else row["flops"] / statistics.median(row["seconds"]) / peak


def ranked(
    report: Report, workload: str, precision: str, *, ours: bool, subject: str = SUBJECT
) -> list[tuple[str, float]]:
    """Return names and relative speeds of the contestants of a precision, the fastest first."""
    rows = [row for row in measured(report, subject, workload) if row["ours"] == ours and row["precision"] == precision]
    found = [(row["contestant"], speed) for row in rows if (speed := relative(row, report)) is not None]
    return sorted(found, key=lambda pair: pair[1], reverse=True)


def cosine(report: Report, contestant: str, subject: str = SUBJECT) -> float | None:
    """Return the mean cosine with the reference of a contestant's tokens, or else sentences, if it was measured."""
    for row in report["accuracy"]:
        if row["error"] is None and (row["subject"], row["contestant"]) == (subject, contestant):
            found = row.get("token_embeddings") or row.get("embed")
            return found and found["mean"]
    return None


def bars(report: Report) -> list[Bar]:
    """Return the bars of all workloads that have numbers, computed from these."""
    found = []
    for subject in dict.fromkeys(row["subject"] for row in report["measurements"]):
        for workload in (name for name in _ordered(report, subject) if name in BARS):
            found += [_bar(report, subject, workload, precision) for precision in PRECISIONS]
    return found


def _bar(report: Report, subject: str, workload: str, precision: str) -> Bar:
    name, bar = f"{subject} {workload}", BARS[workload]
    ours, peers = (ranked(report, workload, precision, ours=side, subject=subject) for side in (True, False))
    if not ours or not peers:
        return Bar(name, precision, bar, None, f"no result of {'gte-deploy' if not ours else 'a peer'}")
    peer, peer_speed = peers[0]
    least = cosine(report, peer, subject)
    if least is None:
        return Bar(name, precision, bar, None, f"the accuracy of {peer} was not measured")
    for one, speed in ours:
        value = cosine(report, one, subject)
        if value is not None and value >= least - COSINE_MARGIN:
            rows = [find(report, contestant, workload, subject) for contestant in (one, peer)]
            is_noisy = any(row is not None and row.get("noise") for row in rows)
            return Bar(name, precision, bar, speed / peer_speed, f"{one} ({value:.5f}), {peer} ({least:.5f})", is_noisy)
    return Bar(name, precision, bar, None, f"nothing of gte-deploy is as accurate as {peer} ({least:.5f})")


def markdown(report: Report) -> str:
    """Return all results as Markdown tables."""
    hardware, peak = report["hardware"], report["gemm_peak"]
    parts = [
        f"# Inference on the CPU, {report['date'][:10]}",
        f"{hardware['cpu']} ({', '.join(hardware['kernels'])}), {hardware['threads']} threads; "
        + _named(report["versions"])
        + "".join(f"; {name}'s environment: {_named(found)}" for name, found in report["environments"].items() if found)
        + ".",
        "\n".join(f"    {command}" for command in report["commands"]),
    ]
    if peak:
        rates = ", ".join(f"{name} {peak[name] / 1e9:,.0f} G" for name in PRECISIONS if name in peak)
        parts.append(f"GEMM peak, operations/s: {rates} ({peak['method']}).")
    if report["no_energy"]:
        parts.append(f"Energy was not measured: {report['no_energy']}.")
    noisy = [row for row in report["measurements"] if row["noise"] and row["error"] is None]
    if noisy:
        total = sum(row["error"] is None for row in report["measurements"])
        parts.append(f"**The machine was noisy in {len(noisy)} of {total} measurements, marked ≈.** {NOISE_RULE}")
    for subject in dict.fromkeys(row["subject"] for row in report["measurements"]):
        parts.append(f"## {subject}\n\n{_speed_table(report, subject)}")
        parts.append(_detail_table(report, subject))
    if report["accuracy"]:
        parts.append("## Accuracy against torch fp32, held-out text\n\n" + accuracy_table(report))
    parts.append(failures(report))
    parts.append(f"## Bars\n\n{BARS_RULE}\n\n{_bars_table(bars(report))}")
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _named(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _bars_table(found: Sequence[Bar]) -> str:
    def cells(bar: Bar) -> list[str]:
        met = {None: "not measured", True: "met", False: "missed"}[bar.met]
        reached = "" if bar.reached is None else f"{'≈ ' if bar.is_noisy else ''}{bar.reached:.2f}"
        return [bar.workload, bar.precision, f"≥ {bar.bar:g}", reached, met, bar.by]

    return table(["", "precision", "bar", "times as fast", "", "by"], [cells(bar) for bar in found])


def _ordered(report: Report, subject: str) -> list[str]:
    present = dict.fromkeys(row["workload"] for row in measured(report, subject))
    known = [name for name in NAMES if name in present]
    return [*known, *(name for name in present if name not in known)]


def _speed_table(report: Report, subject: str) -> str:
    """Return the table of speeds relative to the reference."""
    workloads = _ordered(report, subject)
    names = dict.fromkeys(row["contestant"] for row in measured(report, subject))
    rows = []
    for name in names:
        found = [find(report, name, workload, subject) for workload in workloads]
        kernel = next((row["kernel"] for row in found if row is not None), None)
        rows.append([name, kernel or "", *(_speed(row, report) for row in found)])
    head = (
        f"Speed relative to {REFERENCE}; for a list of texts, relative to {TEXT_REFERENCE}. The kernels are the "
        "fastest that the CPU has for the precision:"
    )
    return f"{head}\n\n{table(['', 'kernels', *workloads], rows)}"


def _speed(row: Row | None, report: Report) -> str:
    value = relative(row, report)
    return "" if row is None or value is None else f"{'≈ ' if row['noise'] else ''}{value:.2f}"


def _detail_table(report: Report, subject: str) -> str:
    rows = []
    for workload in _ordered(report, subject):
        for row in measured(report, subject, workload):
            spread, share = Spread.of(row["seconds"]), share_of_peak(row, report)
            rows.append(
                [
                    f"{workload}, {row['contestant']}",
                    f"{spread.median * 1000:,.1f}",
                    f"{spread.q1 * 1000:,.1f} – {spread.q3 * 1000:,.1f}",
                    str(len(row["seconds"])),
                    f"{row['tokens'] / spread.median:,.0f}",
                    "" if share is None else f"{share:.0%}",
                    f"{row['peak_bytes'] / 1e6:,.0f}" if row["alone"] else "",
                    f"{statistics.median(row['joules']):,.1f}" if row["joules"] else "",
                ]
            )
    return table(["", "median ms", "quartiles", "rounds", "tokens/s", "of GEMM peak", "peak MB, alone", "joules"], rows)


def accuracy_table(report: Report) -> str:
    """Return a table that compares every contestant's answers with the reference's."""

    def number(value: dict[str, float] | None, key: str, form: str) -> str:
        return "" if value is None else format(value[key], form)

    rows = [
        [
            f"{row['subject']}, {row['contestant']}",
            number(row.get("token_embeddings"), "mean", ".6f"),
            number(row.get("token_embeddings"), "min", ".6f"),
            number(row.get("embed"), "mean", ".6f"),
            number(row.get("embed"), "min", ".6f"),
            number(row.get("mask_logits"), "top1_agreement", ".1%"),
            number(row.get("mask_logits"), "top5_overlap", ".1%"),
            number(row.get("mask_logits"), "right", ".1%"),
        ]
        for row in report["accuracy"]
        if row["error"] is None
    ]
    head = ["", "token cosine", "least", "sentence cosine", "least", "top-1 agreement", "top-5 overlap", "right"]
    return table(head, rows)


def failures(report: Report, tables: Sequence[str] = ("measurements", "accuracy")) -> str:
    """Return a list of the contestants without numbers and the reasons, one line for each reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for name in tables:
        for row in report[name]:
            if row["error"] is not None:
                where = f"{row['subject']} {row.get('workload', name)}"
                places.setdefault((row["contestant"], row["error"]), []).append(where)
    if not places:
        return ""
    lines = [f"- {name} ({', '.join(where)}): {reason}" for (name, reason), where in places.items()]
    return "## Not measured\n\n" + "\n".join(lines)

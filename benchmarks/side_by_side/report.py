"""Makes ratios, bars and tables from the numbers of a run, which its JSON file holds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gte_deploy.tuning.measure import Spread
from side_by_side.contestants import REFERENCE, TEXT_REFERENCE, reference_of
from side_by_side.workloads import DENSE, NAMES

Report = dict[str, Any]
Row = dict[str, Any]

OUR_ORT = "gte-deploy onnx fp32"
PLAIN_ORT = "ORT plain graph"
PRECISIONS = ("fp32", "16-bit", "int8")
SUBJECT = "base"
LONGEST = "1x8192"


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars (targets); `reached` is None if it was not measured."""

    name: str
    bar: float
    stretch: float | None
    reached: float | None
    by: str
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None if it was not measured."""
        if self.reached is None:
            return None
        return self.reached <= self.bar if self.at_most else self.reached >= self.bar

    @property
    def stretch_met(self) -> bool | None:
        """Whether the stretch goal is reached; None if there is none or it was not measured."""
        if self.reached is None or self.stretch is None:
            return None
        return self.reached <= self.stretch if self.at_most else self.reached >= self.stretch


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


def best(report: Report, workload: str, precision: str, *, ours: bool) -> tuple[str, float] | None:
    """Return name and relative speed of the fastest contestant of a precision."""
    rows = [row for row in measured(report, SUBJECT, workload) if row["ours"] == ours and row["precision"] == precision]
    found = [(row["contestant"], speed) for row in rows if (speed := relative(row, report)) is not None]
    return max(found, key=lambda pair: pair[1], default=None)


def cosine(report: Report, contestant: str, subject: str = SUBJECT) -> float | None:
    """Return the mean token cosine with the reference, or the mean sentence cosine if there are no tokens."""
    for row in report["accuracy"]:
        if (row["subject"], row["contestant"]) == (subject, contestant) and row["error"] is None:
            found = row.get("token_embeddings") or row.get("embed")
            return found["mean"] if found else None
    return None


def bars(report: Report) -> list[Bar]:
    """Return the bars of the base size, with the measured results."""
    found: list[Bar] = []

    def speed(name: str, workload: str, bar: float, stretch: float | None, winner: tuple[str, float] | None) -> None:
        by, reached = winner or ("", None)
        note = f"{by}, cosine {value:.6f}" if (value := cosine(report, by)) is not None else by
        found.append(Bar(f"{name} against torch fp32, {workload}", bar, stretch, reached, note))

    for workload, bar in (("1x512", 1.25), ("8x128", 1.15)):
        reached = relative(find(report, OUR_ORT, workload), report)
        speed("ORT fp32", workload, bar, 1.45, (OUR_ORT, reached) if reached else None)
    found += _against_plain(report)
    for precision, bar in (("fp32", 1.4), ("int8", 1.0)):
        found.append(_memory(report, precision, bar))
    padded, sorted_ = (find(report, OUR_ORT, name) for name in ("mixed-padded", "mixed"))
    gain = _median(padded) / _median(sorted_) if padded and sorted_ else None
    found.append(Bar("mixed batch against one padded batch", 1.9, 2.2, gain, OUR_ORT))
    for workload, bar, stretch in (("1x512", 3.3, 4.0), ("8x128", 4.4, 5.0)):
        speed("best int8 of ours", workload, bar, stretch, best(report, workload, "int8", ours=True))
    for workload, bar, stretch in (("1x512", 2.0, 2.4), ("8x128", 2.5, 2.8)):
        speed("best 16-bit of ours", workload, bar, stretch, best(report, workload, "16-bit", ours=True))
    half = best(report, "1x512", "16-bit", ours=True)
    found.append(
        Bar(
            "cosine of the best 16-bit of ours", 0.9999, None, half and cosine(report, half[0]), half[0] if half else ""
        )
    )
    for precision in PRECISIONS:
        found.append(_against_peers(report, precision, DENSE, 1.0, "dense shapes"))
        found.append(_against_peers(report, precision, ("mixed", "corpus"), 1.9, "mixed lengths"))
    return found


def markdown(report: Report) -> str:
    """Return all results as Markdown tables."""
    hardware, peak = report["hardware"], report["gemm_peak"]
    parts = [
        f"# Inference on the CPU, {report['date'][:10]}",
        f"{hardware['cpu']} ({', '.join(hardware['instructions'])}), {hardware['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "\n".join(f"    {command}" for command in report["commands"]),
    ]
    if peak:
        rates = ", ".join(f"{name} {peak[name] / 1e9:,.0f} G" for name in PRECISIONS)
        parts.append(f"GEMM peak, operations/s: {rates} ({peak['method']}).")
    parts.append("## Bars\n\n" + _bars_table(bars(report)))
    for subject in dict.fromkeys(row["subject"] for row in report["measurements"]):
        parts.append(f"## {subject}\n\n{_speed_table(report, subject)}")
        parts.append(_detail_table(report, subject))
    if report["accuracy"]:
        parts.append("## Accuracy against torch fp32, held-out text\n\n" + accuracy_table(report))
    parts.append(failures(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _against_plain(report: Report) -> list[Bar]:
    ours, plain = find(report, OUR_ORT, LONGEST), find(report, PLAIN_ORT, LONGEST)
    both = ours is not None and plain is not None
    faster = _median(plain) / _median(ours) if ours and plain else None
    memory = ours["peak_bytes"] / plain["peak_bytes"] if ours and plain and both else None
    return [
        Bar("fused against the plain graph at 8,192 tokens, times as fast", 2.3, None, faster, OUR_ORT),
        Bar("fused against the plain graph at 8,192 tokens, share of memory", 0.1, None, memory, OUR_ORT, at_most=True),
    ]


def _memory(report: Report, precision: str, bar: float) -> Bar:
    rows = [row for row in measured(report, SUBJECT, LONGEST) if row["ours"] and row["precision"] == precision]
    least = min(rows, key=lambda row: row["peak_bytes"], default=None)
    reached = least["peak_bytes"] / 1e9 if least else None
    by = least["contestant"] if least else ""
    return Bar(f"peak resident GB at 8,192 tokens, {precision}", bar, None, reached, by, at_most=True)


def _against_peers(report: Report, precision: str, workloads: Sequence[str], bar: float, name: str) -> Bar:
    """Return the smallest lead of our best over the best peer, among workloads with both."""
    leads = []
    for workload in workloads:
        ours, peer = (best(report, workload, precision, ours=side) for side in (True, False))
        if ours and peer:
            leads.append((ours[1] / peer[1], f"{workload}: {ours[0]} over {peer[0]}", ours[0], peer[0]))
    reached, by, *names = min(leads, default=(None, "", "", ""))
    values = [f"{value:.5f}" for one in names if (value := cosine(report, one)) is not None]
    note = f"{by} (cosines {' and '.join(values)})" if values and precision != "fp32" else by
    return Bar(f"ours against the best peer, {precision}, {name}", bar, None, reached, note)


def _median(row: Row) -> float:
    return statistics.median(row["seconds"])


def _bars_table(found: Sequence[Bar]) -> str:
    def answer(value: bool | None) -> str:
        return "not measured" if value is None else "yes" if value else "no"

    def cells(bar: Bar) -> list[str]:
        sign = "≤ " if bar.at_most else "≥ "
        digits = 6 if bar.bar == 0.9999 else 2
        stretch = "" if bar.stretch is None else f"{sign}{bar.stretch:g}"
        reached = "" if bar.reached is None else f"{bar.reached:.{digits}f}"
        stretch_met = "" if bar.stretch is None else answer(bar.stretch_met)
        return [bar.name, f"{sign}{bar.bar:g}", reached, answer(bar.met), stretch, stretch_met, bar.by]

    return table(["", "bar", "reached", "met", "stretch", "stretch met", "by"], [cells(bar) for bar in found])


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
        found = [relative(find(report, name, workload, subject), report) for workload in workloads]
        rows.append([name, *("" if value is None else f"{value:.2f}" for value in found)])
    head = f"Speed relative to {REFERENCE}; for a corpus of texts, relative to {TEXT_REFERENCE}:"
    return f"{head}\n\n{table(['', *workloads], rows)}"


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
                ]
            )
    return table(["", "median ms", "quartiles", "rounds", "tokens/s", "of GEMM peak", "peak MB, alone"], rows)


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

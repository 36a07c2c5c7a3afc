"""Makes tables from the numbers of a GPU run, which its JSON file holds."""

from __future__ import annotations

import statistics
from typing import Any

from side_by_side.report import accuracy_table, failures, measured, table

from gpu_side_by_side.contestants import EXACT, REFERENCE
from gte_deploy.tuning.measure import Spread

Report = dict[str, Any]
Row = dict[str, Any]


def speed(row: Row) -> float | None:
    """Return the speed relative to the reference in the same rounds; None without these rounds."""
    if not row["reference_seconds"]:
        return None
    return statistics.median(row["reference_seconds"]) / statistics.median(row["seconds"])


def markdown(report: Report) -> str:
    """Return all results as Markdown tables."""
    hardware = report["hardware"]
    parts = [
        f"# Inference on {hardware.get('gpu', 'no GPU: a trial of the benchmark')}, {report['date'][:10]}",
        ", ".join(f"{name} {value}" for name, value in hardware.items()) + ".",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        "\n".join(f"    {command}" for command in report["commands"]),
        "Input is one padded batch of ids in host memory; output is float32 in host memory. Rounds are interleaved. "
        "Memory is the peak of the GPU less its memory before the contestant started; contexts count.",
    ]
    if any(row["error"] is None for row in report["claims"]):
        parts.append(f"## Claims, checked first\n\n{_claims(report)}")
    for subject in dict.fromkeys(row["subject"] for row in report["measurements"]):
        if measured(report, subject):
            parts.append(f"## {subject}\n\nSpeed relative to {REFERENCE}:\n\n{_speeds(report, subject)}")
            parts.append(f"Milliseconds, median and quartiles:\n\n{_times(report, subject)}")
        if any(row["subject"] == subject and row["error"] is None for row in report["memory"]):
            parts.append(f"Peak GPU memory, MB:\n\n{_memory(report, subject)}")
    if report["accuracy"]:
        parts.append(f"## Accuracy against {EXACT}, held-out text\n\n{accuracy_table(report)}")
    parts.append(failures(report, ("claims", "measurements", "memory", "accuracy")))
    return "\n\n".join(part for part in parts if part) + "\n"


def _claims(report: Report) -> str:
    """Return a table with a row for each contestant whose claims were checked; a first run includes opening."""
    head = (
        "",
        "finite",
        "least cosine",
        "hits",
        "replays",
        "contexts",
        "first run, s",
        "with kept kernels, s",
        "kept, MB",
    )
    lines = []
    for row in (row for row in report["claims"] if row["error"] is None):
        lines.append(
            [
                f"{row['subject']}: {row['contestant']}",
                "yes" if row["finite"] else "**no**",
                f"{row['cosine_min']:.5f}" if "cosine_min" in row else "",
                f"{row['hit_rate']:.1%}" if "hit_rate" in row else "",
                f"{row['replay_rate']:.1%}" if "replay_rate" in row else "",
                str(row.get("contexts", "")),
                f"{row['cold']['open_s'] + row['cold']['first_run_s']:.2f}",
                f"{row['warm']['open_s'] + row['warm']['first_run_s']:.2f}",
                f"{row['kept_bytes'] / 1e6:.1f}",
            ]
        )
    return table(head, lines)


def _speeds(report: Report, subject: str) -> str:
    def cell(row: Row) -> str:
        value = speed(row)
        return "" if value is None else f"{value:.2f}"

    return _grid(measured(report, subject), cell)


def _times(report: Report, subject: str) -> str:
    def cell(row: Row) -> str:
        spread = Spread.of(row["seconds"])
        return f"{spread.median * 1000:,.2f} ({spread.q1 * 1000:,.2f} – {spread.q3 * 1000:,.2f})"

    return _grid(measured(report, subject), cell)


def _memory(report: Report, subject: str) -> str:
    rows = [row for row in report["memory"] if row["subject"] == subject and row["error"] is None]
    return _grid(rows, lambda row: f"{row['peak_bytes'] / 1e6:,.0f}")


def _grid(rows: list[Row], cell: Any) -> str:
    """Return a table with a row for each contestant and a column for each workload."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    cells = {(row["contestant"], row["workload"]): cell(row) for row in rows}
    names = dict.fromkeys(row["contestant"] for row in rows)
    lines = [[name, *(cells.get((name, workload), "") for workload in workloads)] for name in names]
    return table(["", *workloads], lines)

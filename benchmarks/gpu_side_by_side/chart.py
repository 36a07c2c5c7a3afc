"""Draws a GPU run: tokens per second by length, with a panel for each number of rows."""

from __future__ import annotations

import re
import statistics
from functools import partial
from pathlib import Path

from side_by_side.report import measured

from gpu_side_by_side.report import Report, Row
from gte_deploy.core.files import write_with

# One colour for each precision; our lines are solid, the others dashed.
_COLOURS = {"fp32": "#6b7280", "fp16": "#2563eb", "bf16": "#ea580c", "int8": "#15803d", "fp8": "#9333ea"}
_MARKERS = "osD^vP*X"


def draw(report: Report, subject: str, target: Path) -> bool:
    """Write a PNG of the dense workloads of a subject; return False if none was measured."""
    from matplotlib.figure import Figure

    rows = [(shape, row) for row in measured(report, subject) if (shape := _shape(row)) is not None]
    if not rows:
        return False
    batches = sorted({batch for (batch, _), _ in rows})
    figure = Figure(figsize=(4.6 * len(batches) + 2.6, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    names = dict.fromkeys(row["contestant"] for _, row in rows)
    for axes, batch in zip(panels, batches, strict=True):
        for number, name in enumerate(names):
            mine = [(length, row) for (rows_, length), row in rows if rows_ == batch and row["contestant"] == name]
            if not mine:
                continue
            mine.sort(key=lambda pair: pair[0])
            speeds = [row["tokens"] / statistics.median(row["seconds"]) for _, row in mine]
            ours = mine[0][1]["ours"]
            axes.plot(
                [length for length, _ in mine],
                speeds,
                color=_COLOURS[mine[0][1]["precision"]],
                linestyle="-" if ours else "--",
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                linewidth=1.2,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{batch} row{'s' if batch > 1 else ''}", fontsize=10)
        axes.set_xlabel("tokens of a row")
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens a second")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=7)
    device = report["hardware"].get("gpu", report["hardware"]["cpu"])
    figure.suptitle(f"GTE {subject} on {device}, {report['date'][:10]}", fontsize=11)
    write_with(target, partial(figure.savefig, format="png", metadata={"Software": None}))
    return True


def _shape(row: Row) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)x(\d+)", row["workload"])
    return (int(found[1]), int(found[2])) if found else None

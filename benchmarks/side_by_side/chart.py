"""Draws the result: speed relative to torch fp32, with the best peer beside our best contestant."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from gte_deploy.core.files import write_with
from side_by_side.report import PRECISIONS, SUBJECT, Report, measured, ranked
from side_by_side.workloads import NAMES

# Peers are pale, ours are strong, with one hue for each precision; order and labels work without colour.
_COLOURS = {"fp32": ("#bfdbfe", "#2563eb"), "16-bit": ("#fed7aa", "#ea580c"), "int8": ("#bbf7d0", "#15803d")}
_WIDTH = 0.8


def draw(report: Report, target: Path) -> None:
    """Write a PNG, unless no workload of the base size was measured."""
    from matplotlib.figure import Figure

    names = [name for name in NAMES if name != "mixed-padded" and measured(report, SUBJECT, name)]
    sides = [(precision, ours) for precision in PRECISIONS for ours in (False, True)]
    series = {
        (precision, ours): [next(iter(ranked(report, name, precision, ours=ours)), None) for name in names]
        for precision, ours in sides
    }
    shown = {key: values for key, values in series.items() if any(values)}
    if not shown:
        return
    figure = Figure(figsize=(max(6.0, 1.35 * len(names) + 1.5), 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    width = _WIDTH / len(shown)
    for number, ((precision, ours), values) in enumerate(shown.items()):
        places = [i - _WIDTH / 2 + (number + 0.5) * width for i in range(len(names))]
        heights = [value[1] if value else 0.0 for value in values]
        label = f"{precision}, {'gte-deploy' if ours else 'best peer'}"
        drawn = axes.bar(places, heights, 0.92 * width, color=_COLOURS[precision][ours], label=label)
        labels = [f"{height:.1f}" if height else "" for height in heights]
        axes.bar_label(drawn, labels, fontsize=6, padding=1, rotation=90 if width < 0.12 else 0)
    axes.axhline(1.0, color="#374151", linewidth=0.9)
    axes.set_xticks(range(len(names)), [re.sub(r"(\d)x(\d)", r"\1 × \2", name) for name in names])
    axes.set_ylabel("times as fast as torch eager fp32")
    axes.set_xlabel("rows × tokens, or texts of mixed lengths; lists against sentence-transformers", fontsize=8)
    hardware = report["hardware"]
    axes.set_title(
        f"GTE base on {hardware['cpu']}, {hardware['threads']} threads, {report['date'][:10]}", fontsize=10, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.margins(y=0.25)
    write_with(target, partial(figure.savefig, format="png", metadata={"Software": None}))

"""Plots of evaluations: scores as bars, and the losses of fine-tunings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.core.files import write_with
from gte_deploy.training.figures import new_figure

LOSSES_FILE = "losses.png"
_MOST_POINTS = 200  # of one curve; more are averaged


def plot_scores(path: Path, tasks: Sequence[str], scores: Mapping[str, Sequence[float | None]]) -> None:
    """Plot one group of bars for each task, and in it a bar for each system.

    Args:
        path: the .png to write.
        tasks: names of the tasks.
        scores: name of a system -> its scores in percent in the order of `tasks`; None leaves the place of a bar empty.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _figure(max(6.0, 1.2 + 0.9 * len(tasks)), 4.0)
    axes = figure.subplots()
    width = 0.8 / max(1, len(scores))
    for number, (name, values) in enumerate(scores.items()):
        places = np.arange(len(tasks)) + (number - (len(scores) - 1) / 2) * width
        heights = [np.nan if value is None else value for value in values]
        bars = axes.bar(places, heights, width, label=name)
        labels = ["" if value is None else f"{value:.1f}" for value in values]
        axes.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
    axes.set_xticks(np.arange(len(tasks)), tasks, rotation=30, ha="right")
    axes.set(ylabel="score, percent", ylim=(0, 115), yticks=range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    if len(scores) > 1:
        axes.legend(fontsize=8, ncols=2, loc="lower right")
    write_with(path, partial(figure.savefig, format="png", dpi=120))


def plot_losses(path: Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Plot the training losses of fine-tunings, one panel for each.

    Args:
        path: the .png to write.
        losses: title -> loss of each step. Long curves are averaged over neighbouring steps.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    columns = min(4, len(losses))
    rows = -(-len(losses) // columns)
    figure = _figure(3.0 * columns, 2.3 * rows)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes, (title, values) in zip(panels, losses.items(), strict=False):
        steps, means = _averaged(values)
        axes.plot(steps, means, linewidth=1)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[len(losses) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("training loss", fontsize=8)
    write_with(path, partial(figure.savefig, format="png", dpi=120))


def _averaged(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    parts = np.array_split(np.asarray(values, dtype=np.float64), min(len(values), _MOST_POINTS))
    lengths = np.array([len(part) for part in parts])
    return np.cumsum(lengths) - (lengths - 1) / 2, np.array([part.mean() for part in parts])


def _figure(width: float, height: float) -> Any:
    return new_figure(width, height)

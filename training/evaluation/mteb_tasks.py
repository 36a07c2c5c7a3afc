"""Tasks of MTEB (arXiv 2210.07316) for several models: the package `mteb` reads the data, runs and scores them.

A checkpoint runs as a model of sentence-transformers in float32, as `open_trained` opens it. MTEB's own command would
load the stored type, and the code of the original layout.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gte_deploy.core.errors import InputError, MissingDependencyError
from gte_deploy.training.evaluation.retrieval import OpenModel, open_to_rank
from gte_deploy.training.mteb_options import MtebOptions


@dataclass(frozen=True)
class MtebRow:
    """The scores of one model.

    Args:
        model: its name.
        kind: "embed", "sparse" or "rerank".
        scores: task -> its main score, a mean over its splits and languages, from 0 to 1.
        metrics: task -> the name of its main score.
        results: task -> MTEB's own result, with all scores, the version of mteb and the revision of the data.
    """

    model: str
    kind: str
    scores: Mapping[str, float]
    metrics: Mapping[str, str]
    results: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """The mean of the main scores over the tasks."""
        return sum(self.scores.values()) / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**vars(self), "mean": self.mean}


def evaluate_on_mteb(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    options: MtebOptions,
    progress: bool = False,
    open_model: OpenModel | None = None,
) -> list[MtebRow]:
    """Run tasks of MTEB.

    Args:
        models: folders or hub ids of checkpoints, or whatever `open_model` opens.
        tasks: names of the tasks.
        options: languages, batches, limit of the texts, and device.
        progress: whether lines on stderr tell what is computed.
        open_model: opens a model by its name; None is `open_to_rank`.

    Returns:
        a row for each model.

    Raises:
        MissingDependencyError: `mteb` is not installed.
        InputError: a task is unknown.
        CheckpointError: a model cannot be loaded.
        ConfigError: a model is for another task.
    """
    mteb = _library()
    chosen = _tasks(mteb, tasks, options.languages)
    arguments = {"batch_size": options.batch_size, "show_progress_bar": False}
    rows = []
    for name in dict.fromkeys(models):
        with (open_model or open_to_rank)(name, options) as (kind, model):
            found = {}
            for task in chosen:
                if progress:
                    print(f"{name}: {task.metadata.name}", file=sys.stderr, flush=True)
                # No cache: it knows a model by its name alone, and a checkpoint in a folder may change.
                result = mteb.evaluate(
                    model, task, cache=None, encode_kwargs=dict(arguments), show_progress_bar=False, raise_error=True
                )
                found[task.metadata.name] = result.task_results[0]
        rows.append(
            MtebRow(
                model=name,
                kind=kind,
                scores={task: float(result.get_score()) for task, result in found.items()},
                metrics={task.metadata.name: task.metadata.main_score for task in chosen},
                results={task: result.model_dump(mode="json") for task, result in found.items()},
            )
        )
    return rows


def table(rows: Sequence[MtebRow]) -> str:
    """Format the main scores for people, in percent: one line for each task, one column for each model."""
    labels = {task: f"{task} ({metric})" for task, metric in rows[0].metrics.items()}
    width = max(len(label) for label in (*labels.values(), "mean"))
    columns = [max(len(row.model), 7) + 2 for row in rows]
    lines = [f"{'task':{width}}" + "".join(f"{row.model:>{size}}" for row, size in zip(rows, columns, strict=True))]
    for task, label in labels.items():
        cells = "".join(f"{100 * row.scores[task]:>{size}.2f}" for row, size in zip(rows, columns, strict=True))
        lines.append(f"{label:{width}}{cells}")
    if len(labels) > 1:
        means = "".join(f"{100 * row.mean:>{size}.2f}" for row, size in zip(rows, columns, strict=True))
        lines.append(f"{'mean':{width}}{means}")
    return "\n".join(lines)


def _library() -> Any:
    try:
        return importlib.import_module("mteb")  # by name: type checkers need not have it
    except ImportError as error:
        raise MissingDependencyError("mteb", "mteb") from error


def _tasks(mteb: Any, names: Sequence[str], languages: Sequence[str] | None) -> list[Any]:
    chosen = []
    for name in dict.fromkeys(names):
        try:
            chosen += list(mteb.get_tasks(tasks=[name], languages=None if languages is None else list(languages)))
        except (KeyError, ValueError) as error:
            said = error.args[0] if error.args else name
            raise InputError(f"MTEB has no task {name!r} for these options: {said}") from error
    if len(chosen) < len(set(names)):
        raise InputError(f"MTEB has {len(chosen)} of the {len(set(names))} tasks {', '.join(names)} in these languages")
    return chosen

"""The eight GLUE tasks: their protocol, their columns and files as published, their classes and their metrics.

WNLI is left out, as in the published table. Metrics are in percent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError, MissingDependencyError
from gte_deploy.core.hub import hub_errors
from gte_deploy.core.options import natural

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"


# --- metrics --------------------------------------------------------------------------------------------------------


def accuracy(predictions: NDArray, labels: NDArray) -> float:
    """Return the share of equal classes, in percent."""
    return 100 * float(np.mean(predictions == labels))


def f1(predictions: NDArray, labels: NDArray) -> float:
    """Return the F1 score of class 1, in percent; 0 if there is no true positive."""
    both = np.sum((predictions == 1) & (labels == 1))
    return 100 * float(2 * both / max(1, np.sum(predictions == 1) + np.sum(labels == 1)))


def matthews(predictions: NDArray, labels: NDArray) -> float:
    """Return Matthews' correlation of two classes, in percent; 0 if either side has one class only.

    It is Pearson's correlation of the class numbers 0 and 1.
    """
    return 100 * _correlation(predictions.astype(np.float64), labels.astype(np.float64))


def spearman(predictions: NDArray, labels: NDArray) -> float:
    """Return Spearman's rank correlation, in percent; 0 if either side is constant. Ties have their mean rank."""
    return 100 * _correlation(_mean_ranks(predictions), _mean_ranks(labels))


def _correlation(a: NDArray, b: NDArray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / scale) if scale > 0 else 0.0


def _mean_ranks(values: NDArray) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts - 1) / 2)[places]


# --- tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TaskDescription:
    """One GLUE task.

    Args:
        name: its name on the hub.
        folder: its folder's name in the published archives.
        columns: the columns (text, [second text,] label), as the archive names them and as the hub names them.
        classes: names of the classes in the order of the hub's label ids; empty for a regression.
        metric: the metric's name in the table.
        score: the metric: a function of predictions and labels, [N] each, that returns percent.
        dev: stem of the development split's file, in the archive and on the hub.
        starts_from: the task from whose fine-tuned encoder this one starts.
    """

    name: str
    folder: str
    columns: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    metric: str
    score: Callable[[NDArray, NDArray], float]
    dev: tuple[str, str] = ("dev", "validation")
    starts_from: str | None = None

    @property
    def num_labels(self) -> int:
        """Number of outputs of the classifier; one for a regression."""
        return len(self.classes) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers, not classes."""
        return not self.classes

    @property
    def is_start(self) -> bool:
        """Whether another task starts from the encoder that this one fine-tuned."""
        return any(other.starts_from == self.name for other in GLUE_TASKS.values())


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS = {
    task.name: task
    for task in (
        TaskDescription(
            name="cola",
            folder="CoLA",
            columns=(("sentence", "label"),),
            classes=_BINARY,
            metric="Matthews",
            score=matthews,
        ),
        TaskDescription(
            name="sst2",
            folder="SST-2",
            columns=(("sentence", "label"),),
            classes=_BINARY,
            metric="accuracy",
            score=accuracy,
        ),
        TaskDescription(
            name="mnli",
            folder="MNLI",
            columns=(("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label")),
            classes=("entailment", "neutral", "contradiction"),
            metric="accuracy (m)",
            score=accuracy,
            dev=("dev_matched", "validation_matched"),
        ),
        TaskDescription(
            name="mrpc",
            folder="MRPC",
            columns=(("#1 String", "#2 String", "Quality"), ("sentence1", "sentence2", "label")),
            classes=_BINARY,
            metric="F1",
            score=f1,
            starts_from="mnli",
        ),
        TaskDescription(
            name="stsb",
            folder="STS-B",
            columns=(("sentence1", "sentence2", "score"), ("sentence1", "sentence2", "label")),
            classes=(),
            metric="Spearman",
            score=spearman,
            starts_from="mnli",
        ),
        TaskDescription(
            name="qqp",
            folder="QQP",
            columns=(("question1", "question2", "is_duplicate"), ("question1", "question2", "label")),
            classes=_BINARY,
            metric="F1",
            score=f1,
        ),
        TaskDescription(
            name="qnli",
            folder="QNLI",
            columns=(("question", "sentence", "label"),),
            classes=_ENTAILMENT,
            metric="accuracy",
            score=accuracy,
        ),
        TaskDescription(
            name="rte",
            folder="RTE",
            columns=(("sentence1", "sentence2", "label"),),
            classes=_ENTAILMENT,
            metric="accuracy",
            score=accuracy,
            starts_from="mnli",
        ),
    )
}
# The archive's CoLA files have no header.
_COLA_COLUMNS = ("source", "label", "mark", "sentence")


def tasks_in_order(names: Iterable[str]) -> list[TaskDescription]:
    """Return the named tasks and the tasks from which they start, each after the one from which it starts.

    Raises:
        InputError: a name is unknown.
    """
    wanted = set(names)
    if unknown := sorted(wanted - GLUE_TASKS.keys()):
        raise InputError(f"unknown GLUE tasks {', '.join(unknown)}; there are {', '.join(GLUE_TASKS)}")
    wanted |= {start for name in wanted if (start := GLUE_TASKS[name].starts_from) is not None}
    return [task for task in GLUE_TASKS.values() if task.name in wanted]


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """N labelled examples: `texts` [N], one or two texts each; `labels` [N], int64, or float32 for a regression."""

    texts: list[tuple[str, ...]]
    labels: NDArray

    def __len__(self) -> int:
        return len(self.texts)


def load_split(task: TaskDescription, split: str, *, data: Path | None) -> Examples:
    """Read one split of a task.

    Args:
        task: one of GLUE_TASKS.
        split: "train" or "dev".
        data: folder that holds one folder per task, named as in the archives or as on the hub, with `train` and `dev`
            (or `validation`; MNLI: `dev_matched`) as .tsv, .jsonl or .parquet; None takes `nyu-mll/glue` from the hub.

    Raises:
        InputError: a folder, file or column is missing, or a label is not one of the task's.
        MissingDependencyError: `datasets` or `pyarrow` is not installed.
    """
    stems = ("train",) if split == "train" else task.dev
    rows, where = _rows_of_hub(task, stems[-1]) if data is None else _rows_of_folder(task, stems, data)
    texts, labels, skipped = [], [], 0
    columns: tuple[str, ...] | None = None
    for number, row in enumerate(rows, start=1):
        columns = columns or _choose_columns(task, row, where)
        values = [row.get(column) for column in columns]
        if any(value is None for value in values):  # QQP's archive has a few broken lines
            skipped += 1
            continue
        texts.append(tuple(str(value) for value in values[:-1]))
        labels.append(_label(task, values[-1], f"{where}, row {number}"))
    if skipped:
        logger.warning("%s: left out %d rows with missing columns", where, skipped)
    if not texts:
        raise InputError(f"{where} holds no example")
    return Examples(texts, np.array(labels, dtype=np.float32 if task.is_regression else np.int64))


def _choose_columns(task: TaskDescription, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for columns in task.columns:
        if set(columns) <= row.keys():
            return columns
    expected = " or ".join(", ".join(columns) for columns in task.columns)
    raise InputError(f"{where} has the columns {', '.join(row)}; expected {expected}")


def _label(task: TaskDescription, value: Any, where: str) -> float | int:
    if task.is_regression:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not 0 <= number <= 5:
            raise InputError(f"{where}: the score is {value!r}; expected 0 to 5")
        return number
    text = str(value)
    if text in task.classes:
        return task.classes.index(text)
    if (index := natural(text)) is not None and index < len(task.classes):
        return index
    raise InputError(f"{where}: the label is {value!r}; expected one of {', '.join(task.classes)}, or its number")


def _rows_of_hub(task: TaskDescription, split: str) -> tuple[Iterable[Mapping[str, Any]], str]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingDependencyError("datasets", "train") from error
    where = f"{HUB_DATASET} {task.name} {split}"
    try:
        # `datasets` declares the rows of every format that can be set; without one a row is a dict.
        rows = cast(Iterable[Mapping[str, Any]], load_dataset(HUB_DATASET, task.name, split=split))
    except (*hub_errors(), DatasetsError, RuntimeError) as error:
        advice = "Check the network and HF_HUB_OFFLINE, or give the files with --data"
        raise InputError(f"{where} cannot be opened: {str(error).rstrip('.')}. {advice}") from error
    return rows, where


def _rows_of_folder(task: TaskDescription, stems: Sequence[str], data: Path) -> tuple[Iterator[Mapping[str, Any]], str]:
    folder = _task_folder(task, data)
    for stem in stems:
        for suffix, read in _READERS.items():
            exact = folder / f"{stem}{suffix}"
            # The hub's Parquet files are called train-00000-of-00001.parquet.
            files = [exact] if exact.is_file() else sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
            if files:
                return (row for file in files for row in read(file, task)), str(files[0])
    names = " or ".join(f"{stem}{suffix}" for stem in stems for suffix in _READERS)
    raise InputError(f"{folder} has no {names}")


def _task_folder(task: TaskDescription, data: Path) -> Path:
    for name in (task.folder, task.name, task.folder.lower()):
        if (data / name).is_dir():
            return data / name
    raise InputError(f"{data} has no folder {task.folder} (or {task.name}); leave --data out to read the hub")


def _read_tsv(file: Path, task: TaskDescription) -> Iterator[dict[str, str | None]]:
    # The archives do not quote, and their texts contain quotation marks and Unicode line separators.
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        rows = (line.rstrip("\r\n").split("\t") for line in lines)
        header: Sequence[str] = _COLA_COLUMNS if task.name == "cola" else next(rows, [])
        for values in rows:
            yield {name: values[i] if i < len(values) else None for i, name in enumerate(header)}


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; blank lines are skipped.

    Raises:
        InputError: a line is no JSON object; the message names it.
    """
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: expected an object")
            yield row


def _read_jsonl(file: Path, task: TaskDescription) -> Iterator[dict[str, Any]]:
    return read_json_lines(file)


def _read_parquet(file: Path, task: TaskDescription) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path, TaskDescription], Iterator[Mapping[str, Any]]]] = {
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

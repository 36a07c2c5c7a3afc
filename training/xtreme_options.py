"""The options of `gte-train xtreme`. Importing this loads neither numpy nor torch; see `training/options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option
from gte_deploy.training.options import FineTuningOptions

XtremeTask = Literal[
    "xnli", "xcopa", "udpos", "wikiann", "xquad", "mlqa", "tydiqa", "mewslix", "lareqa", "tatoeba"
]  # in the order of the published table


@dataclass(frozen=True)
class XtremeArguments:
    """The model to evaluate, the data, and the folder of the results.

    Args:
        model: checkpoint folder, preset name or hub id.
        output: folder of the results.
        data: folder that holds the published files of the tasks, or clones of the hub's datasets; None reads the hub.
        list_systems: only print the published table.

    Raises:
        InputError: model or output is missing, and not only the published table is asked for.
    """

    model: str | None = option(
        None,
        "multilingual encoder: checkpoint folder, preset name or hub id",
        positional=True,
        nargs="?",
        metavar="MODEL",
    )
    output: Path | None = option(
        None,
        "folder of the results; finished tasks are not run again",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )
    data: Path | None = option(
        None,
        "folder that holds the published files, one folder per data set, or clones of the hub's datasets, each in "
        "OWNER/NAME (default: read them from the hub)",
        metavar="FOLDER",
        parse=Path,
    )
    list_systems: bool = option(False, "print the published table and its source")

    def __post_init__(self) -> None:
        if self.list_systems:
            return
        needed = {"MODEL": self.model, "-o/--output": self.output}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise InputError(f"missing: {', '.join(missing)}; or give --list-systems alone")


@dataclass(frozen=True)
class XtremeOptions(FineTuningOptions):
    """The tasks and languages of an XTREME-R evaluation, changes of its protocol, and what `FineTuningOptions` has.

    Args:
        tasks: names of the tasks. Tasks that need the same fine-tuned model share it.
        languages: codes of the languages to test; None for all of each task.
        max_length: longest example in tokens; None, as for the next three, is the published value of each task.
        batch_size: examples of a step.
        learning_rate: peak learning rate.
        epochs: passes over the training examples.

    Raises:
        InputError: a value is none of the choices.
    """

    tasks: tuple[XtremeTask, ...] = option(
        get_args(XtremeTask),
        f"tasks to run, out of {', '.join(get_args(XtremeTask))} (default: all)",
        choices=get_args(XtremeTask),
        nargs="+",
        metavar="TASK",
    )
    languages: tuple[str, ...] | None = option(
        None, "test only these languages, as in: en de (default: all of each task)", nargs="+", metavar="CODE"
    )
    max_length: int | None = option(
        None,
        "longest example in tokens (default: as published for each task)",
        flags=("--max-len", "--max-length"),
        metavar="TOKENS",
        parse=int,
    )
    batch_size: int | None = option(
        None, "examples of a step (default: as published for each task)", metavar="N", parse=int
    )
    learning_rate: float | None = option(
        None, "peak learning rate (default: as published for each task)", metavar="RATE", parse=float
    )
    epochs: int | None = option(
        None, "passes over the training examples (default: as published for each task)", metavar="N", parse=int
    )

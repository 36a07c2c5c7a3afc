"""The options of `gte-train xtreme`. Importing this loads neither numpy nor torch; see `training/options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choices, option
from gte_deploy.training.options import DeviceOptions, Dtype, PaddingChoice

XtremeTask = Literal[
    "xnli", "xcopa", "udpos", "wikiann", "xquad", "mlqa", "tydiqa", "mewslix", "lareqa", "tatoeba"
]  # in the order of the published table


@dataclass(frozen=True)
class XtremeArguments:
    """The model to evaluate, the data, and the folder of the results.

    Args:
        model: checkpoint folder, preset name or hub id.
        output: folder of the results.
        data: folder that holds the published files of the tasks, see `evaluation/xtreme_data.py`.
        list_systems: only print the published table.

    Raises:
        InputError: model, output or data is missing, and not only the published table is asked for.
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
        None, "folder that holds the published files, one folder per data set", metavar="FOLDER", parse=Path
    )
    list_systems: bool = option(False, "print the published table and its source")

    def __post_init__(self) -> None:
        if self.list_systems:
            return
        needed = {"MODEL": self.model, "-o/--output": self.output, "--data": self.data}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise InputError(f"missing: {', '.join(missing)}; or give --list-systems alone")


@dataclass(frozen=True)
class XtremeOptions(DeviceOptions):
    """The tasks, languages, seeds, padding and dtype of an XTREME-R evaluation, and changes of its protocol.

    Args:
        device: "cuda" or "cpu"; None takes a GPU if there is one.
        tasks: names of the tasks. Tasks that need the same fine-tuned model share it.
        languages: codes of the languages to test; None for all of each task.
        seeds: seeds of new heads, of dropout and of the order of the examples; each counts once.
        dtype: "bfloat16" for autocast, or "float32"; None is bfloat16 on a GPU, else float32.
        tokenizer: folder or hub id of a tokenizer that replaces the checkpoint's; None for its own.
        padding: "remove" lets the encoder compute no padding, "keep" pads each batch, and "auto" removes padding on a
            GPU in bfloat16 where the model's family and its dropout of attention allow it.
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
    seeds: tuple[int, ...] = option((0,), "fine-tune once with each seed", nargs="+", metavar="SEED", parse=int)
    dtype: Dtype | None = option(
        None, "dtype of the computation (default: bfloat16 on a GPU, else float32)", choices=get_args(Dtype)
    )
    tokenizer: str | None = option(
        None, "folder or hub id of a tokenizer that replaces the checkpoint's (default: its own)", metavar="TOKENIZER"
    )
    padding: PaddingChoice = option(
        "auto",
        "remove: the encoder computes no padding (default: on a GPU in bfloat16, where the model allows it)",
        choices=get_args(PaddingChoice),
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

    def __post_init__(self) -> None:
        check_choices(self)

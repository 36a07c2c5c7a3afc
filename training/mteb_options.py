"""The options of `gte-train mteb`. Importing this loads neither numpy nor torch; see `training/options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option, required
from gte_deploy.training.options import DeviceOptions

MTEB_FILE = "mteb.json"


@dataclass(frozen=True)
class MtebArguments:
    """The models and tasks of an evaluation by MTEB.

    Args:
        models: checkpoint folders, hub ids, or folders of bundles.
        tasks: names of tasks, as MTEB spells them.
        output: folder of the results.
    """

    models: tuple[str, ...] = required(
        "checkpoint folders, hub ids or bundles of embedding models, sparse models and rerankers",
        positional=True,
        nargs="+",
        metavar="MODEL",
    )
    tasks: tuple[str, ...] = required(
        "tasks by their names in MTEB, as in: NFCorpus STSBenchmark", nargs="+", metavar="TASK"
    )
    output: Path | None = option(
        None, f"folder for {MTEB_FILE}, MTEB's own results", flags=("-o", "--output"), metavar="FOLDER", parse=Path
    )


@dataclass(frozen=True)
class MtebOptions(DeviceOptions):
    """How the models of an evaluation by MTEB compute.

    Args:
        languages: codes of three letters; tasks of several languages are run in these alone. None takes all.
        batch_size: texts that a model computes at once.
        max_length: tokens at which texts are cut; None for the model's own limit.

    Raises:
        InputError: a number is out of its range.
    """

    languages: tuple[str, ...] | None = option(
        None, "run tasks of several languages in these alone, as in: eng deu (default: all)", nargs="+", metavar="CODE"
    )
    batch_size: int = option(32, "texts that a model computes at once", metavar="N", parse=int)
    max_length: int | None = option(
        None,
        "tokens at which texts are cut (default: the model's own limit)",
        flags=("--max-len", "--max-length"),
        metavar="TOKENS",
        parse=int,
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.max_length is not None and self.max_length < 4):
            raise InputError(
                f"batch_size {self.batch_size}, max_length {self.max_length}: expected at least 1, and 4 tokens"
            )

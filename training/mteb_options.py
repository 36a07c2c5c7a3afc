"""The options of `gte-train mteb`. Importing this loads neither numpy nor torch; see `training/options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option, required
from gte_deploy.training.options import RankingModelOptions

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
class MtebOptions(RankingModelOptions):
    """How the models of an evaluation by MTEB compute.

    Args:
        languages: codes of three letters; tasks of several languages are run in these alone. None takes all.
        batch_size: texts that a model computes at once.

    Raises:
        InputError: a number is out of its range.
    """

    languages: tuple[str, ...] | None = option(
        None, "run tasks of several languages in these alone, as in: eng deu (default: all)", nargs="+", metavar="CODE"
    )
    batch_size: int = option(32, "texts that a model computes at once", metavar="N", parse=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size} is below 1")

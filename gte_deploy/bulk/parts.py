"""The parts of an unfinished run: a folder beside the output, with a folder for each finished shard.

A part gets its name when it is complete and on the disk, so a killed run loses only the shards that it worked on. The
journal says what the parts were made of. A run with the same input, model and options goes on; any other is refused.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.bulk.columns import dump_json, json_rows, table_of
from gte_deploy.bulk.rows import Start
from gte_deploy.bulk.shards import Cursor, Position, Shard
from gte_deploy.core.arrays import save_array
from gte_deploy.core.errors import InputError
from gte_deploy.core.files import read_json_object, sync_directory, sync_tree, write_text
from gte_deploy.core.formats import check_version
from gte_deploy.core.locks import try_lock

JOURNAL_VERSION = 2

_JOURNAL = "journal.json"
_PART = "part.json"
_FAILURES = "failures.jsonl"
_TABLE = "columns.parquet"
_LINES = "columns.jsonl"
_RESTART = "Pass --restart to begin again."


@dataclass(frozen=True)
class Part:
    """A finished shard.

    Args:
        folder: its folder.
        cursor: its beginning.
        after: the beginning of the next shard.
        is_last: whether the input ends with it.
        done: the share of the input's bytes up to its end.
        rows: rows of the output, each with a vector.
        failures: rows without.
        tokens: tokens that were computed, special tokens included.
        made_by: facts about the model and the call, as `ShardEncoder.facts` gives them.
    """

    folder: Path
    cursor: Cursor
    after: Cursor
    is_last: bool
    done: float
    rows: int
    failures: int
    tokens: int
    made_by: dict[str, Any]

    @property
    def count(self) -> int:
        """Rows of the input."""
        return self.after.first - self.cursor.first

    def array(self, name: str) -> NDArray[Any]:
        """An array of the part, mapped from its file."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def table(self) -> Any:
        """The columns of its rows as a pyarrow Table."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.folder / _TABLE)

    def schema(self) -> Any:
        """The schema of `table`."""
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(self.folder / _TABLE)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The columns of its rows as JSON objects."""
        with (self.folder / _LINES).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def failure_lines(self) -> str:
        """Its lines of the file of failures."""
        file = self.folder / _FAILURES
        return file.read_text(encoding="utf-8") if self.failures else ""


class PartsFolder:
    """The folder of parts. Writing needs no lock of its own: each part is written by whoever encodes its shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, shard: Shard, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any], columns: str) -> Part:
        """Store a shard's vectors and columns.

        Args:
            shard: the shard.
            arrays: name -> array, of which the output's columns are made.
            facts: the fields `tokens` and `made_by` of the part.
            columns: form of the columns to keep: "arrow", "json" or "none".

        Raises:
            InputError: see `table_of`.
            OSError: the disk is full, or fails.
        """
        number = shard.cursor.number
        target = self.folder / f"part-{number:06d}"
        entry = {
            "cursor": asdict(shard.cursor),
            "after": asdict(shard.after),
            "is_last": shard.is_last,
            "done": shard.done,
            "rows": sum(map(len, shard.rows)),
            "failures": len(shard.failures),
            **facts,
        }
        aside = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{target.name}."))
        try:
            for name, array in arrays.items():
                save_array(aside / f"{name}.npy", array)
            if columns == "arrow":
                import pyarrow.parquet

                pyarrow.parquet.write_table(table_of(shard.rows), aside / _TABLE, compression="zstd")
            elif columns == "json":
                _write_lines(aside / _LINES, json_rows(shard.rows))
            if shard.failures:
                lines = [{**asdict(place), "reason": reason} for place, reason in shard.failures]
                _write_lines(aside / _FAILURES, lines)
            (aside / _PART).write_text(json.dumps(entry), encoding="utf-8")
            sync_tree(aside)
            try:
                aside.rename(target)
            except OSError:
                if not target.is_dir():  # there, if two workers were asked, as a cluster does when it loses one
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        sync_directory(self.folder)
        return _part(target)

    def finished(self) -> list[Part]:
        """The finished parts, in order, up to the first gap."""
        found: list[Part] = []
        while (target := self.folder / f"part-{len(found):06d}").is_dir():
            found.append(_part(target))
        return found

    def read(self, numbers: Iterable[int]) -> list[Part]:
        """The parts of some shards."""
        return [_part(self.folder / f"part-{number:06d}") for number in numbers]

    def has(self, number: int) -> bool:
        """Whether a shard is finished."""
        return (self.folder / f"part-{number:06d}").is_dir()

    def remove(self) -> None:
        """Remove the folder, with everything in it."""
        # Each at once, and the last one first: a kill leaves a journal, and whole parts from the first one on.
        for part in sorted(self.folder.glob("part-*"), reverse=True):
            part.rename(self.folder / f".{part.name}")
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def open_parts(output: Path, identity: Mapping[str, Any], *, restart: bool) -> Iterator[PartsFolder]:
    """Open the folder `OUTPUT.parts`, alone among all processes, and check that its parts belong to this run.

    Args:
        output: the file that the run will write.
        identity: input, model and options, as JSON data.
        restart: drop the parts that are there.

    Raises:
        InputError: another process has the folder, or its parts are those of another run; the message names the
            difference.
        OSError: the folder cannot be made.
    """
    folder = output.with_name(f"{output.name}.parts")
    folder.mkdir(exist_ok=True)
    release = try_lock(folder / "lock")
    if release is None:
        raise InputError(f"another process writes {output}: it holds {folder}. Wait for it, or take another --output.")
    try:
        wanted = {"version": JOURNAL_VERSION, **identity}
        _clear(folder, everything=restart)
        journal = folder / _JOURNAL
        if any(folder.glob("part-*")):
            known = read_json_object(journal, error=InputError, advice=_RESTART)
            check_version(journal, known.get("version"), (JOURNAL_VERSION,), error=InputError, advice=_RESTART)
            if known != json.loads(json.dumps(wanted)):
                raise InputError(
                    f"{folder} holds an unfinished run with another {_difference(known, wanted)}. Repeat that one to "
                    "finish it, or pass --restart to drop it and begin again."
                )
        else:
            write_text(journal, json.dumps(wanted, indent=2) + "\n")
        yield PartsFolder(folder)
    finally:
        if not any(folder.glob("part-*")):  # nothing was done, or all is done and removed
            shutil.rmtree(folder, ignore_errors=True)
        release()


def _clear(folder: Path, *, everything: bool) -> None:
    """Remove what a killed run was writing; with `everything`, its parts and its journal, too."""
    for path in folder.iterdir():
        if path.name == "lock" or not (everything or path.name.startswith(".")):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting that differs, with both values."""
    for name in dict.fromkeys([*wanted, *known]):
        old, new = known.get(name), json.loads(json.dumps(wanted.get(name)))
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = next(each for each in dict.fromkeys([*new, *old]) if old.get(each) != new.get(each))
            name, old, new = f"{name}: {inner}", old.get(inner), new.get(inner)
        return f"{name} (there {json.dumps(old)}, here {json.dumps(new)})"
    return "journal"


def _part(folder: Path) -> Part:
    entry = read_json_object(folder / _PART, error=InputError, advice=_RESTART)
    try:
        return Part(folder, _cursor(entry.pop("cursor")), _cursor(entry.pop("after")), **entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / _PART} is not of a finished part ({error}).", advice=_RESTART) from error


def _cursor(data: dict[str, Any]) -> Cursor:
    place = data["position"]
    return Cursor(data["number"], data["first"], Position(place["file"], Start(**place["start"])))


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(f"{dump_json(row)}\n" for row in rows)

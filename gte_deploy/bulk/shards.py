"""Finds the files of an input, and cuts their rows into shards, which are encoded together.

A shard depends only on the input, the options and the place where it begins. So a run that goes on after a kill, and
every worker of a cluster, cuts the same shards.
"""

import functools
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gte_deploy.bulk.options import BulkOptions, InputFormat, input_format
from gte_deploy.bulk.rows import RowLot, Start, read_csv, read_document, read_jsonl, read_lines, read_parquet
from gte_deploy.core.errors import InputError
from gte_deploy.text.inputs import MAX_TEXT_BYTES

MAX_SHARD_BYTES = 16 << 20
"""Bytes of rows after which a shard ends: a bound on memory, and on the work that a kill loses."""

_DOCUMENTS = (".txt", ".md")
_READERS: dict[str, Callable[[Path, Start, str], Iterator[RowLot]]] = {
    "parquet": read_parquet,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": functools.partial(read_csv, delimiter="\t"),
    "txt": read_lines,
}


@dataclass(frozen=True)
class Position:
    """A place in the input: the number of a file, from 0, and a place in it."""

    file: int = 0
    start: Start = Start()


@dataclass(frozen=True)
class Cursor:
    """The beginning of a shard: its number, the number of its first row among all rows, and the place of that row."""

    number: int = 0
    first: int = 0
    position: Position = Position()


@dataclass(frozen=True)
class RowPlace:
    """Where a row is: its file, its row or line in the file, and its number among all rows of the input, from 0."""

    file: str
    row: int
    index: int


@dataclass(frozen=True)
class Shard:
    """Rows that are encoded together.

    Args:
        cursor: its beginning.
        stop: the place of the next shard's first row.
        is_last: whether the input ends with it.
        done: the share of the input's bytes up to its end, from 0 to 1.
        texts: the texts of its good rows.
        places: the place of each good row.
        rows: the good rows, as lists of dicts or RecordBatches, in order; one for each chunk if texts have chunks.
        text_column: the column of the texts.
        failures: its other rows, and why they get no vector.
    """

    cursor: Cursor
    stop: Position
    is_last: bool
    done: float
    texts: list[str]
    places: list[RowPlace]
    rows: list[Any]
    failures: list[tuple[RowPlace, str]]
    text_column: str

    @property
    def after(self) -> Cursor:
        """The beginning of the next shard."""
        count = len(self.places) + len(self.failures)
        return Cursor(self.cursor.number + 1, self.cursor.first + count, self.stop)

    def without(self, reasons: dict[int, str]) -> "Shard":
        """This shard with some of its good rows among the failures: number of the good row -> why."""
        if not reasons:
            return self
        kept = [i not in reasons for i in range(len(self.places))]
        parts = iter(kept)
        failures = [*self.failures, *((self.places[i], reason) for i, reason in reasons.items())]
        return replace(
            self,
            texts=list(itertools.compress(self.texts, kept)),
            places=list(itertools.compress(self.places, kept)),
            rows=[_chosen(rows, list(itertools.islice(parts, len(rows)))) for rows in self.rows],
            failures=sorted(failures, key=lambda failure: failure[0].index),
        )

    def repeated(self, counts: Sequence[int], texts: Sequence[str]) -> "Shard":
        """This shard with so many rows for each good row, which have other texts, as many as there are rows then."""
        number, new, rows = iter(counts), iter(texts), []
        for part in self.rows:
            places = [i for i, count in enumerate(itertools.islice(number, len(part))) for _ in range(count)]
            rows.append(_with_texts(part, places, list(itertools.islice(new, len(places))), self.text_column))
        return replace(self, rows=rows)


@dataclass(frozen=True)
class InputFiles:
    """The files of an input, in the order in which they are read.

    Args:
        root: the file, or the folder.
        files: the files.
        sizes: bytes of each.
        format: their format.
        text_column: the column of the texts.
    """

    root: Path
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    format: InputFormat
    text_column: str

    def name(self, number: int) -> str:
        """The name of a file: relative to an input folder."""
        file = self.files[number]
        return file.name if file == self.root else file.relative_to(self.root).as_posix()

    def fingerprint(self) -> dict[str, Any]:
        """What tells this input from another, as JSON data: names, sizes and times of change."""
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            digest.update(f"{self.name(number)}\0{self.sizes[number]}\0{file.stat().st_mtime_ns}\n".encode())
        return {
            "path": str(self.root.absolute()),
            "format": self.format,
            "files": len(self.files),
            "bytes": sum(self.sizes),
            "digest": digest.hexdigest(),
        }

    def lots(self, start: Position) -> Iterator[tuple[int, RowLot]]:
        """Yield (number of the file, rows) from a place on.

        Raises:
            InputError: a file cannot be read, is not of its format, or lacks the column of the texts.
            MissingDependencyError: pyarrow is missing.
        """
        for number in range(start.file, len(self.files)):
            file, first = self.files[number], start.start if number == start.file else Start()
            try:
                if self.format == "documents":
                    lots = read_document(file, first, self.name(number))
                else:
                    lots = _READERS[self.format](file, first, self.text_column)
                for lot in lots:
                    yield number, lot
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{file} cannot be read: {error}") from error

    @functools.cached_property
    def _before(self) -> list[int]:
        """The bytes of all files before each, and of all."""
        return [0, *itertools.accumulate(self.sizes)]

    def share(self, number: int, done: float) -> float:
        """The share of the input's bytes up to a share of a file."""
        return (self._before[number] + done * self.sizes[number]) / max(1, self._before[-1])


def find_files(path: Path, options: BulkOptions) -> InputFiles:
    """Find the files of an input: one file, or those of a folder and its folders, sorted by name.

    Raises:
        InputError: there is no such file, a folder has no files or files of several formats, or the option
            `text_column` is given for texts without columns.
    """
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        )
        files, kind = found, _format_of_folder(path, found, options.input_format)
    elif path.is_file():
        files, kind = [path], input_format(path, options.input_format)
    else:
        raise InputError(f"--input {path} cannot be read: there is no such file or folder")
    if kind in ("txt", "documents") and options.text_column != "text":
        raise InputError(f"text_column is {options.text_column!r}, and {path} has texts without columns ({kind})")
    return InputFiles(path, tuple(files), tuple(file.stat().st_size for file in files), kind, options.text_column)


def _format_of_folder(path: Path, found: Sequence[Path], asked: InputFormat | None) -> InputFormat:
    if not found:
        raise InputError(f"--input {path}: the folder has no files")
    if asked is not None:
        return asked
    if all(file.suffix.lower() in _DOCUMENTS for file in found):
        return "documents"
    examples: dict[InputFormat, str] = {input_format(file, None): file.name for file in found}
    if len(examples) > 1:
        named = ", ".join(f"{kind} ({name})" for kind, name in examples.items())
        raise InputError(f"--input {path}: the files of a folder must have one format, and these have several: {named}")
    return next(iter(examples))


def read_shards(files: InputFiles, cursor: Cursor, *, shard_rows: int, most_bytes: int) -> Iterator[Shard]:
    """Yield the shards of the input from a place on. The last one, which may be empty, has `is_last`.

    Args:
        files: the input.
        cursor: the beginning of the first shard.
        shard_rows: most rows of a shard.
        most_bytes: most bytes of a text in UTF-8, without its prompt.

    Raises:
        InputError, MissingDependencyError: see `InputFiles.lots`.
    """
    collected = _Collected(files, cursor, most_bytes)
    rows = size = 0
    for number, lot in files.lots(cursor.position):
        begin = 0
        for i, own in enumerate(lot.sizes):
            if rows == shard_rows or (rows and size + own > MAX_SHARD_BYTES):
                collected.add(number, lot, begin, i)
                yield collected.shard(Position(number, lot.start(i)), files.share(number, lot.done))
                collected = _Collected(files, collected.after, most_bytes)
                begin, rows, size = i, 0, 0
            rows, size = rows + 1, size + own
        collected.add(number, lot, begin, len(lot.sizes))
    yield collected.shard(Position(len(files.files)), 1.0, is_last=True)


class _Collected:
    """The rows of a shard, while they are read."""

    def __init__(self, files: InputFiles, cursor: Cursor, most_bytes: int) -> None:
        self._files = files
        self._cursor = cursor
        self._most_bytes = most_bytes
        self._index = cursor.first
        self._texts: list[str] = []
        self._places: list[RowPlace] = []
        self._rows: list[Any] = []
        self._failures: list[tuple[RowPlace, str]] = []
        self.after = cursor

    def add(self, file: int, lot: RowLot, begin: int, end: int) -> None:
        name, kept = self._files.name(file), []
        for i in range(begin, end):
            place = RowPlace(name, lot.numbers[i], self._index)
            self._index += 1
            fault = lot.reasons.get(i) or _fault(lot.texts[i], self._most_bytes)
            kept.append(fault is None)
            if fault is not None:
                self._failures.append((place, fault))
            else:
                self._places.append(place)
                self._texts.append(lot.texts[i])
        if any(kept):
            self._rows.append(_chosen(lot.rows[begin:end], kept))

    def shard(self, stop: Position, done: float, *, is_last: bool = False) -> Shard:
        shard = Shard(
            self._cursor,
            stop,
            is_last,
            done,
            self._texts,
            self._places,
            self._rows,
            self._failures,
            self._files.text_column,
        )
        self.after = shard.after
        return shard


def _fault(text: Any, most_bytes: int) -> str | None:
    """Why a value is no text that can be encoded; None if it is one."""
    if not isinstance(text, str):
        return "the text is null" if text is None else f"the text is of type {type(text).__name__}"
    if text.isascii():
        size = len(text)
    else:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            return f"the text has a lone surrogate {text[error.start]!a} at character {error.start:,}"
    if size > most_bytes:
        return f"the text has {size:,} bytes; with its prompt a text may have at most {MAX_TEXT_BYTES:,}"
    return None


def _chosen(rows: Any, kept: list[bool]) -> Any:
    if all(kept):
        return rows
    if isinstance(rows, list):
        return list(itertools.compress(rows, kept))
    import pyarrow

    return rows.filter(pyarrow.array(kept))


def _with_texts(rows: Any, places: list[int], texts: list[str], column: str) -> Any:
    """The rows at some places, with other texts in a column."""
    if isinstance(rows, list):
        return [{**rows[place], column: text} for place, text in zip(places, texts, strict=True)]
    import pyarrow

    number = rows.schema.get_field_index(column)
    kind = rows.schema.field(number).type
    new = pyarrow.array(texts, kind if kind == pyarrow.large_string() else pyarrow.string())
    return rows.take(pyarrow.array(places, pyarrow.int64())).set_column(number, column, new)

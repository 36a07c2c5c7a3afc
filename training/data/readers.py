"""Readers of documents: JSON lines and plain text (also with gzip), Parquet, and Hugging Face datasets."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import GteDeployError, InputError, MissingDependencyError
from gte_deploy.training.options import ReadOptions

logger = logging.getLogger(__name__)
_NAME_IT = "Name the field of the texts with text_column='NAME'."

Advance = Callable[[int], None]  # called with the number of input bytes just read

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, *PARQUET_SUFFIXES)
DATASET_PREFIX = "hf:"

_PARQUET_ROWS = 1_000
_ADVANCE_BYTES = 1 << 16
_MAX_EXPANSION = 200  # gzip shrinks text 3 to 10 times, and at most about 1,030 times
EXPANSION_FREE_BYTES = 64 << 20
_DATASET = re.compile(r"(?P<name>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Unit:
    """The input of one shard of the corpus: files, or one shard of a Hugging Face dataset."""

    number: int
    language: str
    files: tuple[str, ...] = ()
    stamps: tuple[tuple[int, int], ...] = ()  # size and mtime_ns per file: a resumed run encodes changed files again
    dataset: str = ""
    dataset_shard: int = 0
    dataset_shards: int = 0

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"

    @property
    def size(self) -> int:
        """Bytes of the files; 0 for a dataset, whose size is not known."""
        return sum(size for size, _ in self.stamps)


class DocumentReader:
    """Reads the documents of a unit in order, and counts the records that it skipped."""

    def __init__(self, options: ReadOptions, *, counts: Counter[str], advance: Advance) -> None:
        self._options, self._counts, self._advance = options, counts, advance

    def read(self, unit: Unit) -> Iterator[str]:
        """Yield the texts of a unit; lone surrogates are replaced by U+FFFD.

        Raises:
            InputError: a file or record cannot be read; the message names it and its line.
        """
        source = self._dataset(unit) if unit.dataset else itertools.chain.from_iterable(map(self._file, unit.files))
        for text in source:
            if text.isascii() or not _LONE_SURROGATE.search(text):
                yield text
            else:
                self._counts["documents_with_replaced_surrogates"] += 1
                yield _LONE_SURROGATE.sub("\ufffd", text)

    def _file(self, name: str) -> Iterator[str]:
        path = Path(name)
        try:
            if name.endswith(PARQUET_SUFFIXES):
                yield from self._parquet(path)
            elif name.endswith(JSON_SUFFIXES):
                yield from self._json_lines(path)
            elif self._options.document_break == "file":
                yield from self._whole_file(path)
            else:
                yield from self._paragraphs(path)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be read: {error}") from error

    def _json_lines(self, path: Path) -> Iterator[str]:
        for number, line in self._lines(path):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                self._bad(f"{path}:{number}: no JSON ({error})")
                continue
            text = record.get(self._options.text_column) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield text
            else:
                has = f"; it has {', '.join(record)}" if isinstance(record, dict) else ""
                self._bad(
                    f"{path}:{number}: expected an object with a string {self._options.text_column!r}{has}", columns=has
                )

    def _paragraphs(self, path: Path) -> Iterator[str]:
        """Yield the documents of a text file in which blank lines separate them."""
        held: list[bytes] = []
        start = 1
        for number, line in itertools.chain(self._lines(path), [(0, b"")]):
            if line.strip():
                start = start if held else number
                held.append(line.rstrip(b"\r\n"))
                continue
            if held:
                yield from self._decoded(b"\n".join(held), f"{path}:{start}")
                held = []

    def _whole_file(self, path: Path) -> Iterator[str]:
        with _opened(path) as (stream, _):
            content = stream.read(self._options.max_document_bytes + 1)
        yield from self._decoded(content, str(path))
        self._advance(path.stat().st_size)

    def _decoded(self, content: bytes, place: str) -> Iterator[str]:
        if len(content) > self._options.max_document_bytes:
            self._bad(f"{place}: a document of more than {self._options.max_document_bytes} bytes")
            return
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._bad(f"{place}: no UTF-8 ({error})")
            return
        yield text

    def _lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Yield the numbered lines of a file; a line above the limit is a bad record."""
        limit = self._options.max_document_bytes
        with _opened(path) as (stream, raw):
            total = reported = 0
            for number in itertools.count(1):
                line = stream.readline(limit + 1)
                if not line:
                    break
                total += len(line)
                if len(line) > limit:
                    self._bad(f"{path}:{number}: a line of more than {limit} bytes")
                    total += _skip_line(stream, line)
                else:
                    yield number, line
                done = raw.tell()
                if total > EXPANSION_FREE_BYTES and total > _MAX_EXPANSION * done:
                    raise InputError(f"{path} expands more than {_MAX_EXPANSION} times: it is no compressed text")
                if done - reported > _ADVANCE_BYTES:
                    self._advance(done - reported)
                    reported = done
            self._advance(raw.tell() - reported)

    def _parquet(self, path: Path) -> Iterator[str]:
        pyarrow = parquet_library()
        column, row, size = self._options.text_column, 0, path.stat().st_size
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    raise InputError(
                        f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}.", advice=_NAME_IT
                    )
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                    yield from self._column(batch.column(0).to_pylist(), f"{path}: row", row)
                    self._advance(size * (row + len(batch)) // rows - size * row // rows)
                    row += len(batch)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read near row {row}: {error}") from error

    def _dataset(self, unit: Unit) -> Iterator[str]:
        shard = load_dataset(unit.dataset).shard(num_shards=unit.dataset_shards, index=unit.dataset_shard)
        place = f"hf:{unit.dataset} shard {unit.dataset_shard}: row"
        try:
            for row, record in enumerate(shard):
                yield from self._column([record.get(self._options.text_column)], place, row)
        except (OSError, ValueError) as error:
            if isinstance(error, GteDeployError):
                raise
            raise InputError(f"{place} cannot be read: {error}") from error

    def _column(self, values: Sequence[object], place: str, first_row: int) -> Iterator[str]:
        limit = self._options.max_document_bytes
        for row, value in enumerate(values, first_row):
            if not isinstance(value, str):
                self._bad(f"{place} {row}: expected a string in {self._options.text_column!r}, got {_kind(value)}")
            elif len(value) > limit:
                self._bad(f"{place} {row}: a document of more than {limit} characters")
            else:
                yield value

    def _bad(self, message: str, *, columns: str = "") -> None:
        if not self._options.skip_bad:
            name_it = f"{_NAME_IT} " if columns else ""
            advice = f"{name_it}Correct the record, or skip and count bad ones with skip_bad=True."
            raise InputError(f"{message}.", advice=advice)
        logger.warning("skipped %s", message)
        self._counts["bad_records"] += 1


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedReader]]:
    """Open a file. Yields the decompressed stream, and the raw stream, whose position tells the progress."""
    with path.open("rb") as raw:
        if path.name.endswith(".gz"):
            with gzip.open(raw, "rb") as stream:
                yield stream, raw
        else:
            yield raw, raw


def parquet_library() -> Any:
    """Import pyarrow with its Parquet reader.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    return pyarrow


def _skip_line(stream: io.BufferedIOBase, line: bytes) -> int:
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(1 << 20)
        skipped += len(line)
    return skipped


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def load_dataset(dataset: str, *, streaming: bool = True) -> Any:
    """Open a Hugging Face dataset, named as NAME[@REVISION][:CONFIG[:SPLIT]], as a stream or as a downloaded table.

    Raises:
        InputError: the name is malformed, or the dataset cannot be opened.
        MissingDependencyError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "train") from error
    match = _DATASET.fullmatch(dataset)
    if match is None:
        raise InputError(f"hf:{dataset}: expected hf:NAME[@REVISION][:CONFIG[:SPLIT]]")
    try:
        return datasets.load_dataset(
            match["name"],
            match["config"] or None,
            split=match["split"] or "train",
            revision=match["revision"],
            streaming=streaming,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"hf:{dataset} cannot be opened: {error}") from error

"""Reads the rows of one file of each format, some at a time."""

import contextlib
import csv
import difflib
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.bulk.columns import import_pyarrow, is_text_type
from gte_deploy.core.errors import InputError
from gte_deploy.text.inputs import MAX_TEXT_BYTES

MAX_LINE_BYTES = 64 << 20
"""Longest line, and longest row of a CSV file."""

_LOT_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Start:
    """The place of a row in a file: its number from 0 (of its line, in files of lines), and the byte where it begins.

    `offset` is 0 where it is not known: in parquet and compressed files.
    """

    row: int = 0
    offset: int = 0


@dataclass(frozen=True)
class RowLot:
    """Rows of a file that were read together.

    Args:
        rows: a list of dicts, or a pyarrow RecordBatch; both can be sliced.
        numbers: the number of each row in its file, from 0; that of its line in files of lines.
        texts: the text of each row, or what stands in its place.
        sizes: bytes of each row, roughly; the same wherever reading began.
        reasons: why rows have no text: index in this lot -> sentence.
        done: the share of the file that has been read, from 0 to 1.
        offsets: the byte where each row begins; empty where that is not known.
    """

    rows: Any
    numbers: Sequence[int]
    texts: list[Any]
    sizes: list[int]
    reasons: dict[int, str]
    done: float
    offsets: Sequence[int] = ()

    def start(self, index: int) -> Start:
        """The place of a row of this lot."""
        return Start(self.numbers[index], self.offsets[index] if self.offsets else 0)


def read_parquet(file: Path, start: Start, column: str) -> Iterator[RowLot]:
    """Yield the rows of a parquet file from `start` on, with the types of their columns.

    Raises:
        InputError: the file is not parquet, or has no such column of texts.
        MissingDependencyError: pyarrow is missing.
    """
    pyarrow = import_pyarrow()
    import pyarrow.parquet as parquet

    try:
        # Without pre_buffer, which would hold the bytes of a whole row group.
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
            schema = opened.schema_arrow
            if column not in schema.names:
                raise _column_error(file, column, schema.names)
            if not is_text_type(schema.field(column).type):
                raise InputError(f"{file}: column {column!r} holds {schema.field(column).type}, and not texts")
            begin, total = 0, opened.metadata.num_rows
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                if begin + count > start.row:
                    # Each row group alone, and from its beginning: so the batches are those of a reader from row 0.
                    for batch in opened.iter_batches(_LOT_ROWS, row_groups=[group]):
                        yield from _of_batch(batch, begin, start.row, column, total)
                        begin += len(batch)
                else:
                    begin += count
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} cannot be read as parquet: {error}") from error


def _of_batch(batch: Any, begin: int, start: int, column: str, total: int) -> Iterator[RowLot]:
    skipped = max(0, start - begin)
    if skipped >= len(batch):
        return
    size = batch.nbytes // len(batch)
    kept = batch.slice(skipped)
    values = kept.column(column)
    reasons: dict[int, str] = {}
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:
        texts = [_decoded(value, i, reasons) for i, value in enumerate(values)]
    numbers = range(begin + skipped, begin + len(batch))
    yield RowLot(kept, numbers, texts, [size] * len(kept), reasons, (begin + len(batch)) / total)


def _decoded(value: Any, index: int, reasons: dict[int, str]) -> str | None:
    try:
        text: str | None = value.as_py()
        return text
    except UnicodeDecodeError as error:
        reasons[index] = f"the text is not UTF-8: {error.reason} at byte {error.start:,}"
        return None


def read_jsonl(file: Path, start: Start, column: str) -> Iterator[RowLot]:
    """Yield the JSON objects of a file with one on each line, from `start` on. Blank lines are no rows.

    Raises:
        InputError: none of the first objects has the column.
    """
    with _Lines(file) as lines:
        for lot in lines.lots(start):
            rows: list[dict[str, Any]] = []
            numbers, offsets, sizes, reasons = [], [], [], {}
            others: dict[str, None] = {}
            for number, offset, line in lot:
                if line is not None and not line.strip():
                    continue
                row = _json_object(line)
                if isinstance(row, dict) and column not in row:
                    others |= dict.fromkeys(row)
                    row = _no_column("the object", column, list(row))
                if isinstance(row, str):
                    reasons[len(rows)] = row
                rows.append(row if isinstance(row, dict) else {})
                numbers.append(number)
                offsets.append(offset)
                sizes.append(0 if line is None else len(line))
            if lot[0][0] == 0 and others and not any(rows):
                raise _column_error(file, column, list(others))
            texts = [row.get(column) for row in rows]
            yield RowLot(rows, numbers, texts, sizes, reasons, lines.done(), lines.known(offsets))


def _json_object(line: bytes | None) -> dict[str, Any] | str:
    """The object of a line, or why there is none."""
    if line is None:
        return f"the line has more than {MAX_LINE_BYTES:,} bytes"
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # half a character can be written, but not stored
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8: {error.reason} at byte {error.start:,}"
    except UnicodeEncodeError as error:
        return f"the line has a lone surrogate {error.object[error.start]!a}, which no UTF-8 text can hold"
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return row if isinstance(row, dict) else f"the line holds {type(row).__name__}, and not a JSON object"


def read_lines(file: Path, start: Start, column: str) -> Iterator[RowLot]:
    """Yield the lines of a text file, without their ends, from `start` on."""
    with _Lines(file) as lines:
        for lot in lines.lots(start):
            numbers, offsets, found = zip(*lot, strict=True)
            reasons: dict[int, str] = {}
            texts = [_text_of(line, i, reasons) for i, line in enumerate(found)]
            rows = [{column: text} for text in texts]
            sizes = [len(line or b"") for line in found]
            yield RowLot(rows, numbers, texts, sizes, reasons, lines.done(), lines.known(offsets))


def _text_of(line: bytes | None, index: int, reasons: dict[int, str]) -> str | None:
    if line is None:
        reasons[index] = f"the line has more than {MAX_LINE_BYTES:,} bytes"
        return None
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        reasons[index] = f"the text is not UTF-8: {error.reason} at byte {error.start:,}"
        return None


def read_document(file: Path, start: Start, name: str) -> Iterator[RowLot]:
    """Yield a text file as one row with the columns path and text; `name` is its path in the folder."""
    if start.row > 0:
        return
    reasons: dict[int, str] = {}
    text, size = None, file.stat().st_size
    if size > MAX_TEXT_BYTES:
        reasons[0] = f"the file has {size:,} bytes; a text may have at most {MAX_TEXT_BYTES:,}"
    else:
        try:
            text = file.read_bytes().removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            reasons[0] = f"the text is not UTF-8: {error.reason} at byte {error.start:,}"
    yield RowLot([{"path": name, "text": text}], range(1), [text], [min(size, MAX_TEXT_BYTES)], reasons, 1.0)


def read_csv(file: Path, start: Start, column: str, *, delimiter: str = ",") -> Iterator[RowLot]:
    """Yield the records of a CSV file (RFC 4180, with a header) from `start` on. Every value is a text.

    Raises:
        InputError: the header lacks the column or names one twice, or a quote has no end.
    """
    # The default of the module csv is less than a text may have. It is one setting for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with _Lines(file) as lines:
        records = csv.reader(_csv_lines(file, lines), delimiter=delimiter, strict=True)
        try:
            header = next(records, [])
            if column not in header:
                raise _column_error(file, column, header)
            if len(set(header)) < len(header):
                raise InputError(f"{file}: the header names a column twice: {', '.join(header)}")
            place, number = header.index(column), -1
            if lines.seek(start):
                records = csv.reader(_csv_lines(file, lines), delimiter=delimiter, strict=True)
                number = start.row - 1
            rows: list[dict[str, Any]] = []
            numbers, offsets, texts, sizes, reasons = [], [], [], [], {}
            offset = lines.offset
            for record in records:
                number += bool(record)  # a blank line is no record
                if record and number >= start.row:
                    fault = _record_fault(record, header)
                    if fault is not None:
                        reasons[len(rows)] = fault
                    rows.append({} if fault else dict(zip(header, record, strict=True)))
                    texts.append(None if fault else record[place])
                    numbers.append(number)
                    offsets.append(offset)
                    sizes.append(sum(map(len, record)))
                    if len(rows) == _LOT_ROWS:
                        yield RowLot(rows, numbers, texts, sizes, reasons, lines.done(), lines.known(offsets))
                        rows, numbers, offsets, texts, sizes, reasons = [], [], [], [], [], {}
                offset = lines.offset
            yield RowLot(rows, numbers, texts, sizes, reasons, 1.0, lines.known(offsets))
        except csv.Error as error:
            raise InputError(f"{file}: line {records.line_num:,} is not CSV: {error}") from error


def _record_fault(record: list[str], header: list[str]) -> str | None:
    if len(record) != len(header):
        return f"the record has {len(record)} values, and the header {len(header)}"
    try:
        "".join(record).encode("utf-8")
    except UnicodeEncodeError:
        return "the record is not UTF-8"
    return None


def _csv_lines(file: Path, lines: "_Lines") -> Iterator[str]:
    for number, line in enumerate(lines):
        if line is None:
            raise InputError(f"{file}: line {number + 1:,} has more than {MAX_LINE_BYTES:,} bytes")
        # Bytes that are not UTF-8 become lone surrogates, which `_record_fault` finds.
        yield line.decode("utf-8", errors="surrogateescape")


class _Lines:
    """The lines of a file, which may be compressed; None in place of a line that is too long.

    `offset` is the byte after the last line, of the uncompressed text.
    """

    def __init__(self, file: Path) -> None:
        self.offset = 0
        self._size = file.stat().st_size
        with contextlib.ExitStack() as stack:
            self._raw = stack.enter_context(file.open("rb"))
            suffix = file.suffix.lower()
            self._stream: Any = self._raw
            if suffix == ".gz":
                self._stream = stack.enter_context(gzip.open(self._raw))
            elif suffix == ".zst":
                pyarrow = import_pyarrow()
                self._stream = io.BufferedReader(pyarrow.CompressedInputStream(self._raw, "zstd"), 1 << 16)
            self._opened = stack.pop_all()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def done(self) -> float:
        """The share of the file's bytes that has been read."""
        return self._raw.tell() / self._size if self._size else 1.0

    def known(self, offsets: Sequence[int]) -> Sequence[int]:
        """The offsets of rows, if a reader can begin there."""
        return offsets if self._stream is self._raw else ()

    def seek(self, start: Start) -> bool:
        """Go to the byte of a row; False if it is not known."""
        if not start.offset:
            return False
        self.offset = self._raw.seek(start.offset)
        return True

    def __iter__(self) -> Iterator[bytes | None]:
        while line := self._stream.readline(MAX_LINE_BYTES):
            kept: bytes | None = line if self.offset else line.removeprefix(_BOM)
            self.offset += len(line)
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                kept, line = None, self._stream.readline(MAX_LINE_BYTES)
                self.offset += len(line)
            yield kept

    def lots(self, start: Start) -> Iterator[list[tuple[int, int, bytes | None]]]:
        """Yield lists of (number, offset, line) from a place on."""
        first = start.row if self.seek(start) else 0
        lot: list[tuple[int, int, bytes | None]] = []
        size, offset = 0, self.offset
        for number, line in enumerate(self, first):
            if number >= start.row:
                lot.append((number, offset, line))
                size += len(line or b"")
            offset = self.offset
            if len(lot) == _LOT_ROWS or size > MAX_LINE_BYTES:
                yield lot
                lot, size = [], 0
        if lot:
            yield lot


def _no_column(where: Any, column: str, known: Sequence[str]) -> str:
    return f"{where} has no column {column!r}; it has {', '.join(map(str, known)) or 'none'}"


def _column_error(where: Any, column: str, known: Sequence[str]) -> InputError:
    """Return the error for a file without the column of the texts; it says how to name another."""
    names = [str(name) for name in known]
    alike = difflib.get_close_matches(column, names, n=1) or names[:1] or ["NAME"]
    advice = f"Name the column of the texts, as in text_column={alike[0]!r}."
    return InputError(f"{_no_column(where, column, names)}.", advice=advice)

"""Text to token shards: parallel by input unit, interruptible, and the same bytes whatever the number of workers.

The work lies in `.NAME.partial` beside the output until it is whole: one shard and one record per finished unit. A
second run with the same inputs and options goes on from there; the last act is a rename.

Text becomes tokens as it is: no special tokens, no truncation; "[MASK]" written in a text is encoded as the letters it
consists of. A lone surrogate, which JSON lets through and a tokenizer refuses, becomes U+FFFD and is counted. A
document without a token is dropped and counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import gzip
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from gte_deploy.errors import GteDeployError, InputError, MissingDependencyError
from gte_deploy.files import DIRECTORY_MODE, sha256_file, sync_directory, write_bytes, write_text, write_with
from gte_deploy.training.data.corpus import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    OFFSET_DTYPE,
    TokenCorpus,
    Vocabulary,
    document_histogram,
)

logger = logging.getLogger(__name__)

DocumentBreak = Literal["blank-line", "file"]
Advance = Callable[[int], None]  # bytes of input done

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, *PARQUET_SUFFIXES)
DATASET_PREFIX = "hf:"

_UNIT_BYTES = 32 << 20  # smaller neighbours share a unit
_BATCH_DOCUMENTS = 1_000
_BATCH_CHARACTERS = 4 << 20
_PARQUET_ROWS = 1_000
_ADVANCE_BYTES = 1 << 16
_MAX_EXPANSION = 200  # text shrinks 3 to 10 times in gzip; its limit is about 1,030
_EXPANSION_FREE_BYTES = 64 << 20
_MAX_DOCUMENT_BYTES = 1 << 30
_POLL_SECONDS = 0.25

_LANGUAGE = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,31})=(.+)", re.DOTALL)
_DATASET = re.compile(r"(?P<name>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHARD_KEYS = ("name", "language", "documents", "tokens", "tokens_sha256", "offsets_sha256")
_SPECIAL_NAMES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in the inputs."""

    text_column: str = "text"
    document_break: DocumentBreak = "blank-line"
    skip_bad: bool = False
    max_document_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if self.document_break not in ("blank-line", "file"):
            raise InputError(f"document_break {self.document_break!r}: expected 'blank-line' or 'file'")
        if not 1 <= self.max_document_bytes <= _MAX_DOCUMENT_BYTES:
            raise InputError(f"max_document_bytes {self.max_document_bytes} is outside 1..{_MAX_DOCUMENT_BYTES}")


@dataclass(frozen=True)
class Unit:
    """What one worker encodes into one shard: files, or one shard of a Hugging Face dataset."""

    number: int
    language: str
    files: tuple[str, ...] = ()
    stamps: tuple[tuple[int, int], ...] = ()  # size and mtime_ns per file: a changed input is not resumed
    dataset: str = ""
    dataset_shard: int = 0
    dataset_shards: int = 0

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"

    @property
    def size(self) -> int:
        """Input bytes; 0 where they are not known."""
        return sum(size for size, _ in self.stamps)


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: Path,
    workers: int = 1,
    text_column: str = "text",
    document_break: DocumentBreak = "blank-line",
    skip_bad: bool = False,
    max_document_bytes: int = 16 << 20,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = False,
) -> TokenCorpus:
    """Encode `inputs` into the corpus folder `output`, or go on with what an interrupted run left.

    An input is a file, a folder, a glob, or `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`; `LANGUAGE=` before it names its
    language. Files: C4's .json.gz and other JSON lines, .parquet, .txt, each document a `text_column` or, in plain
    text, what `document_break` says. `skip_bad` counts and skips records that cannot be read instead of failing.
    With `workers` > 1 the caller's main module must be importable (`if __name__ == "__main__"`).

    Raises:
        InputError: an input, the tokenizer or the output folder is not acceptable; a bad record is named by file and
            line.
        MissingDependencyError: Parquet or a dataset is given and its library is not installed.
    """
    output = Path(output).absolute()
    if workers < 1:
        raise InputError(f"workers {workers} is below 1")
    options = ReadOptions(text_column, document_break, skip_bad, max_document_bytes)
    _check_output(output, overwrite)
    vocab, tokenizer_file = read_vocabulary(Path(tokenizer))
    units = plan_units(inputs)
    header = {
        "version": FORMAT_VERSION,
        "tokenizer_sha256": sha256_file(tokenizer_file),
        "vocabulary": asdict(vocab),
        "options": asdict(replace(options, skip_bad=False)),
    }
    with _workspace(output, header, restart=restart) as work:
        job = Job(str(work), str(tokenizer_file), vocab.dtype.str, options)
        pending = _pending(job, units)
        if len(pending) < len(units):
            logger.info("resuming: %d of %d units are already encoded", len(units) - len(pending), len(units))
        with _progress_bar(units, pending, progress) as bar:
            _encode_all(pending, job, workers=workers, bar=bar)
        _finish(job, units, header)
        _install(work / "corpus", output)
    return TokenCorpus.open(output)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def read_vocabulary(tokenizer: Path) -> tuple[Vocabulary, Path]:
    """The ids of a checkpoint folder's tokenizer.json (or of that file), and the file's path.

    Raises:
        InputError: no tokenizer, or one without [CLS], [SEP], [MASK], [PAD] or [UNK] under any name.
    """
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    encoder = _load_tokenizer(file)
    ids = encoder.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    declared = _declared_specials(file.parent)
    named = {}
    for role, usual in _SPECIAL_NAMES.items():
        candidates = [declared[role]] if role in declared else usual
        found = [ids[token] for token in candidates if token in ids]
        if not found:
            raise InputError(
                f"{file} has no {role} token (looked for {', '.join(candidates)}): use a tokenizer with it"
            )
        named[f"{role}_id"] = found[0]
    special = {i for i, token in encoder.get_added_tokens_decoder().items() if token.special}
    holes = set(range(size)) - set(ids.values())
    special_ids = tuple(sorted(special | holes | set(named.values())))
    return Vocabulary(size=size, **named, special_ids=special_ids), file


def _load_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise InputError(f"{file} is missing: give a checkpoint folder with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class for any file it cannot read
        raise InputError(f"{file} is no tokenizer that this version of `tokenizers` reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
    return tokenizer


def _declared_specials(folder: Path) -> dict[str, str]:
    declared = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text("utf-8"))
            tokens = {role: content.get(f"{role}_token") for role in _SPECIAL_NAMES}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        for role, token in tokens.items():
            content_of = token.get("content") if isinstance(token, dict) else token
            if isinstance(content_of, str):
                declared[role] = content_of
    return declared


# --- the plan -----------------------------------------------------------------------------------------------------


def plan_units(inputs: Sequence[str]) -> list[Unit]:
    """Cut the inputs into units of work; languages side by side, otherwise in the order given.

    Raises:
        InputError: an input that does not exist, is given twice, or has no known format.
    """
    if not inputs:
        raise InputError("no input is given: name files, folders or hf:DATASET")
    parts: list[dict[str, Any]] = []
    seen: set[str] = set()
    for text in inputs:
        language, place = _split_language(text)
        if place.startswith(DATASET_PREFIX):
            parts += _dataset_parts(language, place.removeprefix(DATASET_PREFIX))
            continue
        files = _expand(place)
        if twice := seen & {str(file) for file in files}:
            raise InputError(f"{min(twice)} is given twice (again by {text!r}): name each input once")
        seen.update(str(file) for file in files)
        parts += _file_parts(language, files)
    order = list(dict.fromkeys(part["language"] for part in parts))
    parts.sort(key=lambda part: order.index(part["language"]))
    return [Unit(number=number, **part) for number, part in enumerate(parts)]


def _split_language(text: str) -> tuple[str, str]:
    match = _LANGUAGE.fullmatch(text)
    return match.groups() if match and not Path(text).exists() else ("", text)  # type: ignore[return-value]


def _expand(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(place, recursive=True)) if Path(name).is_file()]
    if not files:
        raise InputError(
            f"{place!r} names no file: expected {', '.join(SUFFIXES)}, a folder or a glob of them, or hf:…"
        )
    if any(file.name.endswith(PARQUET_SUFFIXES) for file in files):
        _parquet_library()
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"{file} has no known format: expected a name that ends with {', '.join(SUFFIXES)}")
    return [file.resolve() for file in files]


def _file_parts(language: str, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    group: list[Path] = []
    held = 0
    for file in files:
        group.append(file)
        held += file.stat().st_size
        if held >= _UNIT_BYTES:
            yield _file_part(language, group)
            group, held = [], 0
    if group:
        yield _file_part(language, group)


def _file_part(language: str, files: Sequence[Path]) -> dict[str, Any]:
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))
    return {"language": language, "files": tuple(str(file) for file in files), "stamps": stamps}


def _dataset_parts(language: str, dataset: str) -> list[dict[str, Any]]:
    shards = _load_dataset(dataset).num_shards
    return [
        {"language": language, "dataset": dataset, "dataset_shard": i, "dataset_shards": shards} for i in range(shards)
    ]


def _load_dataset(dataset: str) -> Any:
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
            streaming=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"hf:{dataset} cannot be opened: {error}") from error


# --- reading documents ------------------------------------------------------------------------------------------------


class DocumentReader:
    """Documents of one unit, in order; counts what it skipped."""

    def __init__(self, options: ReadOptions, *, counts: Counter[str], advance: Advance) -> None:
        self._options, self._counts, self._advance = options, counts, advance

    def read(self, unit: Unit) -> Iterator[str]:
        """Texts free of surrogates.

        Raises:
            InputError: a file or record that cannot be read, named with its line.
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
                self._bad(f"{path}:{number}: expected an object with a string {self._options.text_column!r}")

    def _paragraphs(self, path: Path) -> Iterator[str]:
        """Documents between blank lines."""
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
        """Numbered lines of bounded length; a longer one is a bad record."""
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
                if total > _EXPANSION_FREE_BYTES and total > _MAX_EXPANSION * done:
                    raise InputError(f"{path} expands more than {_MAX_EXPANSION} times: this is no compressed text")
                if done - reported > _ADVANCE_BYTES:
                    self._advance(done - reported)
                    reported = done
            self._advance(raw.tell() - reported)

    def _parquet(self, path: Path) -> Iterator[str]:
        pyarrow = _parquet_library()
        column, row, size = self._options.text_column, 0, path.stat().st_size
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    raise InputError(f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}")
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                    yield from self._column(batch.column(0).to_pylist(), f"{path}: row", row)
                    self._advance(size * (row + len(batch)) // rows - size * row // rows)
                    row += len(batch)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read near row {row}: {error}") from error

    def _dataset(self, unit: Unit) -> Iterator[str]:
        shard = _load_dataset(unit.dataset).shard(num_shards=unit.dataset_shards, index=unit.dataset_shard)
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

    def _bad(self, message: str) -> None:
        if not self._options.skip_bad:
            raise InputError(f"{message}; correct it, or skip and count bad records with skip_bad (--skip-bad)")
        logger.warning("skipped %s", message)
        self._counts["bad_records"] += 1


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream, and the raw one below it that knows how far reading has come."""
    with path.open("rb") as raw:
        if path.name.endswith(".gz"):
            with gzip.open(raw, "rb") as stream:
                yield stream, raw  # type: ignore[misc]
        else:
            yield raw, raw


def _parquet_library() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    return pyarrow


def _skip_line(stream: BinaryIO, line: bytes) -> int:
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(1 << 20)
        skipped += len(line)
    return skipped


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


# --- encoding units -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What every worker must know; plain data, because it travels to other processes."""

    work: str
    tokenizer_file: str
    dtype: str
    options: ReadOptions


class _Shared:
    """Counters that workers add to and the parent shows, and the flag by which it stops them."""

    def __init__(self, context: Any) -> None:
        self.stop = context.Event()
        self.bytes_done = context.Value("q", 0)
        self.tokens_done = context.Value("q", 0)


class _StoppedError(Exception):
    """The parent is going away or another unit has failed; nothing of the unit is kept."""


class _Encoder:
    """Encodes units into shards of a workspace."""

    def __init__(self, job: Job, shared: _Shared) -> None:
        self._job, self._shared = job, shared
        self._tokenizer = _load_tokenizer(Path(job.tokenizer_file))

    def encode(self, unit: Unit) -> None:
        """Write the unit's tokens, its offsets and, last, the record that says it is done."""
        try:
            self._encode(unit)
        except BaseException:
            self._shared.stop.set()  # before the parent has seen it: no unit is begun after a failed one
            raise

    def _encode(self, unit: Unit) -> None:
        work, counts = Path(self._job.work), Counter[str]()
        lengths: list[int] = []
        tokens_file = work / "corpus" / f"{unit.name}.tokens"

        def write_tokens(aside: Path) -> None:
            with aside.open("wb") as file:
                for ids in self._encoded(unit, counts):
                    lengths.extend(map(len, ids))
                    flat = itertools.chain.from_iterable(ids)
                    file.write(np.fromiter(flat, dtype=self._job.dtype, count=sum(map(len, ids))).tobytes())

        write_with(tokens_file, write_tokens)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=OFFSET_DTYPE)]).astype(OFFSET_DTYPE)
        offsets_file = tokens_file.with_suffix(".offsets")
        write_bytes(offsets_file, offsets.tobytes())
        record = {
            "unit": asdict(unit),
            "name": unit.name,
            "language": unit.language,
            "documents": len(lengths),
            "tokens": int(offsets[-1]),
            "tokens_sha256": sha256_file(tokens_file),
            "offsets_sha256": sha256_file(offsets_file),
            "counts": dict(sorted(counts.items())),
        }
        write_text(work / "units" / f"{unit.name}.json", json.dumps(record))

    def _encoded(self, unit: Unit, counts: Counter[str]) -> Iterator[list[list[int]]]:
        reader = DocumentReader(self._job.options, counts=counts, advance=self._advance)
        for texts in _batches(reader.read(unit)):
            if self._shared.stop.is_set():
                raise _StoppedError
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            kept = [document for document in ids if document]
            counts["empty_documents"] += len(ids) - len(kept)
            with self._shared.tokens_done.get_lock():
                self._shared.tokens_done.value += sum(map(len, kept))
            yield kept

    def _advance(self, num_bytes: int) -> None:
        with self._shared.bytes_done.get_lock():
            self._shared.bytes_done.value += num_bytes


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _encode_all(units: Sequence[Unit], job: Job, *, workers: int, bar: tqdm) -> None:
    if not units:
        return
    shared = _Shared(multiprocessing.get_context("spawn"))
    executor, encode = _executor(units, job, shared, workers)
    before = bar.n
    try:
        with executor:
            try:
                with _interrupts_held_back():  # the first submission starts the workers
                    order = [executor.submit(encode, unit) for unit in units]
                pending = set(order)
                while pending:
                    done, pending = futures.wait(pending, _POLL_SECONDS, futures.FIRST_COMPLETED)
                    _show(bar, before, shared)
                    errors = [error for future in order if future in done and (error := future.exception())]
                    for error in errors:
                        if not isinstance(error, _StoppedError):  # what stopped that one comes yet
                            raise error
            except BaseException:
                shared.stop.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise GteDeployError(
            "a worker process died, perhaps for lack of memory: run the same command again, with fewer workers, "
            "to go on from the units that are done"
        ) from error


def _executor(
    units: Sequence[Unit], job: Job, shared: _Shared, workers: int
) -> tuple[futures.Executor, Callable[[Unit], None]]:
    """One worker is a thread here, where the tokenizer's own threads use the cores; more are processes."""
    if workers == 1:
        return futures.ThreadPoolExecutor(1), _Encoder(job, shared).encode
    processes = min(workers, len(units))
    # spawn: a fork would copy whatever threads and locks torch or a tokenizer has in this process.
    executor = futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job, shared, workers // processes),
    )
    return executor, _encode_in_process


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C reaches the whole group, and the parent decides: processes started here inherit SIGINT blocked.

    A worker that ignored it itself could be interrupted before it gets so far. This process takes it on leaving.
    """
    resource_tracker.ensure_running()  # its start unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_process_encoder: _Encoder | None = None


def _start_worker(job: Job, shared: _Shared, threads: int) -> None:
    global _process_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _process_encoder = _Encoder(job, shared)


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers: they would finish their unit and wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _encode_in_process(unit: Unit) -> None:
    assert _process_encoder is not None
    _process_encoder.encode(unit)


def _progress_bar(units: Sequence[Unit], pending: Sequence[Unit], progress: bool) -> tqdm:
    total, left = sum(unit.size for unit in units), sum(unit.size for unit in pending)
    return tqdm(
        total=total or None,
        initial=total - left,
        unit="B",
        unit_scale=True,
        desc="prepare",
        disable=not progress,
        mininterval=0.3 if sys.stderr.isatty() else 10.0,  # a log file keeps every line
    )


def _show(bar: tqdm, before: int, shared: _Shared) -> None:
    bar.set_postfix_str(f"{shared.tokens_done.value:,} tokens", refresh=False)
    bar.update(before + shared.bytes_done.value - bar.n)


# --- the workspace --------------------------------------------------------------------------------------------------


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise InputError(f"{output} exists already: choose another folder, or replace it with overwrite (--overwrite)")
    if not (output / INDEX_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is no corpus, so it is not replaced: choose another folder")


@contextlib.contextmanager
def _workspace(output: Path, header: Mapping[str, Any], *, restart: bool) -> Iterator[Path]:
    """The locked `.NAME.partial` folder, begun with the same header; gone when all is done."""
    work = output.with_name(f".{output.name}.partial")
    work.mkdir(exist_ok=True)
    with (work / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{work} is in use: another prepare is writing {output}") from error
        _begin(work, json.dumps(header, sort_keys=True), restart)
        yield work
        shutil.rmtree(work)


def _begin(work: Path, header: str, restart: bool) -> None:
    header_file = work / "header.json"
    known = header_file.read_text("utf-8") if header_file.is_file() else None
    if known not in (None, header) and not restart:
        raise InputError(
            f"{work} was begun with other options or another tokenizer: finish that run, or discard it with "
            "restart (--restart)"
        )
    for folder in (work / "corpus", work / "units"):
        if restart or known is None:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        folder.chmod(DIRECTORY_MODE)
    write_text(header_file, header)


def _pending(job: Job, units: Sequence[Unit]) -> list[Unit]:
    """Units still to be encoded. Files of no finished unit, such as those of a killed worker, are removed."""
    finished = {unit.name for unit in units if _record(job, unit) is not None}
    for file in itertools.chain(*(Path(job.work, folder).iterdir() for folder in ("corpus", "units"))):
        if file.stem not in finished:
            file.unlink()
    return [unit for unit in units if unit.name not in finished]


def _record(job: Job, unit: Unit) -> dict[str, Any] | None:
    """What a finished unit wrote, or None where the unit is to be done (again)."""
    try:
        record = json.loads(Path(job.work, "units", f"{unit.name}.json").read_text("utf-8"))
        sizes = {
            ".tokens": record["tokens"] * np.dtype(job.dtype).itemsize,
            ".offsets": (record["documents"] + 1) * OFFSET_DTYPE.itemsize,
        }
        whole = all(Path(job.work, "corpus", unit.name + end).stat().st_size == size for end, size in sizes.items())
        same = record["unit"] == json.loads(json.dumps(asdict(unit)))
        skipped = record["counts"].get("bad_records", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and same and (job.options.skip_bad or not skipped) else None


def _finish(job: Job, units: Sequence[Unit], header: Mapping[str, Any]) -> None:
    counts: Counter[str] = Counter()
    shards = []
    for unit in units:
        record = _record(job, unit)
        if record is None:
            raise GteDeployError(f"{unit.name} in {job.work} was altered while it was made: run the same command again")
        counts.update(record["counts"])
        sources = [Path(file).name for file in unit.files] or [f"hf:{unit.dataset}#{unit.dataset_shard}"]
        shards.append({key: record[key] for key in _SHARD_KEYS} | {"sources": sources})
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "vocabulary": header["vocabulary"],
        "tokenizer_sha256": header["tokenizer_sha256"],
        "languages": list(dict.fromkeys(unit.language for unit in units)),
        "counts": dict(sorted(counts.items())),
        "shards": shards,
    }
    folder = Path(job.work, "corpus")
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    corpus = TokenCorpus.open(folder)
    everything = document_histogram(corpus)
    per_language = {name: document_histogram(corpus, name).as_dict() for name in corpus.languages}
    plot = {"unit": "tokens per document", "all": everything.as_dict(), "languages": per_language}
    write_text(folder / "histogram.json", json.dumps(plot) + "\n")
    write_text(folder / "histogram.txt", f"{everything}\n")


def _install(made: Path, output: Path) -> None:
    """Rename the finished folder into place. A kill between the renames leaves it for the next run to install."""
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    made.rename(output)
    sync_directory(output.parent)
    shutil.rmtree(old, ignore_errors=True)

"""Encode text into the token shards of a corpus.

The inputs are cut into units, which worker processes encode in parallel. The corpus has the same bytes for any number
of workers. Until it is complete, the work lies in the folder `.NAME.partial` beside the output: one shard and one
record per finished unit. A second run with the same inputs and options continues from there. A rename puts the finished
corpus into place.

Text is encoded as it is, without special tokens and without truncation; a "[MASK]" in a text is encoded as its
letters. A lone surrogate, which JSON allows and a tokenizer refuses, becomes U+FFFD and is counted. A document without
a token is dropped and counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gte_deploy.core.errors import GteDeployError, InputError, OutputExistsError
from gte_deploy.core.files import (
    follow_links,
    keep_mode,
    names_in_errors,
    read_json_object,
    require_utf8,
    sha256_file,
    sync_directory,
    sync_file,
    write_bytes,
    write_text,
)
from gte_deploy.core.formats import check_version
from gte_deploy.core.locks import try_lock
from gte_deploy.training.data.corpus import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_FILE,
    OFFSET_DTYPE,
    TokenCorpus,
    document_histogram,
)
from gte_deploy.training.data.readers import DocumentReader, Unit
from gte_deploy.training.data.units import plan_units
from gte_deploy.training.data.vocabulary import read_tokenizer, read_vocabulary
from gte_deploy.training.options import PrepareOptions, ReadOptions

logger = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 1_000
_BATCH_CHARACTERS = 4 << 20
_POLL_SECONDS = 0.25
_DISCARD = "Finish that run, or discard its work with restart=True."
_CORPUS = "corpus"  # the folder of the workspace that becomes the output
HELD_OUT_FOLDER = "held-out"
"""The corpus of held-out documents, inside the corpus they were taken from."""


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: Path,
    options: PrepareOptions = PrepareOptions(),  # noqa: B008 - frozen
    progress: bool = False,
) -> TokenCorpus:
    """Encode `inputs` into the corpus folder `output`, or continue an interrupted run.

    Args:
        inputs: files, folders, globs, or `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`; `LANGUAGE=` before an input names its
            language. Files are JSON lines (such as C4's .json.gz), .parquet or .txt.
        output: folder to write.
        tokenizer: checkpoint folder with a tokenizer.json, or that file.
        options: options for reading documents, the number of processes, and the fate of earlier work.
        progress: show a progress bar on stderr.

    Raises:
        InputError: an input, the tokenizer or the output folder cannot be used; for a bad record the message names
            file and line.
        MissingDependencyError: an input is Parquet or a dataset, and its library is not installed.
    """
    output = follow_links(Path(output))
    reading = options.reading()
    _check_output(output, force=options.force)
    vocab, tokenizer_file = read_vocabulary(Path(tokenizer))
    units = plan_units(inputs)
    header: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "tokenizer_sha256": sha256_file(tokenizer_file),
        "vocabulary": asdict(vocab),
        "options": asdict(replace(reading, skip_bad=False)),
        "shard_bytes": options.shard_bytes,
    }
    if options.held_out:
        header["held_out"] = options.held_out
    with _workspace(output, header, restart=options.restart) as work:
        job = PrepareJob(
            str(work), str(tokenizer_file), vocab.dtype.str, reading, options.shard_bytes, options.held_out
        )
        pending = _pending(job, units)
        if len(pending) < len(units):
            logger.info("resuming: %d of %d units are already encoded", len(units) - len(pending), len(units))
        with _progress_bar(units, pending, progress) as bar:
            _encode_all(pending, job, workers=options.workers, bar=bar)
        if options.held_out:
            _finish(job, units, header, HELD_OUT_FOLDER)
        _finish(job, units, header, _CORPUS)
        if options.held_out:
            (work / HELD_OUT_FOLDER).rename(work / _CORPUS / HELD_OUT_FOLDER)
        _install(work / _CORPUS, output)
    return TokenCorpus.open(output)


# --- encoding units -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareJob:
    """The settings that every worker needs. Plain data, because it is sent to other processes."""

    work: str
    tokenizer_file: str
    dtype: str
    options: ReadOptions
    shard_bytes: int
    held_out: float = 0.0

    def holds_out(self, text: str) -> bool:
        """Whether a document is kept out of the corpus: a pure function of its text."""
        if not self.held_out:
            return False
        word = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return word < self.held_out * 2.0**64

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of the workspace that get a shard of each unit."""
        return (_CORPUS, HELD_OUT_FOLDER) if self.held_out else (_CORPUS,)


class _Shared:
    """The workers' common counters, which the parent shows, and the flag by which it stops the workers."""

    def __init__(self, context: Any) -> None:
        self.stop = context.Event()
        self.bytes_done = context.Value("q", 0)
        self.tokens_done = context.Value("q", 0)


class _StoppedError(Exception):
    """The parent stops its workers, or another unit failed. The unit is discarded."""


class _Encoder:
    """Encodes units into shards of the workspace."""

    def __init__(self, job: PrepareJob, shared: _Shared) -> None:
        self._job, self._shared = job, shared
        self._tokenizer = read_tokenizer(Path(job.tokenizer_file))

    def encode(self, unit: Unit) -> None:
        """Write the unit's tokens and offsets, and then the record that marks the unit as finished."""
        try:
            self._encode(unit)
        except BaseException:
            self._shared.stop.set()  # at once, and not by the parent: no unit is begun after a failed one
            raise

    def _encode(self, unit: Unit) -> None:
        job, work, counts = self._job, Path(self._job.work), Counter[str]()
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(
                    _ShardWriter(work / folder, unit.name, dtype=np.dtype(job.dtype), shard_bytes=job.shard_bytes)
                )
                for folder in job.folders
            ]
            for split in self._encoded(unit, counts):
                for writer, documents in zip(writers, split, strict=False):  # without held-out ones the second is empty
                    writer.add(documents)
            shards = {folder: writer.finish() for folder, writer in zip(job.folders, writers, strict=True)}
        record = {
            "unit": asdict(unit),
            "language": unit.language,
            **shards,
            "counts": dict(sorted(counts.items())),
        }
        write_text(work / "units" / f"{unit.name}.json", json.dumps(record))

    def _encoded(self, unit: Unit, counts: Counter[str]) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
        """Yield the token ids of some documents at a time: of those that are kept, and of those that are held out."""
        reader = DocumentReader(self._job.options, counts=counts, advance=self._advance)
        for texts in _batches(reader.read(unit)):
            if self._shared.stop.is_set():
                raise _StoppedError
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            split: tuple[list[list[int]], list[list[int]]] = ([], [])
            for text, encoding in zip(texts, encodings, strict=True):
                if encoding.ids:
                    split[self._job.holds_out(text)].append(encoding.ids)
            counts["empty_documents"] += len(texts) - sum(map(len, split))
            with self._shared.tokens_done.get_lock():
                self._shared.tokens_done.value += sum(len(ids) for part in split for ids in part)
            yield split

    def _advance(self, num_bytes: int) -> None:
        with self._shared.bytes_done.get_lock():
            self._shared.bytes_done.value += num_bytes


class _ShardWriter:
    """Writes the documents of a unit into shards: NAME, NAME-0001 and so on, each of `shard_bytes` at most."""

    def __init__(self, folder: Path, name: str, *, dtype: np.dtype, shard_bytes: int) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._most = max(1, shard_bytes // dtype.itemsize)  # tokens of a shard
        self._finished: list[dict[str, Any]] = []
        self._open()

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Write documents. A shard that would become too large ends before the document."""
        start = 0
        while start < len(documents):
            ends = np.cumsum([len(document) for document in documents[start:]])
            fits = int(np.searchsorted(ends, self._most - self._held, side="right"))
            if not fits and self._lengths:
                self._finish_shard()
                self._open()
                continue
            stop = start + max(fits, 1)
            self._write(documents[start:stop])
            start = stop

    def finish(self) -> list[dict[str, Any]]:
        """End the last shard, and return what the index says of each."""
        self._finish_shard()
        return self._finished

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> None:
        number = len(self._finished)
        self._shard = self._folder / (f"{self._name}-{number:04d}" if number else self._name)
        self._lengths: list[int] = []
        self._held = 0
        # Not aside: what has no record yet is removed by the next run.
        self._file = self._shard.with_suffix(".tokens").open("wb")

    def _write(self, documents: Sequence[Sequence[int]]) -> None:
        lengths = [len(document) for document in documents]
        flat = itertools.chain.from_iterable(documents)
        self._file.write(np.fromiter(flat, dtype=self._dtype, count=sum(lengths)).tobytes())
        self._lengths += lengths
        self._held += sum(lengths)

    def _finish_shard(self) -> None:
        self._file.close()
        tokens, offsets_file = self._shard.with_suffix(".tokens"), self._shard.with_suffix(".offsets")
        sync_file(tokens)
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=OFFSET_DTYPE)]).astype(OFFSET_DTYPE)
        write_bytes(offsets_file, offsets.tobytes())  # this syncs the folder, too
        self._finished.append(
            {
                "name": self._shard.name,
                "documents": len(self._lengths),
                "tokens": int(offsets[-1]),
                "tokens_sha256": sha256_file(tokens),
                "offsets_sha256": sha256_file(offsets_file),
            }
        )


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


def _encode_all(units: Sequence[Unit], job: PrepareJob, *, workers: int, bar: tqdm) -> None:
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
                        if not isinstance(error, _StoppedError):  # the failure that stopped it is still to come
                            raise error
            except BaseException:
                shared.stop.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise GteDeployError(
            "a worker process died, perhaps for lack of memory: run the same command again with fewer workers; it "
            "continues after the finished units"
        ) from error


def _executor(
    units: Sequence[Unit], job: PrepareJob, shared: _Shared, workers: int
) -> tuple[futures.Executor, Callable[[Unit], None]]:
    """Return an executor and the function that it runs for each unit.

    A single worker is a thread of this process, and the tokenizer's own threads use the cores. More are processes.
    """
    if workers == 1:
        return futures.ThreadPoolExecutor(1), _Encoder(job, shared).encode
    processes = min(workers, len(units))
    # spawn, because a fork would copy the threads and locks that torch or a tokenizer has in this process.
    executor = futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job, shared, workers // processes),
    )
    return executor, _encode_in_process


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes with SIGINT blocked, so that Ctrl-C, which reaches the whole group, is left to the parent.

    A worker could not ignore the signal by itself in time: it could be interrupted before its first statement. This
    process receives a signal that came meanwhile when the block ends.
    """
    resource_tracker.ensure_running()  # now, because the start of the tracker unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_process_encoder: _Encoder | None = None


def _start_worker(job: PrepareJob, shared: _Shared, threads: int) -> None:
    global _process_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _process_encoder = _Encoder(job, shared)


def _die_with_parent() -> None:
    """End this worker when its parent ends. A killed parent cannot stop its workers, which would wait for ever."""
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
        mininterval=0.3 if sys.stderr.isatty() else 10.0,  # a log file keeps every update
    )


def _show(bar: tqdm, before: int, shared: _Shared) -> None:
    bar.set_postfix_str(f"{shared.tokens_done.value:,} tokens", refresh=False)
    bar.update(before + shared.bytes_done.value - bar.n)


# --- the workspace --------------------------------------------------------------------------------------------------


def _check_output(output: Path, *, force: bool) -> None:
    require_utf8(output)
    if not output.exists():
        return
    if not force:
        raise OutputExistsError(f"{output} exists already.", advice="Replace it with --force, or choose another.")
    if not (output / INDEX_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExistsError(f"{output} is no corpus, so it is not replaced.", advice="Choose another folder.")


@contextlib.contextmanager
def _workspace(output: Path, header: Mapping[str, Any], *, restart: bool) -> Iterator[Path]:
    """Lock the folder `.NAME.partial`, which must have been begun with the same header; remove it at the end."""
    work = output.with_name(f".{output.name}.partial")
    work.parent.mkdir(parents=True, exist_ok=True)
    release = try_lock(work.with_name(f"{work.name}.lock"))
    if release is None:
        raise InputError(f"{work} is in use: another prepare is writing {output}")
    try:
        with names_in_errors(output):
            work.mkdir(exist_ok=True)
            _begin(work, json.dumps(header, sort_keys=True), restart)
            yield work
            shutil.rmtree(work)
    finally:
        release()


def _begin(work: Path, header: str, restart: bool) -> None:
    header_file = work / "header.json"
    known = header_file.read_text("utf-8") if header_file.is_file() else None
    if known not in (None, header) and not restart:
        version = read_json_object(header_file, error=InputError, advice=_DISCARD).get("version")
        check_version(header_file, version, (FORMAT_VERSION,), error=InputError, advice=_DISCARD)
        raise InputError(f"{work} was begun with other options or another tokenizer.", advice=_DISCARD)
    for folder in (work / _CORPUS, work / HELD_OUT_FOLDER, work / "units"):
        if restart or known is None:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    write_text(header_file, header)


def _pending(job: PrepareJob, units: Sequence[Unit]) -> list[Unit]:
    """Return the units that are still to be encoded. Remove the files of all others than finished units."""
    records = {unit.name: record for unit in units if (record := _record(job, unit)) is not None}
    shards = {shard["name"] for record in records.values() for folder in job.folders for shard in record[folder]}
    for file in itertools.chain(*(Path(job.work, folder).iterdir() for folder in (*job.folders, "units"))):
        if file.is_dir():  # the held-out corpus, moved into place by a run that was killed before its end
            shutil.rmtree(file)
        elif file.stem not in (records if file.suffix == ".json" else shards):
            file.unlink()
    return [unit for unit in units if unit.name not in records]


def _record(job: PrepareJob, unit: Unit) -> dict[str, Any] | None:
    """Return the record of a finished unit, or None if the unit is to be encoded, perhaps again."""
    try:
        record = json.loads(Path(job.work, "units", f"{unit.name}.json").read_text("utf-8"))
        sizes = {}
        for folder in job.folders:
            for facts in record[folder]:
                shard = Path(job.work, folder, facts["name"])
                sizes[shard.with_suffix(".tokens")] = facts["tokens"] * np.dtype(job.dtype).itemsize
                sizes[shard.with_suffix(".offsets")] = (facts["documents"] + 1) * OFFSET_DTYPE.itemsize
        whole = all(path.stat().st_size == size for path, size in sizes.items())
        same = record["unit"] == json.loads(json.dumps(asdict(unit)))
        skipped = record["counts"].get("bad_records", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if whole and same and (job.options.skip_bad or not skipped) else None


def _finish(job: PrepareJob, units: Sequence[Unit], header: Mapping[str, Any], part: str) -> None:
    """Write the index and the histograms of one of the job's folders.

    Raises:
        InputError: no document is held out, or all of them are.
    """
    counts: Counter[str] = Counter()
    shards = []
    for unit in units:
        record = _record(job, unit)
        if record is None:
            raise GteDeployError(f"{unit.name} in {job.work} was altered during the run: run the same command again")
        counts.update(record["counts"])
        sources = [Path(file).name for file in unit.files] or [f"hf:{unit.dataset}#{unit.dataset_shard}"]
        shards += [{**facts, "language": record["language"], "sources": sources} for facts in record[part]]
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "vocabulary": header["vocabulary"],
        "tokenizer_sha256": header["tokenizer_sha256"],
        "languages": list(dict.fromkeys(unit.language for unit in units)),
        "counts": dict(sorted(counts.items())),
        "shards": shards,
    }
    if job.held_out and not any(shard["documents"] for shard in shards):
        which = "held out" if part == HELD_OUT_FOLDER else "left"
        raise InputError(f"no document is {which} with held_out {job.held_out}: choose another share of the documents")
    folder = Path(job.work, part)
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    corpus = TokenCorpus.open(folder)
    everything = document_histogram(corpus)
    per_language = {name: document_histogram(corpus, name).as_dict() for name in corpus.languages}
    plot = {"unit": "tokens per document", "all": everything.as_dict(), "languages": per_language}
    write_text(folder / "histogram.json", json.dumps(plot) + "\n")
    write_text(folder / "histogram.txt", f"{everything}\n")


def _install(made: Path, output: Path) -> None:
    """Rename the finished folder into place. After a kill between the renames, the next run does it."""
    old = output.with_name(f".{output.name}.old")
    keep_mode(made, output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    made.rename(output)
    sync_directory(output.parent)
    shutil.rmtree(old, ignore_errors=True)

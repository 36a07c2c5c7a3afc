"""`encode_files`: encodes the texts of files into a file of vectors."""

import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gte_deploy.backends.choice import is_for_gpus
from gte_deploy.bulk.columns import import_pyarrow
from gte_deploy.bulk.job import BulkJob
from gte_deploy.bulk.joining import COLUMNS_OF, failures_file, import_lance, join_parts
from gte_deploy.bulk.on_ray import encode_on_ray
from gte_deploy.bulk.options import BulkMethod, BulkOptions, OutputFormat, output_format
from gte_deploy.bulk.parts import Part, open_parts
from gte_deploy.bulk.progress import BulkProgress, ReportState
from gte_deploy.bulk.shards import Cursor, find_files
from gte_deploy.bulk.vectors import VectorColumns, plain_arguments
from gte_deploy.bundle.download import resolve_model
from gte_deploy.bundle.manifest import is_bundle, read_manifest
from gte_deploy.bundle.signature import TrustedKeys
from gte_deploy.core.errors import InputError
from gte_deploy.core.files import follow_links, is_special, names_in_errors, write_through, write_with
from gte_deploy.loading import load
from gte_deploy.model import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkSummary:
    """The result of a run.

    Args:
        output: the file, or for Lance the folder, of vectors.
        rows: rows of the output, each with a vector.
        form: what they are, such as "(1000, 768) float16".
        failures: rows without.
        failures_file: the file that says why, a JSON object a line; None if every row has a vector.
        resumed_rows: rows, of all, that an earlier, interrupted run had done.
        tokens: tokens that this run computed, special tokens included. Equal texts of a shard are computed once.
        seconds: duration of this run.
    """

    output: Path
    rows: int
    form: str
    failures: int
    failures_file: Path | None
    resumed_rows: int
    tokens: int
    seconds: float

    def describe(self) -> str:
        """A line for people."""
        failed = f", {self.failures:,} failed ({self.failures_file})" if self.failures else ""
        resumed = f", {self.resumed_rows:,} of them by an earlier run" if self.resumed_rows else ""
        return f"wrote {self.output}: {self.form}{resumed}{failed}; {self.tokens:,} tokens in {self.seconds:,.1f} s"

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON data."""
        failed = None if self.failures_file is None else str(self.failures_file)
        return {**asdict(self), "output": str(self.output), "failures_file": failed}


def encode_files(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: Model | str | os.PathLike[str] | None = None,
    options: BulkOptions | None = None,
    load_options: Mapping[str, Any] | None = None,
    encode_options: Mapping[str, Any] | None = None,
    method: BulkMethod = "encode",
    report: ReportState | None = None,
) -> BulkSummary:
    """Encode the texts of files, and write their vectors, with the other columns, in the order of the input.

    Rows are read, encoded and stored in shards, so memory does not grow with the input. Finished shards are in the
    folder `OUTPUT.parts` until all are done. If the process is killed, the same call goes on after the last of them,
    and gives the vectors of an unbroken run. Rows that cannot be encoded are listed in `OUTPUT.failures.jsonl`.

    Args:
        input: a file (parquet, JSON lines, CSV, or a text a line), or a folder of files; see docs/bulk.md.
        output: the file to write: .parquet, .npy, .jsonl, or a .lance folder. An older one is replaced at the end.
        model: a loaded model, or what `gte_deploy.load` takes: a folder, a hub id, or None for the built-in model.
        options: how files are read and written, and where the model runs.
        load_options: arguments of `gte_deploy.load`, if `model` is not loaded.
        encode_options: arguments of the method, without those about progress and types of results. `precision` may
            also be "float16"; the steps of "int8" and "uint8" are those of all vectors of the run.
        method: the method of the model that encodes. "encode" is `encode_sparse` for sparse models and
            `encode_document` for multi-vector models; "encode_hybrid" writes both vectors of a hybrid model.
        report: called about twice a second with the `BulkState` of the run.

    Raises:
        InputError: an option or a file is not acceptable; or `OUTPUT.parts` belongs to another run.
        BackendError: the engine failed. Finished shards are kept.
        MissingDependencyError: the format or the engine needs a package that is missing.
        OSError: a file cannot be written.
    """
    started = time.monotonic()
    options, target = options or BulkOptions(), Path(output)
    kind = output_format(target, options.output_format)
    if is_special(target):
        if kind == "lance":
            raise InputError(f"--output {target} is no folder, and Lance writes one; give another --output-format")
        given: dict[str, Any] = {"model": model, "load_options": load_options, "encode_options": encode_options}
        options = dataclasses.replace(options, output_format=kind)
        return _write_special(
            target, functools.partial(encode_files, input, options=options, method=method, report=report, **given)
        )
    target = follow_links(target)
    _check_output(target, kind)
    if target.resolve().is_relative_to(Path(input).resolve()):
        raise InputError(f"--output {target} is inside --input {input}: write it elsewhere")
    files = find_files(Path(input), options)
    arguments = dict(encode_options or {})
    source, identity, on_gpu = _source(model, load_options or {})
    identity |= {
        "input": files.fingerprint(),
        "method": method,
        "encode": plain_arguments(arguments),
        "options": _settings(options, kind),
    }
    with names_in_errors(target), open_parts(target, identity, restart=options.restart) as folder:
        job = BulkJob(files, folder, COLUMNS_OF[kind], options, source, method, arguments, on_gpu)
        before = folder.finished()
        with BulkProgress(before, report) as progress:
            if not (before and before[-1].is_last):
                _RUNNERS[options.engine](job, before[-1].after if before else Cursor(), progress)
            parts = folder.finished()
            columns = VectorColumns.of(parts, options.embedding_column)
            form = columns.describe(parts)
            join_parts(parts, target, kind, columns, folder.folder / f".{target.name}")
        folder.remove()
    failures = sum(part.failures for part in parts)
    return BulkSummary(
        Path(output),
        rows=sum(part.rows for part in parts),
        form=form,
        failures=failures,
        failures_file=failures_file(target) if failures else None,
        resumed_rows=sum(part.rows for part in before),
        tokens=sum(part.tokens for part in parts[len(before) :]),
        seconds=round(time.monotonic() - started, 3),
    )


def _write_special(target: Path, encode: Callable[[Path], BulkSummary]) -> BulkSummary:
    """Let `encode` write a temporary file, and copy that into a device or a pipe."""
    with tempfile.TemporaryDirectory(prefix="gte-deploy-") as folder:
        aside = Path(folder, target.name)
        summary = encode(aside)
        write_through(aside, target)
        failed = None
        if summary.failures_file is not None:
            failed = Path.cwd() / summary.failures_file.name
            write_with(failed, functools.partial(shutil.copyfile, summary.failures_file))
    return dataclasses.replace(summary, output=target, failures_file=failed)


def _run_here(job: BulkJob, cursor: Cursor, progress: BulkProgress) -> None:
    """Encode all shards from a place on in this process. Reading and writing overlap with the model's work."""
    with (
        job.opened() as model,
        ThreadPoolExecutor(1, thread_name_prefix="gte-read") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="gte-write") as writer,
    ):
        encoder = job.encoder(model)
        for part in job.parts.finished()[-1:]:
            if part.made_by["engine"] != encoder.facts["engine"]:
                logger.warning(
                    "the parts that are there were computed by %s, and this run goes on with %s, whose vectors differ "
                    "in their last digits",
                    part.made_by["engine"],
                    encoder.facts["engine"],
                )
        shards = job.shards(encoder, cursor)
        ahead = reader.submit(next, shards, None)
        writing: Future[Part] | None = None
        while (shard := ahead.result()) is not None:
            ahead = reader.submit(next, shards, None)
            store = job.computed(encoder, shard, progress.begins(len(shard.places), shard.done))
            if writing is not None:
                progress.finished(writing.result())
            writing = writer.submit(store)
        if writing is not None:
            progress.finished(writing.result())


_RUNNERS = {"local": _run_here, "ray": encode_on_ray}


def _check_output(output: Path, kind: OutputFormat) -> None:
    """Refuse, before any work, an output that cannot be written."""
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder does not exist")
    if kind in ("parquet", "lance"):
        import_pyarrow()
    if kind == "lance":
        import_lance()
    if output.exists() and output.is_dir() != (kind == "lance"):
        raise InputError(f"--output {output} is a {'folder' if output.is_dir() else 'file'} already; remove it first")


def _settings(options: BulkOptions, kind: OutputFormat) -> dict[str, Any]:
    """The options that parts depend on."""
    names = ("text_column", "embedding_column", "shard_rows")
    return {"columns": COLUMNS_OF[kind], **{name: getattr(options, name) for name in names}}


def _source(
    model: Model | str | os.PathLike[str] | None, load_options: Mapping[str, Any]
) -> tuple[Model | Callable[[], Model], dict[str, Any], bool]:
    """The model, or the function that loads it; what tells it from others; and whether it runs on a GPU."""
    if isinstance(model, Model):
        if load_options:
            raise InputError("load_options are for a model that is not loaded; leave them out")
        return model, {"model": _fingerprint(model.path), "load": {}}, model.device.startswith("cuda")
    where = {name: load_options.get(name) for name in ("revision", "cache_dir", "token")}
    keys = load_options.get("trusted_keys")
    trusted = None if keys is None else TrustedKeys(keys)
    folder = resolve_model(model, **where, trusted=trusted)
    manifest = read_manifest(folder, trusted) if trusted is not None or is_bundle(folder) else None
    device = load_options.get("device")
    if device is None and manifest is not None and is_for_gpus(manifest):
        device = "cuda"
    if trusted is not None:
        load_options = {**load_options, "trusted_keys": trusted.pem}  # other machines of Ray have no such files
    # The number of threads changes the speed; these may change the vectors.
    kept = {name: load_options[name] for name in ("backend", "precision", "device", "task") if name in load_options}
    identity = {"model": _fingerprint(folder), "load": kept}
    return functools.partial(load, model, **load_options), identity, str(device).startswith("cuda")


def _fingerprint(folder: Path) -> str:
    """The checksum of a bundle; for a checkpoint one of the names, sizes and times of its files."""
    if is_bundle(folder):
        checksum: str = read_manifest(folder).to_json()["checksum"]
        return checksum
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        facts = file.stat()
        digest.update(f"{file.relative_to(folder)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()

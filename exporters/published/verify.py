"""Verifies published checkpoints one after the other: download, export, comparison, result."""

import contextlib
import dataclasses
import datetime
import itertools
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.core.errors import BundleError, CheckpointError, GteDeployError, InputError, ParityError
from gte_deploy.core.hub import HubModel, hub_errors
from gte_deploy.exporters.export import ExportResult, export
from gte_deploy.exporters.job import Progress
from gte_deploy.exporters.options import make_request
from gte_deploy.exporters.published.comparison import Outcome, compare_recorded
from gte_deploy.exporters.published.options import PublishedOptions
from gte_deploy.exporters.published.recorded import RECORDED, Recorded
from gte_deploy.exporters.published.results import PublishedResult, Verdict, read_result, result_file, write_result
from gte_deploy.loading import load
from gte_deploy.models import CHECKPOINT_PATTERNS
from gte_deploy.models.published import Published

_WORK = "work"
_TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
# A bundle has FP32 weights, and checkpoints may store half of that; it is written once.
_BUNDLE_ROOM = 2.2


@dataclass(frozen=True)
class Found:
    """What the hub says of a checkpoint: the commit, and the size in bytes of each file that is downloaded."""

    commit: str
    files: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Plan:
    """The work that is left, after the hub was asked for every checkpoint.

    Args:
        todo: the checkpoints to verify, with what the hub says of them.
        kept: results of earlier runs for the same commits.
        failed: results of checkpoints that the hub did not show.
        disk: the largest number of bytes that the work needs at a time.
        free: bytes that are free for it.
    """

    todo: tuple[tuple[Published, Found], ...]
    kept: tuple[PublishedResult, ...]
    failed: tuple[PublishedResult, ...]
    disk: int
    free: int

    def describe(self) -> str:
        """Say in one line what there is to do."""
        download = sum(found.size for _, found in self.todo)
        return (
            f"{len(self.todo)} to verify, {len(self.kept)} with a result already, {len(self.failed)} not to be had; "
            f"downloads {_gigabytes(download)}, disk needed at a time {_gigabytes(self.disk)}, "
            f"free {_gigabytes(self.free)}"
        )


def verify_published(
    chosen: Sequence[Published], options: PublishedOptions, progress: Progress | None = None
) -> list[PublishedResult]:
    """Verify checkpoints, and write a result for each as soon as it is there.

    Several runs may share the folder of results: each has a work folder of its own, and takes over what another wrote.
    A checkpoint that fails does not stop the others. A result of an earlier run for the same commit is kept, unless the
    checkpoint had failed; so the same call goes on after an interruption.

    Args:
        chosen: the checkpoints; see `models.published.published`.
        options: folders, target and precision.
        progress: called with one line at every step.

    Returns:
        The result of each checkpoint, those of earlier runs among them, in the order of `chosen`.

    Raises:
        InputError: an option is wrong, or the disk has not enough room; nothing was downloaded.
        MissingDependencyError: the [export] extra is not installed.
    """
    tell = progress or (lambda line: None)
    target, precision = _target(options)
    options.results.mkdir(parents=True, exist_ok=True)
    plan = make_plan(chosen, options, target=target, precision=precision)
    tell(plan.describe())
    if plan.disk > plan.free:
        advice = "choose fewer models" if options.remove_downloads else "choose fewer models, or --remove-downloads"
        raise InputError(
            f"the work needs {_gigabytes(plan.disk)} of disk at a time, and {options.results.resolve()} has "
            f"{_gigabytes(plan.free)} free: {advice}, or another folder for --results"
        )
    results = {result.model: result for result in (*plan.kept, *plan.failed)}
    for result in plan.failed:
        tell(f"{result.model}: failed: {result.error}")
        if not result_file(options.results, result.model, target, precision).exists():
            write_result(options.results, result)  # an unreachable hub says nothing against an earlier result
    with _own_folder(options.results) as own:
        for number, (entry, found) in enumerate(plan.todo, 1):
            tell(f"{number} of {len(plan.todo)}: {entry.id} at {found.commit[:7]}, {_gigabytes(found.size)}")
            earlier = _earlier(entry, options, target, precision)
            if earlier is not None and _is_current(earlier, found, RECORDED.get(entry.id, ())):
                result = earlier  # another run has written it in the meantime
            else:
                with _work_folder(own) as work:
                    result = _verify(entry, found, work, options, target, precision, tell)
                    write_result(options.results, result)
            results[entry.id] = result
            tell(f"{entry.id}: {result.verdict}")
    return [results[entry.id] for entry in chosen]


def _target(options: PublishedOptions) -> tuple[str, str]:
    """Return the names of target and precision, checked before the hub is asked."""
    request = make_request(target=options.target, precision=options.precision)
    return request.target.name, request.precision


def make_plan(chosen: Sequence[Published], options: PublishedOptions, *, target: str, precision: str) -> Plan:
    """Ask the hub for every checkpoint, and say what is left to do; nothing is downloaded."""
    todo, kept, failed = [], [], []
    for entry in chosen:
        try:
            found = look_up(entry)
        except CheckpointError as error:
            failed.append(_result(entry, None, target, precision, verdict="failed", error=str(error)))
            continue
        earlier = _earlier(entry, options, target, precision)
        if earlier is not None and _is_current(earlier, found, RECORDED.get(entry.id, ())):
            kept.append(earlier)
        else:
            todo.append((entry, found))
    sizes = [found.size for _, found in todo]
    downloads = max(sizes, default=0) if options.remove_downloads else sum(sizes)
    disk = int(downloads + _BUNDLE_ROOM * max(sizes, default=0))
    return Plan(tuple(todo), tuple(kept), tuple(failed), disk, shutil.disk_usage(options.results).free)


def look_up(entry: Published) -> Found:
    """Ask the hub for the commit of a checkpoint's revision, and for the sizes of the files that an export reads.

    Raises:
        CheckpointError: the hub shows no such model or revision; the message says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    model = HubModel(entry.id, entry.revision)
    try:
        commit = str(HfApi().model_info(entry.id, revision=entry.revision).sha)
        tree = HfApi().list_repo_tree(entry.id, revision=commit, recursive=True)
        sizes = {item.path: int(getattr(item, "size", 0)) for item in tree}
    except hub_errors() as error:
        raise CheckpointError(model.explain(error)) from error
    read = filter_repo_objects(sizes, allow_patterns=list(CHECKPOINT_PATTERNS))
    return Found(commit, {path: sizes[path] for path in read})


def _earlier(entry: Published, options: PublishedOptions, target: str, precision: str) -> PublishedResult | None:
    file = result_file(options.results, entry.id, target, precision)
    return read_result(file) if file.is_file() and not options.force else None


def _is_current(result: PublishedResult, found: Found, expected: Sequence[Recorded]) -> bool:
    """Whether a result is of this commit and compared all values that are known today."""
    compared = [(row["source"], row["quantity"]) for row in result.expected]
    known = [(values.source, values.quantity) for values in expected]
    return result.verdict != "failed" and result.commit == found.commit and (not compared or compared == known)


@contextlib.contextmanager
def _own_folder(results: Path) -> Iterator[Path]:
    """The folder of one run's work: "work", or "work-2" and so on while other runs have those before it.

    A lock ends with its process, so after an interruption the next run finds the download of the former.
    """
    from gte_deploy.core.locks import try_lock

    names = itertools.chain([_WORK], (f"{_WORK}-{number}" for number in itertools.count(2)))
    held = ((results / name, try_lock(results / f"{name}.lock")) for name in names)
    folder, release = next((folder, release) for folder, release in held if release is not None)
    try:
        yield folder
    finally:
        release()


@contextlib.contextmanager
def _work_folder(work: Path) -> Iterator[Path]:
    """The folder for one checkpoint. After an interruption the next call goes on with the download in it."""
    shutil.rmtree(work / "bundle", ignore_errors=True)
    work.mkdir(exist_ok=True)
    yield work
    shutil.rmtree(work, ignore_errors=True)


def _verify(
    entry: Published,
    found: Found,
    work: Path,
    options: PublishedOptions,
    target: str,
    precision: str,
    tell: Progress,
) -> PublishedResult:
    """Export one checkpoint and compare it; every error becomes a result."""
    cache = str(work / "downloads") if options.remove_downloads else options.cache_dir

    def result(verdict: Verdict, error: str | None = None, **known: Any) -> PublishedResult:
        if error is not None:  # a result is for others, and names no folder of this machine
            error = re.sub(r"\S*/models--\S+?/snapshots/\w+", entry.id, error).replace(f"{work}/", "")
        return _result(entry, found, target, precision, verdict=verdict, error=error, **known)

    try:
        exported = export(
            _download(entry, found, cache, work),
            work / "bundle",
            target=target,
            precision=precision,
            task=entry.task,
            reference_cache="off",
            progress=lambda line: tell(f"  {line}"),
        )
        backend, outcomes = _compare(exported.path, RECORDED.get(entry.id, ()))
    except ParityError as error:
        return result("differs", error=str(error))
    except GteDeployError as error:
        return result("failed", error=f"{type(error).__name__}: {error}")
    except Exception as error:  # a library failed; the next checkpoint may do
        return result("failed", error=f"{type(error).__name__} of a library: {error}")
    for outcome in outcomes:
        tell(f"  {'agrees' if outcome.passed else 'DIFFERS'}: {outcome.describe()}")
    # Other precisions round more than the bounds of the sources allow.
    agrees = precision != "fp32" or all(outcome.passed for outcome in outcomes)
    return result(
        "verified" if agrees else "differs",
        backend=backend,
        expected=tuple(map(dataclasses.asdict, outcomes)),
        **_of_export(exported),
    )


def _download(entry: Published, found: Found, cache: str | None, work: Path) -> Path:
    """Return the folder of a checkpoint; if it has no tokenizer, one with links to its files and to a tokenizer's.

    Raises:
        CheckpointError: see `HubModel.download`.
    """
    checkpoint = HubModel(entry.id, found.commit, cache).download(CHECKPOINT_PATTERNS)
    if entry.tokenizer is None:
        return checkpoint
    tokenizer = HubModel(entry.tokenizer, cache_dir=cache).download(_TOKENIZER_PATTERNS)
    joined = work / "checkpoint"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    for file in {file.name: file for folder in (tokenizer, checkpoint) for file in folder.iterdir()}.values():
        (joined / file.name).symlink_to(file.resolve())
    return joined


def _compare(bundle: Path, expected: Sequence[Recorded]) -> tuple[str, list[Outcome]]:
    try:
        with load(bundle) as model:
            return model.backend, [compare_recorded(model, values) for values in expected]
    except BundleError as error:
        raise BundleError(f"the new bundle does not load: {error}") from error


def _of_export(exported: ExportResult) -> dict[str, Any]:
    parity = exported.parity
    return {
        "bundle_bytes": sum(file.size for file in exported.manifest.files.values()),
        "parity": tuple(
            {"engine": each.title, "max_abs": each.max_abs, "max_rel": each.max_rel, "cosine_min": each.cosine_min}
            for each in parity.engines
        ),
        "checks": tuple(check.line for check in parity.checks),
    }


def _result(entry: Published, found: Found | None, target: str, precision: str, **known: Any) -> PublishedResult:
    from gte_deploy.exporters.verification.report import library_versions

    return PublishedResult(
        model=entry.id,
        revision=entry.revision,
        commit=None if found is None else found.commit,
        target=target,
        precision=precision,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions={**library_versions(), "gte-deploy": __version__},
        machine={"cpu": cpu_model(), "system": f"{platform.system()} {platform.machine()}"},
        files={} if found is None else found.files,
        **known,
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

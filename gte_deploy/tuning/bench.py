"""Measures the speed of a bundle on this machine with every available engine: `gte-deploy bench`."""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.backends.choice import is_for_gpus, may_run_in_bf16, precision_of
from gte_deploy.backends.picks import Pick, cpu_model, engine_versions, save
from gte_deploy.bundle.manifest import Manifest, read_manifest
from gte_deploy.core.cpus import MAX_THREADS, available_cpus
from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import BUNDLE_BACKENDS, BundleBackend
from gte_deploy.tasks import TASKS
from gte_deploy.text.inputs import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, check_integer
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer
from gte_deploy.tuning import DEFAULT_SHAPES
from gte_deploy.tuning.calls import answer
from gte_deploy.tuning.lists import ListResult, best_for_lists, list_lengths, measure_lists
from gte_deploy.tuning.measure import Spread, Worker, WorkerError, interleaved

MAX_REPEATS = 10_000
_MOST_DRAWS = 20

# The words that a tokenizer encodes as one token are joined to texts of a given length.
_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all their there would when who will more no if out so what up into than them can only other "
    "new some time could these two may then do first any my now such like our over man me even most made after also "
    "year day world city water light king queen house river"
).split()


@dataclass(frozen=True)
class Shape:
    """A number of rows, and of tokens in each, special tokens included."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"

    @classmethod
    def parse(cls, text: str, *, max_length: int, min_length: int) -> "Shape":
        """Read ROWSxTOKENS, such as 8x128.

        Raises:
            InputError: the text has another form, or a number is out of the model's range.
        """
        rows, _, tokens = text.partition("x")
        if not (rows.isdecimal() and tokens.isdecimal() and len(text) < 20):
            raise InputError(f"shape {text!r} is not of the form ROWSxTOKENS, such as 8x128")
        return cls(
            rows=check_integer(f"the rows of shape {text}", int(rows), 1, MAX_BATCH_SIZE),
            tokens=check_integer(f"the tokens of shape {text}", int(tokens), min_length, max_length),
        )


@dataclass(frozen=True)
class EngineResult:
    """The measurements of one engine.

    Args:
        name: backend and precision, for people.
        backend: the backend, as `gte_deploy.load` takes it.
        precision: the compute precision, as `gte_deploy.load` takes it; None for that of a bundle for GPUs.
        seconds: shape -> seconds of each timed call.
        first_answer_s: seconds from the start of a process to its first answer.
        peak_bytes: highest resident memory of its process over all calls.
        error: why the engine could not be measured, or None. The other fields are complete only with None.
        lists: the measurements of a list of texts, for each setting.
    """

    name: str
    backend: str
    precision: str | None = None
    seconds: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    first_answer_s: float | None = None
    peak_bytes: int | None = None
    error: str | None = None
    lists: Sequence[ListResult] = ()

    def spread(self, shape: str) -> Spread:
        """Median and quartiles of one shape."""
        return Spread.of(self.seconds[shape])


@dataclass(frozen=True)
class BenchReport:
    """Every engine's result on one bundle. `list_tokens` are the lengths of the texts of the list."""

    bundle: Path
    manifest: Manifest
    shapes: tuple[Shape, ...]
    num_threads: int
    engines: tuple[EngineResult, ...]
    date: str
    list_tokens: Sequence[int]

    @property
    def measured(self) -> list[EngineResult]:
        """The results of the engines that ran."""
        return [result for result in self.engines if result.error is None]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {
            "bundle": str(self.bundle),
            "precision": self.manifest.precision,
            "call": TASKS[self.manifest.spec.task].method,
            "date": self.date,
            "cpu": cpu_model(),
            "cpus": available_cpus(),
            "num_threads": self.num_threads,
            "versions": engine_versions(),
            "engines": [
                {
                    **dataclasses.asdict(result),
                    "shapes": {
                        str(shape): {
                            **dataclasses.asdict(result.spread(str(shape))),
                            "tokens_per_second": _tokens_per_second(result, shape),
                        }
                        for shape in self.shapes
                        if result.error is None
                    },
                }
                for result in self.engines
            ],
        }


def bench(
    bundle: Path,
    *,
    backend: str | None = None,
    shapes: Sequence[str] | None = None,
    repeats: int = 10,
    num_threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time a bundle with every engine, each in a fresh process, in turn.

    It calls the method that gives the answer of the bundle's task, such as `encode`, `predict` or `fill_mask` (with one
    mask in each text), without a prompt. It times batches of fixed shapes, and a list of texts of mixed lengths with
    one stream and with several.

    Args:
        bundle: the folder of the bundle.
        backend: "onnx", "openvino", "tensorrt" or "executorch"; None for every engine that the bundle is for.
        shapes: shapes as ROWSxTOKENS; by default the DEFAULT_SHAPES that the model takes.
        repeats: number of timed calls for each engine and shape.
        num_threads: CPU threads of each engine; by default every CPU that the process may use.
        progress: called with one line at every step; None for no call.

    Raises:
        InputError: an argument is out of range.
        BundleError: the bundle cannot be read.
        BackendError: no engine could run it.
    """
    report_step = progress or (lambda line: None)
    check_integer("repeats", repeats, 1, MAX_REPEATS)
    threads = available_cpus() if num_threads is None else check_integer("num_threads", num_threads, 1, MAX_THREADS)
    manifest = read_manifest(bundle)
    tokenizer = load_tokenizer(bundle)
    chosen = _shapes(shapes, manifest.spec.max_length, tokenizer.min_length)
    masked = manifest.spec.task == "fill-mask"
    texts = {str(shape): synthetic_texts(tokenizer, [shape.tokens] * shape.rows, masked=masked) for shape in chosen}
    results = _measure(bundle, _engines(manifest, backend), texts, repeats, threads, report_step)
    lengths = list_lengths(threads, low=tokenizer.min_length, high=manifest.spec.max_length)
    if not is_for_gpus(manifest):
        the_list = synthetic_texts(tokenizer, lengths, masked=masked)
        results = [
            dataclasses.replace(
                result,
                lists=measure_lists(
                    bundle,
                    (result.backend, result.precision),
                    the_list,
                    num_threads=threads,
                    repeats=repeats,
                    progress=report_step,
                ),
            )
            if result.error is None
            else result
            for result in results
        ]
    report = BenchReport(
        bundle=bundle,
        manifest=manifest,
        shapes=tuple(chosen),
        num_threads=threads,
        engines=tuple(results),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        list_tokens=lengths,
    )
    if not report.measured:
        reasons = "; ".join(f"{result.name}: {result.error}" for result in results)
        raise BackendError(f"no engine here could run {bundle}: {reasons}")
    return report


def fastest(report: BenchReport, *, precision_may_change: bool = False) -> EngineResult:
    """The engine with the least time: the geometric mean over the shapes.

    Args:
        report: a report with at least one engine that ran.
        precision_may_change: allow engines that compute in a lower precision than the bundle's.

    Raises:
        BackendError: no engine ran in the bundle's own precision.
    """
    bf16_allowed = precision_may_change or may_run_in_bf16(report.manifest)
    allowed = [result for result in report.measured if result.precision != "bf16" or bf16_allowed]
    if not allowed:
        raise BackendError(
            f"no engine that ran computes in the bundle's own precision, {report.manifest.precision}. "
            "Allow others with --precision-may-change."
        )
    return min(allowed, key=lambda result: sum(math.log(result.spread(str(shape)).median) for shape in report.shapes))


def record(report: BenchReport, picked: EngineResult) -> Path:
    """Record the choice in the user's cache, where `gte_deploy.load` finds it; return the file.

    Raises:
        OSError: the cache cannot be written, or the user has no home folder.
    """
    pick = Pick(
        backend=picked.backend,
        precision=picked.precision,
        measured={
            result.name: {str(shape): result.spread(str(shape)).median for shape in report.shapes}
            for result in report.measured
        },
        date=report.date,
        versions=engine_versions(),
        lists=best_for_lists(picked.lists),
    )
    return save(report.manifest.to_json()["checksum"], pick)


def format_table(report: BenchReport) -> str:
    """The report for people: one line for each engine and shape, then one for each engine."""
    lines = [
        f"{report.bundle}, {report.manifest.precision}, {TASKS[report.manifest.spec.task].method}, "
        f"{report.num_threads} threads, {cpu_model()}",
        f"{'engine':<16} {'shape':>8} {'median ms':>10} {'quartiles':>19} {'least':>9} {'tokens/s':>10}",
    ]
    for shape in report.shapes:
        for result in report.measured:
            spread = result.spread(str(shape))
            quartiles = f"{spread.q1 * 1000:,.2f} – {spread.q3 * 1000:,.2f}"
            lines.append(
                f"{result.name:<16} {shape!s:>8} {spread.median * 1000:>10,.2f} {quartiles:>19} "
                f"{spread.least * 1000:>9,.2f} {_tokens_per_second(result, shape):>10,.0f}"
            )
    lines += _list_lines(report)
    lines.append(f"{'engine':<16} {'first answer s':>14} {'peak MB':>8}")
    for result in report.engines:
        if result.first_answer_s is None or result.peak_bytes is None or result.error is not None:
            lines.append(f"{result.name:<16} not measured: {result.error}")
        else:
            lines.append(f"{result.name:<16} {result.first_answer_s:>14.2f} {result.peak_bytes / 1e6:>8,.0f}")
    return "\n".join(lines)


def _list_lines(report: BenchReport) -> list[str]:
    """Lines for the settings of lists of each engine."""
    tokens = sum(report.list_tokens)
    lines = []
    for result in report.measured:
        for entry in result.lists:
            setting = f"{result.name:<16} {entry.setting.streams:>8} {entry.setting.batch_tokens:>12,}"
            if entry.error is not None:
                lines.append(f"{setting} not measured: {entry.error}")
                continue
            spread = entry.spread
            quartiles = f"{spread.q1 * 1000:,.2f} – {spread.q3 * 1000:,.2f}"
            lines.append(f"{setting} {spread.median * 1000:>10,.2f} {quartiles:>19} {tokens / spread.median:>10,.0f}")
    if not lines:
        return []
    columns = f"{'engine':<16} {'streams':>8} {'batch tokens':>12} {'median ms':>10} {'quartiles':>19} {'tokens/s':>10}"
    return [f"a list of {len(report.list_tokens)} texts of mixed lengths, {tokens:,} tokens", columns, *lines]


def synthetic_texts(
    tokenizer: TextTokenizer, lengths: Sequence[int], *, masked: bool = False, seed: int = 0
) -> list[str]:
    """Texts of common English words with exactly these lengths in tokens, special tokens included.

    They differ, unless a length has too few different ones. With `masked`, the last word of each is the mask token.

    Raises:
        InputError: a length is too short for the tokenizer, or the tokenizer splits every common word.
    """
    special = tokenizer.min_length - 1
    longest = max(lengths)
    if min(lengths) < tokenizer.min_length:
        raise InputError(f"a text has at least {tokenizer.min_length} tokens, not {min(lengths)}")
    whole = tokenizer.encode_texts(_WORDS, max_length=max(longest, 64), truncation=True)
    words = [word for word, row in zip(_WORDS, whole, strict=True) if len(row) == special + 1]
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    seen: set[str] = set()
    last = [tokenizer.mask_token] if masked and tokenizer.mask_token is not None else []

    def draw(length: int) -> str:
        return " ".join([*rng.choice(words, length - special - len(last)), *last])

    for length in lengths if words else ():
        text = draw(length)
        for _ in range(_MOST_DRAWS):  # equal texts of a call are computed once, so they should differ
            if text not in seen:
                break
            text = draw(length)
        texts.append(text)
        seen.add(text)
    found = [len(row) for row in tokenizer.encode_texts(texts, max_length=2 * longest, truncation=True)]
    if found != list(lengths):
        raise InputError(
            "this tokenizer encodes no common English word as one token, so the length of a text cannot be set"
        )
    return texts


class LoadedBundle:
    """The model in the process of an engine."""

    def __init__(self, bundle: Path, backend: str, precision: str | None, num_threads: int) -> None:
        from gte_deploy.loading import load

        options: dict[str, Any] = {} if precision is None else {"precision": precision}
        self._model = load(bundle, backend=backend, num_threads=num_threads, streams=1, **options)  # type: ignore[arg-type]

    def answer(self, texts: Sequence[str]) -> None:
        """Answer texts of one length, in one batch."""
        answer(self._model, texts, batch_size=len(texts), max_batch_tokens=MAX_BATCH_TOKENS)


def _engines(manifest: Manifest, backend: str | None) -> list[EngineResult]:
    """The engines to measure, without any numbers yet."""
    if backend is not None:
        check_choice("backend", backend, BUNDLE_BACKENDS)
    # A requested backend is tried even if the bundle has no graph for it: its error says what is missing.
    here: list[BundleBackend] = ["onnx", "openvino"]
    if manifest.plan is not None or "executorch" in manifest.graphs:
        here = ["executorch"] if manifest.plan is None else ["tensorrt"]
    names = [backend] if backend else here
    if is_for_gpus(manifest):
        return [EngineResult(f"{name} {manifest.precision}", name) for name in names]
    engines = [EngineResult(f"{name} {precision_of(manifest, 'fp32')}", name, "fp32") for name in names]
    if "openvino" in names and manifest.precision in ("fp32", "bf16", "int8"):
        engines.append(EngineResult(f"openvino {precision_of(manifest, 'bf16')}", "openvino", "bf16"))
    return engines


def _shapes(asked: Sequence[str] | None, max_length: int, min_length: int) -> list[Shape]:
    if asked is not None:
        return [Shape.parse(text, max_length=max_length, min_length=min_length) for text in dict.fromkeys(asked)]
    fitting = [text for text in DEFAULT_SHAPES if int(text.partition("x")[2]) <= max_length]
    shapes = fitting or [f"1x{max_length}"]
    return [Shape.parse(text, max_length=max_length, min_length=min_length) for text in shapes]


def _measure(
    bundle: Path,
    engines: Sequence[EngineResult],
    texts: Mapping[str, Sequence[str]],
    repeats: int,
    num_threads: int,
    progress: Callable[[str], None],
) -> list[EngineResult]:
    """Measure the engines: open each in its own process, then call them in turn."""
    workers: dict[str, Worker] = {}
    first_answers: dict[str, float] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        for result in engines:
            progress(f"{result.name}: load")
            started = time.perf_counter()
            arguments = (bundle, result.backend, result.precision, num_threads)
            try:
                worker = stack.enter_context(Worker(LoadedBundle, *arguments))
                worker.call("answer", next(iter(texts.values())))
            except WorkerError as error:
                errors[result.name] = str(error)
                continue
            workers[result.name] = worker
            first_answers[result.name] = time.perf_counter() - started
            seconds[result.name] = {}
        for shape, rows in texts.items():
            progress(f"{shape}: {repeats} rounds")
            calls = {name: _call(worker, rows) for name, worker in workers.items() if name not in errors}
            # One more round to warm up: the engine allocates memory and chooses kernels.
            found, failed = interleaved(calls, repeats=repeats + 1)
            errors |= failed
            for name in found:
                seconds[name][shape] = found[name][1:]
        peaks = {name: worker.peak_bytes for name, worker in workers.items()}
    return [
        dataclasses.replace(
            result,
            seconds=seconds.get(result.name, {}),
            first_answer_s=first_answers.get(result.name),
            peak_bytes=peaks.get(result.name),
            error=errors.get(result.name),
        )
        for result in engines
    ]


def _call(worker: Worker, texts: Sequence[str]) -> Callable[[], float]:
    return lambda: worker.call("answer", texts).seconds


def _tokens_per_second(result: EngineResult, shape: Shape) -> float:
    return shape.rows * shape.tokens / result.spread(str(shape)).median

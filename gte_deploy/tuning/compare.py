"""Puts two bundles side by side on the user's texts: answers, speed and size. `gte-deploy compare`."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.bundle.manifest import MANIFEST_NAME, Manifest, is_bundle, read_manifest
from gte_deploy.core.cpus import MAX_THREADS, available_cpus
from gte_deploy.core.errors import BackendError, BundleError, InputError
from gte_deploy.core.spec import TaskName
from gte_deploy.text.fingerprint import fingerprint
from gte_deploy.text.inputs import check_integer
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer
from gte_deploy.tuning.agreement import Agreement, Ground, agreement, answers_of, common_ground
from gte_deploy.tuning.bench import MAX_REPEATS
from gte_deploy.tuning.measure import Spread, Worker, WorkerError, interleaved
from gte_deploy.tuning.sample_texts import QUESTION, TEXTS

_LEAST_ROUNDS = 3
_BUDGET_S = 60.0
_SHOWN = 5  # the texts that the table for people names
_WIDEST_TEXT = 60
TITLES: Mapping[str, str] = {
    "cosine_mean": "mean cosine",
    "cosine_min": "smallest cosine",
    "rank_correlation": "rank correlation (Spearman)",
    "same_nearest_text": "same nearest text",
    "same_best_word": "same best word",
    "top5_overlap": "best five words in common",
    "top10_overlap": "ten heaviest tokens in common",
    "same_label": "same label",
    "same_best_document": "same best document",
    "score_difference_max": "largest difference of scores",
    "score_difference_mean": "mean difference of scores",
}
"""Measure of an agreement -> its name for people."""


@dataclass(frozen=True)
class Side:
    """One of the two bundles, and what was measured of it.

    Args:
        bundle: its folder.
        manifest: its manifest.
        size: bytes of all its files.
        engine: backend and precision that `load` takes here, such as "onnx int8".
        seconds: seconds of each timed call with all texts, after one that warms up.
        peak_bytes: highest resident memory of its process; 0 if the system does not report it.
    """

    bundle: Path
    manifest: Manifest
    size: int
    engine: str
    seconds: Sequence[float]
    peak_bytes: int

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the timed calls."""
        return Spread.of(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the side as plain JSON data."""
        return {
            "bundle": str(self.bundle),
            "model": self.manifest.source.get("name"),
            "task": self.manifest.spec.task,
            "precision": self.manifest.precision,
            "max_length": self.manifest.spec.max_length,
            "engine": self.engine,
            "bytes": self.size,
            "seconds": list(self.seconds),
            **{f"seconds_{name}": value for name, value in dataclasses.asdict(self.spread).items()},
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class ComparisonResult:
    """Two bundles side by side.

    Args:
        a: the first.
        b: the second.
        ground: what they were compared by.
        texts: the texts, or pairs of a query and a document.
        found: their agreement.
        notes: one sentence for each thing to know.
        num_threads: CPU threads of each.
        date: when it was measured.
    """

    a: Side
    b: Side
    ground: Ground
    texts: Sequence[Any]
    found: Agreement
    notes: Sequence[str]
    num_threads: int
    date: str

    def speed(self) -> str:
        """Return one sentence on the speed: no difference counts whose quartiles overlap."""
        a, b = self.a.spread, self.b.spread
        if a.q1 <= b.q3 and b.q1 <= a.q3:
            return "No clear difference in speed: the quartiles overlap."
        ratio = max(a.median, b.median) / min(a.median, b.median)
        faster, slower = ("B", "A") if b.median < a.median else ("A", "B")
        return f"{faster} is {ratio:.2f} times as fast as {slower}."

    def worst(self) -> list[int]:
        """Return the numbers of the texts, from 0, the least agreement first."""
        return sorted(range(len(self.texts)), key=lambda number: self.found.texts[number])

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "task": self.ground.task,
            "same_model": self.ground.same_model,
            "agreement": dict(self.found.measures),
            "texts": [
                {"text": text, "agreement": same, "a": a, "b": b}
                for text, same, (a, b) in zip(self.texts, self.found.texts, self.found.answers, strict=True)
            ],
            "speed": self.speed(),
            "notes": list(self.notes),
            "date": self.date,
            "cpu": cpu_model(),
            "cpus": available_cpus(),
            "num_threads": self.num_threads,
            "versions": engine_versions(),
        }


class Contestant:
    """A bundle in a process of its own, opened as `load` opens it by default."""

    def __init__(self, bundle: Path, num_threads: int) -> None:
        from gte_deploy.loading import load

        self._model = load(bundle, num_threads=num_threads)

    def engine(self) -> str:
        """Return the backend and what it computes in."""
        facts = self._model.info()
        return f"{facts['backend']} {facts['precision']}"

    def answers(self, task: TaskName, texts: Sequence[Any]) -> Any:
        """Return the answers; see `answers_of`."""
        return answers_of(self._model, task, texts)

    def run(self, task: TaskName, texts: Sequence[Any]) -> None:
        """Compute the answers, and return nothing."""
        answers_of(self._model, task, texts)


def compare_bundles(
    a: Path,
    b: Path,
    texts: Sequence[str] | None = None,
    *,
    repeats: int = 10,
    num_threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ComparisonResult:
    """Ask two bundles about the same texts, and time them in turn, each in a process of its own.

    Args:
        a: the folder of a bundle.
        b: the folder of another.
        texts: the texts; None for built-in ones. For fill-mask, a text without a mask gets one in place of a word. For
            a reranker, a text is a query, a tab and a document; without tabs, the first text is the query and the
            others are its documents.
        repeats: the most timed calls of each; fewer if they take long.
        num_threads: CPU threads of each; by default every CPU that the process may use.
        progress: called with one line at every step; None for no call.

    Raises:
        InputError: an argument is out of range, or the bundles have no answers in common.
        BundleError: a bundle cannot be read.
        BackendError: a bundle cannot run here; the message says which.
    """
    report = progress or (lambda line: None)
    check_integer("repeats", repeats, 1, MAX_REPEATS)
    threads = available_cpus() if num_threads is None else check_integer("num_threads", num_threads, 1, MAX_THREADS)
    if texts is not None and not texts:
        raise InputError("there are no texts to compare the bundles on; leave --input out for built-in ones")
    folders = (a, b)
    manifests = [_manifest(name, folder) for name, folder in zip("AB", folders, strict=True)]
    tokenizers = [load_tokenizer(folder) for folder in folders]
    same_tokenizer = len({fingerprint(*pair) for pair in zip(folders, tokenizers, strict=True)}) == 1
    ground = common_ground(*manifests, same_tokenizer=same_tokenizer)
    asked, notes = _asked(ground.task, manifests[0], tokenizers[0], texts)
    with ExitStack() as stack:
        workers = []
        for name, folder in zip("AB", folders, strict=True):
            report(f"{name}: load {folder}")
            try:
                workers.append(stack.enter_context(Worker(Contestant, folder, threads)))
            except WorkerError as error:
                raise BackendError(f"{name}, {folder}, does not run here: {error}") from error
        answers, engines = [], []
        for name, folder, worker in zip("AB", folders, workers, strict=True):
            report(f"{name}: answer {len(asked)} texts")
            try:
                engines.append(worker.call("engine").value)
                answers.append(worker.call("answers", ground.task, asked).value)
            except WorkerError as error:
                raise BackendError(f"{name}, {folder}, does not answer these texts: {error}") from error
        report(f"at most {repeats} rounds")
        calls = {name: _call(worker, ground.task, asked) for name, worker in zip("AB", workers, strict=True)}
        # One more round to warm up: the engine allocates memory and chooses kernels.
        seconds, failed = interleaved(calls, repeats=repeats + 1, at_least=_LEAST_ROUNDS, budget_s=_BUDGET_S)
        for name, message in failed.items():
            raise BackendError(f"{name} failed: {message}")
        first, second = (
            Side(folder, manifest, _size(folder, manifest), engine, seconds[name][1:], worker.peak_bytes)
            for name, folder, manifest, engine, worker in zip("AB", folders, manifests, engines, workers, strict=True)
        )
    return ComparisonResult(
        a=first,
        b=second,
        ground=ground,
        texts=asked,
        found=agreement(ground, *answers),
        notes=(*ground.notes, *notes),
        num_threads=threads,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def side_rows(result: ComparisonResult) -> list[tuple[str, str, str]]:
    """Return the rows of the table: a name, and the words for A and for B."""
    a, b = result.a, result.b
    number = len(result.texts)

    def row(name: str, value: Callable[[Side], str]) -> tuple[str, str, str]:
        return name, value(a), value(b)

    rows = [
        row("bundle", lambda side: str(side.bundle)),
        row("model", lambda side: str(side.manifest.source.get("name"))),
        row("task", lambda side: side.manifest.spec.task),
        row("precision", lambda side: side.manifest.precision),
        row("engine here", lambda side: side.engine),
        row("longest input", lambda side: f"{side.manifest.spec.max_length:,} tokens"),
        row("size on disk", lambda side: f"{side.size / 1e6:,.1f} MB"),
        row(f"median for {number} texts", lambda side: f"{side.spread.median * 1000:,.1f} ms"),
        row("quartiles", lambda side: f"{side.spread.q1 * 1000:,.1f} to {side.spread.q3 * 1000:,.1f} ms"),
        row("texts a second", lambda side: f"{number / side.spread.median:,.0f}"),
    ]
    if a.peak_bytes and b.peak_bytes:
        rows.append(row("highest memory", lambda side: f"{side.peak_bytes / 1e6:,.0f} MB"))
    return rows


def measure_rows(result: ComparisonResult) -> list[tuple[str, str]]:
    """Return the names and values of the measures of agreement, for people."""
    return [(_title(name), _value(name, value)) for name, value in result.found.measures.items()]


def format_comparison(result: ComparisonResult) -> str:
    """Format the comparison for a terminal."""
    rows = [("", "A", "B"), *side_rows(result)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {a:<{widths[1]}}  {b}".rstrip() for name, a, b in rows]
    lines += ["", result.speed(), f"Agreement on {len(result.texts)} texts:"]
    lines += [f"  {name}: {value}" for name, value in measure_rows(result)]
    differing = [number for number in result.worst() if len(set(result.found.answers[number])) == 2][:_SHOWN]
    if differing:
        lines.append("Answers that differ most:")
    for number in differing:
        a, b = result.found.answers[number]
        lines += [f"  {number + 1}. {_short(text_of(result.texts[number]))}", f"     A: {a}", f"     B: {b}"]
    return "\n".join([*lines, *result.notes])


def text_of(asked: Any) -> str:
    """Return a text, or a pair of texts, in one line."""
    return asked if isinstance(asked, str) else " | ".join(asked)


def _manifest(name: str, folder: Path) -> Manifest:
    if not is_bundle(folder):
        raise BundleError(f"{name}, {folder}, is not a bundle. Make one with: gte-export {folder}")
    return read_manifest(folder)


def _size(folder: Path, manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files.values()) + (folder / MANIFEST_NAME).stat().st_size


def _call(worker: Worker, task: TaskName, texts: Sequence[Any]) -> Callable[[], float]:
    return lambda: worker.call("run", task, texts).seconds


def _asked(
    task: TaskName, manifest: Manifest, tokenizer: TextTokenizer, texts: Sequence[str] | None
) -> tuple[list[Any], list[str]]:
    """Return what the bundles are asked, and notes on how it was made from the texts."""
    is_own = texts is None
    given = list(TEXTS if texts is None else texts)
    notes = ["The texts are built-in ones; --input FILE asks about yours."] if is_own else []
    if task == "classify" and manifest.spec.num_labels == 1:
        return _pairs([QUESTION, *given] if is_own else given), notes
    mask = tokenizer.mask_token
    if task == "fill-mask" and mask is not None:
        masked = [text if mask in text else _with_mask(text, mask) for text in given]
        changed = sum(mask not in text for text in given)
        if changed:
            notes.append(f"{changed} texts had no {mask}; it stands in place of a word in their middle.")
        return masked, notes
    return given, notes


def _pairs(lines: Sequence[str]) -> list[tuple[str, str]]:
    if any("\t" in line for line in lines):
        for number, line in enumerate(lines, 1):
            if line.count("\t") != 1:
                raise InputError(f"line {number} must be a query, one tab and a document, as other lines are")
        return [(line.split("\t")[0], line.split("\t")[1]) for line in lines]
    if len(lines) < 2:
        raise InputError("a reranker needs a query and at least one document: a line for each, the query first")
    return [(lines[0], document) for document in lines[1:]]


def _with_mask(text: str, mask: str) -> str:
    words = text.split(" ")
    place = len(words) // 2
    end = words[place][len(words[place].rstrip(".,;:!?")) :]
    return " ".join([*words[:place], f"{mask}{end}", *words[place + 1 :]])


def _title(name: str) -> str:
    for part in ("dense", "sparse"):
        if name.startswith(f"{part}_"):
            return f"{part}: {TITLES[name.removeprefix(f'{part}_')]}"
    return TITLES[name]


def _value(name: str, value: float) -> str:
    if name.startswith(("same_", "top")) or "_same_" in name or "_top" in name:
        return f"{value:.1%}"
    return f"{value:.6f}" if "cosine" in name else f"{value:.4f}"


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST_TEXT else f"{text[: _WIDEST_TEXT - 1]}…"

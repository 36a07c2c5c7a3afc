"""Measures the time of a call outside the engine: microseconds for each text, by stage.

    python benchmarks/overhead.py --bundle my-bundle            # some ten seconds for each workload
    python benchmarks/overhead.py --bundle one another --texts 600 --json

A clock around the functions of each stage counts the time in them, without that of other stages inside; the engine is
ONNX Runtime's `session.run`. The rest of a call is the stage "other". A thread tokenises later texts of a list while
the engine runs; its time is the stage "tokenize ahead", which is no part of the time outside the engine.

The workloads are those of a fill-mask bundle and of a classifier's: one short text or pair for each call, and a list of
different short texts. Numbers are medians over the calls, or over the quickest quarter of them (--quick-quarter): on a
shared machine they leave out what other processes took.

JSON and a table go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side.artefacts import result_file
from side_by_side.report import table

import gte_deploy
from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.files import write_text
from gte_deploy.tasks import classify, embed, fill_mask, interface
from gte_deploy.text.tokenization import TextTokenizer

STAGES = ("check", "tokenize", "batch", "engine", "answer", "assemble", "other", "tokenize ahead")
_NOT_OUTSIDE = ("engine", "tokenize ahead")
_TOKENS = (8, 24)
_WARM_UP = 20

Times = Counter[str]
"""Seconds of each stage."""


class Clock:
    """Adds up the seconds in each stage, for each thread apart; a stage inside another interrupts it."""

    def __init__(self) -> None:
        self.times: Times = Counter()
        self._caller = threading.get_ident()
        self._inside = threading.local()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the clock around it."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            name = stage if threading.get_ident() == self._caller else f"{stage} ahead"
            outer = getattr(self._inside, "seconds", 0.0)
            self._inside.seconds = 0.0
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - begin
                self.times[name] += whole - self._inside.seconds
                self._inside.seconds = outer + whole

        return measured


@contextmanager
def stages(clock: Clock) -> Iterator[None]:
    """A `with` block in which the functions of all stages are measured."""
    from gte_deploy import model
    from gte_deploy.backends import onnxruntime

    places: dict[str, list[tuple[Any, str]]] = {
        "check": [
            (interface, "as_texts"),
            (interface, "as_pairs"),
            (interface, "distinct"),
            (onnxruntime, "check_batch"),
            (model, "check_finite"),
        ],
        "tokenize": [(TextTokenizer, "encode_texts"), (TextTokenizer, "encode_pairs")],
        "batch": [(model, "collate")],
        "engine": [(onnxruntime.OnnxBackend, "_run")],
        "answer": [
            (embed.EmbeddingRequest, "answer"),
            (classify.ScoreRequest, "answer"),
            (fill_mask.MaskRequest, "answer"),
        ],
        "assemble": [(embed.EmbeddingRequest, "assemble"), (classify.ScoreRequest, "assemble")],
    }
    found = [(stage, owner, name, getattr(owner, name)) for stage, at in places.items() for owner, name in at]
    for stage, owner, name, function in found:
        setattr(owner, name, clock.timed(stage, function))
    try:
        yield
    finally:
        for _, owner, name, function in found:
            setattr(owner, name, function)


def measure(call: Callable[[], Any], texts: int, seconds: float, quick_quarter: bool) -> dict[str, float]:
    """Return microseconds for each text: of every stage, "total" and "outside"; and the number of "calls"."""
    clock = Clock()
    calls: list[Times] = []
    with stages(clock):
        for _ in range(_WARM_UP if texts == 1 else 1):
            call()
        end = time.perf_counter() + seconds
        while len(calls) < 3 or time.perf_counter() < end:
            clock.times.clear()
            begin = time.perf_counter()
            call()
            times = Counter({"total": time.perf_counter() - begin})
            times.update(clock.times)
            calls.append(times)
    for times in calls:
        times["other"] = times["total"] - sum(times[stage] for stage in STAGES if stage != "tokenize ahead")
        times["outside"] = times["total"] - times["engine"]
    kept = sorted(calls, key=lambda times: times["outside"])
    kept = kept[: max(1, len(kept) // 4)] if quick_quarter else kept
    names = (*STAGES, "total", "outside")
    return {
        "calls": len(calls),
        **{name: statistics.median(times[name] for times in kept) / texts * 1e6 for name in names},
    }


def short_texts(tokenizer: TextTokenizer, number: int, seed: int = 0) -> list[str]:
    """Different texts of 8 to 24 tokens, special tokens included."""
    from gte_deploy.tuning.bench import synthetic_texts

    lengths = np.random.default_rng(seed).integers(_TOKENS[0], _TOKENS[1], number, endpoint=True).tolist()
    return synthetic_texts(tokenizer, lengths, seed=seed)


def workloads(model: Any, number: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the name of each workload of a model -> a call, and the number of its texts."""
    texts = short_texts(model._tokenizer, number)
    if model.spec.task == "classify":
        pairs = list(zip([texts[0]] * number, texts[::-1], strict=True))
        return {
            "predict, one pair": (lambda: model.predict(pairs[1]), 1),
            f"predict, {number:,} pairs": (lambda: model.predict(pairs), number),
        }
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "encode, one text": (lambda: model.encode(texts[0]), 1),
        f"encode, {number:,} texts": (lambda: model.encode(texts), number),
    }
    if model.spec.task == "fill-mask":
        masked = [f"{text} {model._tokenizer.mask_token}" for text in texts]
        found |= {
            "fill_mask, one text": (lambda: model.fill_mask(masked[0]), 1),
            f"fill_mask, {number:,} texts": (lambda: model.fill_mask(masked), number),
        }
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line for each workload."""
    head = ["us a text", "outside", *STAGES]
    return table(head, [[row["workload"], *(f"{row[name]:,.1f}" for name in head[1:])] for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    rows: list[dict[str, Any]] = []
    for bundle in arguments.bundle:
        with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
            for name, (call, texts) in workloads(model, arguments.texts).items():
                found = measure(call, texts, arguments.seconds, arguments.quick_quarter)
                rows.append({"bundle": bundle.name, "task": model.spec.task, "workload": name, **found})
    report = {
        "benchmark": "overhead",
        "texts": arguments.texts,
        "tokens": _TOKENS,
        "threads": 1,
        "statistic": "median of the quickest quarter" if arguments.quick_quarter else "median",
        "hardware": {"cpu": cpu_model(), "cpus": available_cpus()},
        "versions": engine_versions(),
        "rows": rows,
    }
    text = json.dumps(report, indent=1) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, text)
    write_text(arguments.output.with_suffix(".md"), f"# Time outside the engine\n\n{summary(rows)}\n")
    print(text if arguments.json else f"{summary(rows)}\n{arguments.output}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, nargs="+", required=True, help="bundles to measure")
    parser.add_argument("--texts", type=int, default=2000, metavar="N", help="texts of a list (2000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each workload (5)")
    parser.add_argument("--quick-quarter", action="store_true", help="medians of the quickest quarter of calls alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, default=result_file("overhead", "json"), metavar="JSON")
    arguments = parser.parse_args(argv)
    if arguments.texts < 2 or arguments.seconds <= 0:
        parser.error("--texts must be at least 2, and --seconds positive")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

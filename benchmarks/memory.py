"""Measures the growth of resident memory over many calls of varying length, on every engine.

    python benchmarks/memory.py                              # base size, 10,000 calls an engine; half an hour
    python benchmarks/memory.py --bundle my-bundle --calls 2000

Each engine runs in a fresh process and embeds one text a call. Lengths follow a Pareto distribution: most are short,
some as long as --longest. "Grown" compares the mean of the last tenth of the calls with that of the second tenth; the
first tenth is for warming up. A CSV of resident megabytes and a chart go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side.artefacts import SUBJECTS, WORK, Artefacts, result_file
from side_by_side.report import table

from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.files import write_text, write_with
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer
from gte_deploy.tuning.bench import LoadedBundle, synthetic_texts
from gte_deploy.tuning.measure import Worker, WorkerError, resident_bytes

ENGINES = {"onnx": ("onnx", None), "openvino": ("openvino", None), "openvino bf16": ("openvino", "bf16")}
SEED = 0
_POINTS = 200
_SHORTEST = 4


class Soak(LoadedBundle):
    """An engine that reports its resident memory."""

    def resident(self, texts: Sequence[str]) -> int:
        """Return the resident bytes after one call for each text."""
        for text in texts:
            self.answer([text])
        return resident_bytes()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    bundle = arguments.bundle or _base_bundle(arguments)
    texts = soak_texts(load_tokenizer(bundle), arguments.calls, longest=arguments.longest)
    step = max(1, len(texts) // _POINTS)
    chunks = [texts[i : i + step] for i in range(0, len(texts), step)]
    curves, reasons = {}, {}
    for name in arguments.engines:
        try:
            curves[name] = _soak(name, bundle, chunks, arguments.threads)
        except WorkerError as error:
            reasons[name] = str(error)
            _say(f"{name}: {error}")
    if not curves:
        raise SystemExit(f"no engine ran: {reasons}")
    calls = np.cumsum([len(chunk) for chunk in chunks]).tolist()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, _csv(calls, curves))
    write_with(arguments.output.with_suffix(".png"), partial(_draw, calls, curves))
    print(
        f"{bundle}, {len(texts):,} calls, up to {arguments.longest} tokens, {arguments.threads} threads, {cpu_model()}"
    )
    print(", ".join(f"{name} {version}" for name, version in engine_versions().items()))
    print(summary(curves))
    return 0


def soak_texts(tokenizer: TextTokenizer, calls: int, *, longest: int) -> list[str]:
    """Make the text of each call; the first text has `longest` tokens."""
    lengths = np.random.default_rng(SEED).pareto(1.2, calls) * 8 + _SHORTEST
    lengths[0] = longest
    return synthetic_texts(tokenizer, np.minimum(lengths, longest).astype(int).tolist())


def summary(curves: dict[str, list[float]]) -> str:
    """Return a table of early, late and largest megabytes, and of the growth."""
    rows = []
    for name, values in curves.items():
        tenth = max(1, len(values) // 10)
        early, late = statistics.mean(values[tenth : 2 * tenth]), statistics.mean(values[-tenth:])
        rows.append([name, f"{early:,.0f}", f"{late:,.0f}", f"{max(values):,.0f}", f"{late / early - 1:+.1%}"])
    return table(["engine", "early MB", "late MB", "most MB", "grown"], rows)


def _soak(name: str, bundle: Path, chunks: Sequence[Sequence[str]], threads: int) -> list[float]:
    with Worker(Soak, bundle, *ENGINES[name], threads) as worker:
        values = []
        for number, chunk in enumerate(chunks, 1):
            values.append(worker.call("resident", chunk).value / 1e6)
            if number % 20 == 0:
                _say(f"{name}: {number} of {len(chunks)} parts, {values[-1]:,.0f} MB")
    return values


def _base_bundle(arguments: argparse.Namespace) -> Path:
    artefacts = Artefacts(arguments.work, SUBJECTS["base"], max_length=8192, progress=_say)
    return artefacts.path("bundle-fp32") / "bundle"


def _csv(calls: Sequence[int], curves: dict[str, list[float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["calls", *(f"{name} MB" for name in curves)])
    for number, values in zip(calls, zip(*curves.values(), strict=True), strict=True):
        writer.writerow([number, *(f"{value:.1f}" for value in values)])
    return text.getvalue()


def _draw(calls: Sequence[int], curves: dict[str, list[float]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(calls, values, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("calls of varying length")
    axes.set_ylabel("resident MB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(target, format="png", metadata={"Software": None})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: base size with random weights, made in the work folder")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--longest", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--work", type=Path, default=WORK, help="the work folder")
    parser.add_argument("--output", type=Path, default=result_file("memory", "csv"), metavar="CSV")
    arguments = parser.parse_args(argv)
    if arguments.calls < 2 or arguments.longest < _SHORTEST:
        parser.error(f"--calls must be 2 or more, and --longest {_SHORTEST} or more")
    return arguments


def _say(line: str) -> None:
    print(f"memory: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

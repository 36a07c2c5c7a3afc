"""Measures latency and throughput of a Triton server and of the runtime in this process, by number of callers.

    python benchmarks/serving.py                             # the built-in model; about six minutes
    python benchmarks/serving.py --subject base --callers 1 4 16 --seconds 30
    python benchmarks/serving.py --bundle my-bundle --lengths 16 512

The bundle is exported as a model repository and served by a real Triton on the same CPUs
(tests/support/triton_server.py). A stand-in for Triton's ONNX Runtime backend runs the same library behind Triton's
Python interface, so the measured overhead of Triton is a little too high. Every caller embeds one text a call, and
calls again as soon as it has the answer. All callers use the same texts, with lengths spread evenly on a logarithmic
scale over --lengths. For each number of callers, the three ways of calling take turns. Callers, client, server and
model share the CPUs.

JSON with every percentile and a chart go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from side_by_side.artefacts import ROOT, SUBJECTS, WORK, Artefacts, result_file
from side_by_side.report import table

import gte_deploy
from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import UnavailableError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.tuning.bench import synthetic_texts

SEED = 0
BACKEND = "a stand-in for Triton's ONNX Runtime backend: the onnxruntime wheel behind Triton's Python interface"
_TEXTS = 256
_ROUNDS = 3
_WARM_UP_S = 0.5
_PERCENTILES = (50, 90, 95, 99)
_COLOURS = {"in process": "#6b7280", "Triton gRPC": "#2563eb", "Triton HTTP": "#ea580c"}

Ask = Callable[[str], Any]


@dataclass(frozen=True)
class Call:
    """One call: its seconds, whether it was answered, and whether it ended within its turn."""

    seconds: float
    answered: bool
    in_time: bool


@dataclass(frozen=True)
class Load:
    """The result of one way of calling with one number of callers, over all turns.

    Args:
        way: "in process", "Triton gRPC" or "Triton HTTP".
        callers: number of callers at the same time.
        answers: number of answered calls.
        refused: number of calls that the busy server refused.
        texts_per_second: answers within the turns, divided by the turns' seconds.
        latency_ms: percentile -> milliseconds from call to answer.
    """

    way: str
    callers: int
    answers: int
    refused: int
    texts_per_second: float
    latency_ms: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    triton = server_module()
    triton.install()
    bundle = arguments.bundle or _bundle(arguments)
    texts = load_texts(bundle, *arguments.lengths)
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        server = stack.enter_context(triton.Server(_repository(bundle, arguments.work, threads=arguments.threads)))
        ways = open_ways(stack, server, bundle, arguments)
        _check_equal(ways, texts[:8])
        loads = [load for callers in arguments.callers for load in measure(ways, texts, callers, arguments.seconds)]
    report = {
        "benchmark": "serving",
        **_settings(bundle, arguments),
        "hardware": {
            "cpu": cpu_model(),
            "cpus": available_cpus(),
            "threads": arguments.threads,
            "load_average_before": load_before,
        },
        "versions": {**engine_versions(), "tritonserver": triton.VERSION, "tritonclient": _version("tritonclient")},
        "backend": BACKEND,
        "loads": [asdict(load) for load in loads],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    write_with(arguments.output.with_suffix(".png"), partial(draw, report, loads))
    print(summary(loads))
    print(f"gte_encoder runs on {BACKEND}.\n{arguments.output}")
    return 0


def server_module() -> ModuleType:
    """Import tests/support/triton_server.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("triton_server", ROOT / "tests" / "support" / "triton_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_texts(bundle: Path, shortest: int, longest: int) -> list[str]:
    """Make texts whose lengths are uniform on a logarithmic scale from `shortest` to `longest` tokens."""
    lengths = np.random.default_rng(SEED).uniform(np.log(shortest), np.log(longest), _TEXTS)
    return synthetic_texts(load_tokenizer(bundle), np.exp(lengths).round().astype(int).tolist(), seed=SEED)


def open_ways(stack: ExitStack, server: Any, bundle: Path, arguments: argparse.Namespace) -> dict[str, Ask]:
    """Return name -> function that embeds one text; clients have a connection for each caller."""
    from gte_deploy.triton import Client

    most = max(arguments.callers)
    local = stack.enter_context(gte_deploy.load(bundle, backend="onnx", num_threads=arguments.threads))
    grpc = stack.enter_context(Client(f"grpc://{server.grpc}", connections=most))
    http = stack.enter_context(Client(f"http://{server.http}", connections=most))
    return {"in process": local.encode, "Triton gRPC": grpc.encode, "Triton HTTP": http.encode}


def measure(ways: dict[str, Ask], texts: Sequence[str], callers: int, seconds: float) -> list[Load]:
    """Let `callers` callers call each way for `seconds` in all; the ways take several turns."""
    calls: dict[str, list[Call]] = {way: [] for way in ways}
    for ask in ways.values():
        _turn(ask, texts, callers, min(_WARM_UP_S, seconds / _ROUNDS))
    for _ in range(_ROUNDS):
        for way, ask in ways.items():
            calls[way] += _turn(ask, texts, callers, seconds / _ROUNDS)
    loads = [_load(way, callers, calls[way], seconds) for way in ways]
    for load in loads:
        _say(
            f"{load.callers} callers, {load.way}: "
            f"{load.texts_per_second:.1f} texts/s, median {load.latency_ms['p50']:.1f} ms"
        )
    return loads


def _turn(ask: Ask, texts: Sequence[str], callers: int, seconds: float) -> list[Call]:
    numbers = itertools.count()  # next() is atomic for threads
    begin = threading.Barrier(callers)

    def call() -> list[Call]:
        begin.wait()
        calls, end = [], time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            try:
                ask(texts[next(numbers) % len(texts)])
                answered = True
            except UnavailableError:
                answered = False
            finished = time.perf_counter()
            calls.append(Call(seconds=finished - started, answered=answered, in_time=finished <= end))
        return calls

    with ThreadPoolExecutor(callers) as pool:
        return [each for future in [pool.submit(call) for _ in range(callers)] for each in future.result()]


def _load(way: str, callers: int, calls: Sequence[Call], seconds: float) -> Load:
    answered = [call.seconds for call in calls if call.answered]
    if not answered:
        raise SystemExit(f"{way} answered none of {len(calls)} calls of {callers} callers")
    values = np.percentile(answered, _PERCENTILES) * 1e3
    return Load(
        way=way,
        callers=callers,
        answers=len(answered),
        refused=len(calls) - len(answered),
        texts_per_second=sum(call.answered and call.in_time for call in calls) / seconds,
        latency_ms={f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, values, strict=True)},
    )


def summary(loads: Sequence[Load]) -> str:
    """Return a table with a line for each way and number of callers."""
    head = ["way", "callers", "texts/s", *(f"p{percent} ms" for percent in _PERCENTILES), "answers", "refused"]
    rows = [
        [
            load.way,
            f"{load.callers}",
            f"{load.texts_per_second:,.1f}",
            *(f"{value:,.1f}" for value in load.latency_ms.values()),
            f"{load.answers:,}",
            f"{load.refused:,}",
        ]
        for load in loads
    ]
    return table(head, rows)


def draw(report: dict[str, Any], loads: Sequence[Load], target: Path) -> None:
    """Draw throughput, and latency at the median and the 99th percentile, by number of callers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for way, colour in _COLOURS.items():
        mine = [load for load in loads if load.way == way]
        callers = [load.callers for load in mine]
        left.plot(callers, [load.texts_per_second for load in mine], "o-", color=colour, label=way)
        right.plot(callers, [load.latency_ms["p50"] for load in mine], "o-", color=colour, label=f"{way}, median")
        right.plot(
            callers, [load.latency_ms["p99"] for load in mine], "^--", color=colour, label=f"{way}, p99", alpha=0.7
        )
    left.set_ylabel("texts per second")
    left.set_ylim(bottom=0)
    right.set_ylabel("milliseconds from call to answer")
    right.set_yscale("log")
    ticks = sorted({load.callers for load in loads})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("callers at the same time, one text a call")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
    hardware, (shortest, longest) = report["hardware"], report["lengths"]
    figure.suptitle(
        f"{report['bundle']}, {shortest} to {longest} tokens, {hardware['cpu']}, {hardware['cpus']} CPUs for all, "
        f"{report['date'][:10]}\ntritonserver {report['versions']['tritonserver']} with a stand-in for its ONNX "
        "Runtime backend",
        fontsize=9,
    )
    figure.savefig(target, format="png", metadata={"Software": None})


def _check_equal(ways: dict[str, Ask], texts: Sequence[str]) -> None:
    for way, ask in ways.items():
        for text in texts:
            difference = np.abs(ask(text) - ways["in process"](text)).max()
            if difference > 1e-5:
                raise SystemExit(f"{way} differs from the runtime by {difference:.1e}")


def _settings(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bundle": bundle.name if arguments.bundle else f"{arguments.subject}, fp32",
        "lengths": arguments.lengths,
        "seconds": arguments.seconds,
    }


def _bundle(arguments: argparse.Namespace) -> Path:
    artefacts = Artefacts(arguments.work, SUBJECTS[arguments.subject], max_length=8192, progress=_say)
    return artefacts.path("bundle-fp32") / "bundle"


def _repository(bundle: Path, work: Path, **options: Any) -> Path:
    from gte_deploy.exporters.triton.repository import export_repository

    target = work / "triton-repository"
    shutil.rmtree(target, ignore_errors=True)
    return Path(export_repository(bundle, target, **options).path)


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=("tiny", "base"), default="tiny", help="model, made in the work folder")
    parser.add_argument("--bundle", type=Path, help="a bundle in place of --subject")
    parser.add_argument("--callers", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each way and number of callers")
    parser.add_argument(
        "--lengths", nargs=2, type=int, default=[8, 128], metavar=("SHORTEST", "LONGEST"), help="tokens"
    )
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads of one run of the model")
    parser.add_argument("--work", type=Path, default=WORK, help="the work folder")
    parser.add_argument("--output", type=Path, default=result_file("serving", "json"), metavar="JSON")
    arguments = parser.parse_args(argv)
    if min(arguments.callers) < 1 or arguments.seconds <= 0 or arguments.threads < 1:
        parser.error("--callers, --seconds and --threads must be positive")
    return arguments


def _say(line: str) -> None:
    print(f"serving: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

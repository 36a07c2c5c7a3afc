"""Measures latency and throughput of servers and of the runtime in this process, by number of callers.

    python benchmarks/serving.py                             # the built-in model; about fifteen minutes
    python benchmarks/serving.py --subject base --callers 1 4 16 --seconds 30
    python benchmarks/serving.py --bundle my-bundle --lengths 16 512 --ways "in process" "gte-deploy serve"

Ways of calling, all on the same CPUs:

    in process              `encode` of a loaded model, in a thread for each caller
    joined calls            the same with `load(…, join_calls=True)`
    gte-deploy serve        our HTTP server, whose queue holds --queue-tokens
    Triton gRPC, HTTP       the bundle as a model repository, on a real Triton (tests/support/triton_server.py). A
                            stand-in for Triton's ONNX Runtime backend runs the same library behind Triton's Python
                            interface, so the measured overhead of Triton is a little too high.
    ST behind FastAPI       SentenceTransformer.encode on torch in a FastAPI app of a dozen lines
    infinity                infinity's HTTP server with its ONNX engine; needs `python tests/support/environments.py
                            infinity`

A way that is not installed is left out, and the report says why. Every caller embeds one text a call, and calls again
as soon as it has the answer. All callers use the same texts, with lengths spread evenly on a logarithmic scale over
--lengths. For each number of callers, the ways take turns.

Then texts arrive at random (Poisson), whether or not earlier ones are answered: at 80 % of a way's highest throughput,
and at twice that throughput, where a server has to refuse. Latencies count from the arrival. `lost` are requests that
were neither answered nor refused.

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
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from side_by_side.artefacts import ROOT, SUBJECTS, WORK, Artefacts, result_file
from side_by_side.environments import interpreter
from side_by_side.report import table

import gte_deploy
from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import UnavailableError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.tuning.bench import synthetic_texts
from gte_deploy.tuning.measure import WorkerError

SEED = 0
BACKEND = "a stand-in for Triton's ONNX Runtime backend: the onnxruntime wheel behind Triton's Python interface"
_TEXTS = 256
_ROUNDS = 3
_WARM_UP_S = 0.5
_PERCENTILES = (50, 90, 95, 99)
_COLOURS = {
    "in process": "#6b7280",
    "joined calls": "#111827",
    "gte-deploy serve": "#16a34a",
    "Triton gRPC": "#2563eb",
    "Triton HTTP": "#60a5fa",
    "ST behind FastAPI": "#ea580c",
    "infinity": "#a855f7",
}
_TRITON = ("Triton gRPC", "Triton HTTP")
_SHARES = (0.8, 2.0)
_MOST_WAITING = 2048
_START_S = 300.0
# Engines and FP32 sums differ in the last digits.
_TOLERANCE = 1e-4

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
        way: name of the way.
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


@dataclass(frozen=True)
class Arrivals:
    """The result of texts that arrive at random at a rate.

    Args:
        way: name of the way.
        share: rate as a share of the way's highest throughput.
        per_second: texts that arrive in a second.
        arrived: number of texts that arrived.
        answered: number of those that were answered.
        refused: number of those that the server refused.
        lost: number of all others.
        latency_ms: percentile -> milliseconds from arrival to answer.
        refusal_ms: percentile -> milliseconds from arrival to refusal; empty if none was refused.
    """

    way: str
    share: float
    per_second: float
    arrived: int
    answered: int
    refused: int
    lost: int
    latency_ms: dict[str, float]
    refusal_ms: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    triton = server_module()
    bundle = arguments.bundle or _bundle(arguments)
    texts = load_texts(bundle, *arguments.lengths)
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        ways, left_out = open_ways(stack, triton, bundle, arguments)
        _check_equal(ways, texts[:8])
        loads = [load for callers in arguments.callers for load in measure(ways, texts, callers, arguments.seconds)]
        arrivals = [
            arrive(way, ways[way], texts, share, _best(loads, way), arguments.seconds)
            for share in _SHARES
            for way in ways
            if share <= 1 or way == "gte-deploy serve"
        ]
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
        "left_out": left_out,
        "loads": [asdict(load) for load in loads],
        "arrivals": [asdict(each) for each in arrivals],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    write_with(arguments.output.with_suffix(".png"), partial(draw, report, loads))
    print(summary(loads))
    print(summary_of_arrivals(arrivals))
    for way, reason in left_out.items():
        print(f"{way} was left out: {reason}")
    print(f"Triton's gte_encoder runs on {BACKEND}.\n{arguments.output}")
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


def open_ways(
    stack: ExitStack, triton: ModuleType, bundle: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Ask], dict[str, str]]:
    """Return name -> function that embeds one text, and name -> reason of the ways that cannot be had here."""
    ways: dict[str, Ask] = {}
    left_out: dict[str, str] = {}
    for way in arguments.ways:
        try:
            ways[way] = _open_way(way, stack, triton, bundle, arguments)
        except (triton.Unavailable, WorkerError, ModuleNotFoundError) as error:
            left_out[way] = str(error)
    return ways, left_out


def _open_way(way: str, stack: ExitStack, triton: ModuleType, bundle: Path, arguments: argparse.Namespace) -> Ask:
    from gte_deploy.triton import Client

    threads, most = arguments.threads, max(*arguments.callers, 64)
    if way in ("in process", "joined calls"):
        joins = way == "joined calls"
        return stack.enter_context(
            gte_deploy.load(bundle, backend="onnx", num_threads=threads, join_calls=joins)
        ).encode
    if way in _TRITON:
        triton.install()
        server = stack.enter_context(triton.Server(_repository(bundle, arguments.work, threads=threads)))
        address = f"grpc://{server.grpc}" if way == "Triton gRPC" else f"http://{server.http}"
        return stack.enter_context(Client(address, connections=most)).encode
    port = _free_port()
    if way == "gte-deploy serve":
        options = ("--backend", "onnx", "--threads", str(threads), "--access-log", "off")
        options += ("--max-queue-tokens", str(arguments.queue_tokens))
        command = [sys.executable, "-m", "gte_deploy", "serve", str(bundle), "--port", str(port), *options]
        return _http(stack, command, f"http://127.0.0.1:{port}/embed", lambda text: {"inputs": text}, most)
    if arguments.bundle:
        raise WorkerError("it needs a checkpoint, so it is measured with --subject only")
    artefacts = _artefacts(arguments)
    name, python, artefact = (
        ("infinity", interpreter("infinity"), "exported")
        if way == "infinity"
        else ("sentence_transformers", sys.executable, "checkpoint")
    )
    program = (
        f"from side_by_side.http_peers import {name}; {name}({str(artefacts.path(artefact))!r}, {port}, {threads})"
    )
    if way == "infinity":
        path, body = "embeddings", lambda text: {"model": ".", "input": [text]}
    else:
        path, body = "embed", lambda text: {"inputs": [text]}
    return _http(stack, [python, "-c", program], f"http://127.0.0.1:{port}/{path}", body, most)


def _http(stack: ExitStack, command: Sequence[Any], url: str, body: Callable[[str], Any], connections: int) -> Ask:
    """Start a server, wait until it answers, and return a function that asks it."""
    import urllib3

    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"})
    stack.callback(server.wait)
    stack.callback(server.terminate)
    pool = stack.enter_context(urllib3.PoolManager(maxsize=connections, retries=False, timeout=120))

    def ask(text: str) -> Any:
        answer = pool.request("POST", url, json=body(text))
        if answer.status in (429, 503):
            raise UnavailableError(f"{url} answers {answer.status}")
        if answer.status != 200:
            raise WorkerError(f"{url} answers {answer.status}: {answer.data[:200]!r}")
        found = answer.json()
        return np.asarray(found["data"][0]["embedding"] if "data" in found else found[0], np.float32)

    end = time.monotonic() + _START_S
    while True:
        try:
            ask("a text")
            return ask
        except (urllib3.exceptions.HTTPError, UnavailableError) as error:
            if server.poll() is not None or time.monotonic() > end:
                raise WorkerError(f"{command[0]} does not serve: {error}") from error
            time.sleep(0.2)


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return int(free.getsockname()[1])


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


def arrive(way: str, ask: Ask, texts: Sequence[str], share: float, best: float, seconds: float) -> Arrivals:
    """Ask for texts that arrive at random, `share * best` in a second, for `seconds`."""
    rate = share * best
    times = np.cumsum(np.random.default_rng(SEED).exponential(1 / rate, max(1, round(rate * seconds))))
    begin = time.perf_counter()

    def call(number: int) -> tuple[str, float]:
        try:
            ask(texts[number % len(texts)])
            outcome = "answered"
        except UnavailableError:
            outcome = "refused"
        except Exception as error:  # a lost request is a result, too
            _say(f"{way}: {error}")
            outcome = "lost"
        return outcome, time.perf_counter() - begin - times[number]

    with ThreadPoolExecutor(min(_MOST_WAITING, len(times))) as pool:
        futures = []
        for number, due in enumerate(times):
            time.sleep(max(0.0, begin + due - time.perf_counter()))
            futures.append(pool.submit(call, number))
        results = [future.result() for future in futures]
    found = {name: [late for outcome, late in results if outcome == name] for name in ("answered", "refused", "lost")}
    return Arrivals(
        way=way,
        share=share,
        per_second=rate,
        arrived=len(results),
        answered=len(found["answered"]),
        refused=len(found["refused"]),
        lost=len(found["lost"]),
        latency_ms=_percentiles(found["answered"]),
        refusal_ms=_percentiles(found["refused"]),
    )


def _best(loads: Sequence[Load], way: str) -> float:
    return max(load.texts_per_second for load in loads if load.way == way)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.percentile(seconds, _PERCENTILES) * 1e3
    return {f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, values, strict=True)}


def _load(way: str, callers: int, calls: Sequence[Call], seconds: float) -> Load:
    answered = [call.seconds for call in calls if call.answered]
    if not answered:
        raise SystemExit(f"{way} answered none of {len(calls)} calls of {callers} callers")
    return Load(
        way=way,
        callers=callers,
        answers=len(answered),
        refused=len(calls) - len(answered),
        texts_per_second=sum(call.answered and call.in_time for call in calls) / seconds,
        latency_ms=_percentiles(answered),
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


def summary_of_arrivals(arrivals: Sequence[Arrivals]) -> str:
    """Return a table with a line for each way and rate."""
    head = [
        "way",
        "of its best",
        "arrive/s",
        "p50 ms",
        "p99 ms",
        "arrived",
        "answered",
        "refused",
        "lost",
        "refusal p99",
    ]
    rows = [
        [
            each.way,
            f"{each.share:.0%}",
            f"{each.per_second:,.1f}",
            *(f"{each.latency_ms.get(name, float('nan')):,.1f}" for name in ("p50", "p99")),
            *(f"{count:,}" for count in (each.arrived, each.answered, each.refused, each.lost)),
            f"{each.refusal_ms['p99']:,.1f}" if each.refusal_ms else "",
        ]
        for each in arrivals
    ]
    return table(head, rows)


def draw(report: dict[str, Any], loads: Sequence[Load], target: Path) -> None:
    """Draw throughput, and latency at the median and the 99th percentile, by number of callers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in dict.fromkeys(load.way for load in loads):
        colour = _COLOURS[way]
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
    first = next(iter(ways))
    for way, ask in ways.items():
        for text in texts:
            # Some servers normalize by default.
            here, there = (vector / np.linalg.norm(vector) for vector in (ways[first](text), ask(text)))
            if (difference := np.abs(there - here).max()) > _TOLERANCE:
                raise SystemExit(f"{way} differs from {first} by {difference:.1e}")


def _settings(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bundle": bundle.name if arguments.bundle else f"{arguments.subject}, fp32",
        "lengths": arguments.lengths,
        "seconds": arguments.seconds,
    }


def _bundle(arguments: argparse.Namespace) -> Path:
    return _artefacts(arguments).path("bundle-fp32") / "bundle"


def _artefacts(arguments: argparse.Namespace) -> Artefacts:
    return Artefacts(arguments.work, SUBJECTS[arguments.subject], max_length=8192, progress=_say)


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
    parser.add_argument("--ways", nargs="+", choices=tuple(_COLOURS), default=list(_COLOURS), metavar="WAY")
    parser.add_argument("--callers", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each way and number of callers")
    parser.add_argument(
        "--lengths", nargs=2, type=int, default=[8, 128], metavar=("SHORTEST", "LONGEST"), help="tokens"
    )
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads of one run of the model")
    parser.add_argument("--queue-tokens", type=int, default=2048, help="tokens that may wait in gte-deploy serve")
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

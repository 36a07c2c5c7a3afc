"""Measures single texts of many callers with and without `join_calls`, against one list of all texts.

    python benchmarks/joined_calls.py                            # base size, random weights; some five minutes
    python benchmarks/joined_calls.py --subject tiny --lengths 5 40 --threads 1

Every caller embeds one text a call, and calls again as soon as it has the answer. The texts have lengths spread evenly
over --lengths. The ways of calling take turns. "list" is one call of `encode` with all texts, the most that the engine
gives. CPU seconds are those of the process. On a machine with other work they say more than the clock, if --threads is
1: threads of one operator wait for each other in loops, the longer the less they are let run.

JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from side_by_side.artefacts import SUBJECTS, WORK, Artefacts, result_file
from side_by_side.report import table

import gte_deploy
from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.files import write_text
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.tuning.bench import synthetic_texts

Answered = tuple[int, float]
"""The tokens of the texts of a call, and its seconds."""


@dataclass
class Turns:
    """The turns of one way of calling.

    Args:
        way: "list", "alone" or "joined".
        callers: number of threads that call.
        tokens: tokens of the answered texts.
        seconds: by the clock.
        cpu_seconds: of the process.
        latencies_s: seconds of each call.
    """

    way: str
    callers: int
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.tokens / self.cpu_seconds

    def add(self, run: Callable[[], Sequence[Answered]]) -> None:
        """Add a turn."""
        began, cpu = time.perf_counter(), time.process_time()
        answered = run()
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu
        self.tokens += sum(tokens for tokens, _ in answered)
        self.latencies_s += [latency for _, latency in answered]


def one_by_one(model: gte_deploy.Model, texts: Mapping[str, int], callers: int, seconds: float) -> list[Answered]:
    """Let callers embed single texts for so long; `texts` have their numbers of tokens."""
    following, end = itertools.cycle(texts.items()), time.perf_counter() + seconds

    def caller() -> list[Answered]:
        found = []
        while (began := time.perf_counter()) < end:
            text, tokens = next(following)
            model.encode(text)
            found.append((tokens, time.perf_counter() - began))
        return found

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(caller) for _ in range(callers)]
        return [answered for future in futures for answered in future.result()]


def as_list(model: gte_deploy.Model, texts: Mapping[str, int]) -> list[Answered]:
    """Embed all texts in one call."""
    began = time.perf_counter()
    model.encode(list(texts))
    return [(sum(texts.values()), time.perf_counter() - began)]


def measure(bundle: Path, texts: Mapping[str, int], arguments: argparse.Namespace) -> list[Turns]:
    """Run all ways in turns."""
    options = {"backend": arguments.backend, "num_threads": arguments.threads}
    with ExitStack() as stack:
        alone = stack.enter_context(gte_deploy.load(bundle, **options))
        joined = stack.enter_context(gte_deploy.load(bundle, join_calls=True, **options))
        models = {"alone": alone, "joined": joined}
        found = [Turns("list", 1), *(Turns(way, count) for count in arguments.callers for way in models)]
        for model in models.values():
            one_by_one(model, texts, max(arguments.callers), 1.0)
        for _ in range(arguments.rounds):
            for turns in found:
                if turns.way == "list":
                    turns.add(partial(as_list, alone, texts))
                else:
                    turns.add(partial(one_by_one, models[turns.way], texts, turns.callers, arguments.seconds))
        return found


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="base", help="(default: base)")
    parser.add_argument("--bundle", type=Path, help="a bundle in place of the subject's")
    parser.add_argument("--backend", default="onnx", help="(default: onnx)")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads (default: all)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--lengths", type=int, nargs=2, default=[5, 300], help="tokens of a text (default: 5 300)")
    parser.add_argument("--texts", type=int, default=96, help="different texts (default: 96)")
    parser.add_argument("--seconds", type=float, default=8, help="of each turn (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: 3)")
    arguments = parser.parse_args()
    bundle = arguments.bundle
    if bundle is None:
        bundle = (
            Artefacts(WORK, SUBJECTS[arguments.subject], max_length=512, progress=print).path("bundle-fp32") / "bundle"
        )
    shortest, longest = arguments.lengths
    lengths = np.linspace(shortest, longest, num=arguments.texts).astype(int)
    np.random.default_rng(0).shuffle(lengths)
    texts = dict(zip(synthetic_texts(load_tokenizer(bundle), lengths.tolist()), lengths.tolist(), strict=True))
    found = measure(bundle, texts, arguments)
    best, shares = found[0], (50, 95, 99)

    def percentiles(latencies: Sequence[float]) -> list[float]:
        return np.percentile(latencies, shares).tolist()

    lines = [
        [
            turns.way,
            str(turns.callers),
            f"{turns.tokens_per_s:.0f}",
            f"{turns.tokens_per_s / best.tokens_per_s:.2f}",
            f"{turns.tokens_per_cpu_s / best.tokens_per_cpu_s:.2f}",
            *(f"{latency * 1000:.0f}" for latency in percentiles(turns.latencies_s)),
        ]
        for turns in found
    ]
    print(table(["way", "callers", "tokens/s", "of list", "of list, by CPU time", "p50 ms", "p95 ms", "p99 ms"], lines))
    result = {
        "cpu": cpu_model(),
        "engines": engine_versions(),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "turns": [{**asdict(turns), "latencies_s": percentiles(turns.latencies_s)} for turns in found],
    }
    file = result_file(f"joined-calls-{arguments.subject}-{shortest}-to-{longest}", "json")
    write_text(file, json.dumps(result, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

"""Measures lists of texts on one stream and on several, with several sizes of batches; part of `gte-deploy bench`."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.backends.stream_plan import ListPick, usual_streams
from gte_deploy.core.cpus import numa_nodes
from gte_deploy.tuning.calls import answer
from gte_deploy.tuning.measure import Spread, Worker, WorkerError, interleaved

_BATCH_TOKENS = (1024, 512, 2048)
_LEAST_ROUNDS = 3
_BUDGET_S = 30.0
# A setting that gains less than the noise of a measurement is not worth a second engine.
_WORTH = 0.97
# Lengths as in a collection of sentences and paragraphs: the median is 30 tokens, and a sixth is longer than 67.
_MEDIAN_TOKENS, _SPREAD = 30, 0.8


@dataclass(frozen=True)
class ListResult:
    """The measurements of one setting for lists.

    Args:
        setting: streams, and most tokens of a batch.
        seconds: seconds of each timed call with the whole list.
        error: why it could not be measured, or None. `seconds` is complete only with None.
    """

    setting: ListPick
    seconds: Sequence[float] = ()
    error: str | None = None

    @property
    def spread(self) -> Spread:
        """Median and quartiles."""
        return Spread.of(self.seconds)


def list_lengths(threads: int, *, low: int, high: int) -> list[int]:
    """Lengths in tokens of the texts of the list: 64 texts, more for many threads, each from `low` to `high` tokens."""
    drawn = np.random.default_rng(0).normal(math.log(_MEDIAN_TOKENS), _SPREAD, 64 * max(1, threads // 8))
    return [int(length) for length in np.clip(np.exp(drawn), low, high)]


def best_for_lists(results: Sequence[ListResult]) -> ListPick | None:
    """The fastest setting, or the first one if no other is clearly faster; None if none was measured."""
    measured = [result for result in results if result.error is None]
    if not measured:
        return None
    best = min(measured, key=lambda result: result.spread.median)
    first = measured[0]
    return (first if best.spread.median > _WORTH * first.spread.median else best).setting


def measure_lists(
    bundle: Path,
    engine: tuple[str, str | None],
    texts: Sequence[str],
    *,
    num_threads: int,
    repeats: int,
    progress: Callable[[str], None],
) -> list[ListResult]:
    """Time a list with every setting: each number of streams in a process of its own, all in turn.

    Args:
        bundle: the folder of the bundle.
        engine: backend and compute precision, as `gte_deploy.load` takes them.
        texts: the list.
        num_threads: CPU threads of the model.
        repeats: the most timed calls; fewer if they take long.
        progress: called with one line at every step.
    """
    usual = usual_streams(num_threads, numa_nodes())
    settings = [
        ListPick(streams, tokens) for streams in sorted({1, max(1, usual // 2), usual}) for tokens in _BATCH_TOKENS
    ]
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[int, Worker] = {}
        calls: dict[str, Callable[[], float]] = {}
        for setting in settings:
            if setting.streams not in workers:
                progress(f"lists on {engine[0]}: load with {setting.streams} streams")
                arguments = (bundle, *engine, num_threads, setting.streams)
                try:
                    workers[setting.streams] = stack.enter_context(Worker(LoadedForLists, *arguments))
                except WorkerError as error:
                    errors[str(setting)] = str(error)
                    continue
            calls[str(setting)] = _call(workers[setting.streams], texts, setting.batch_tokens)
        progress(f"lists on {engine[0]}: {len(texts)} texts, {len(calls)} settings, at most {repeats} rounds")
        # One more round to warm up: the engine of the streams opens, allocates memory and chooses kernels.
        found, failed = interleaved(calls, repeats=repeats + 1, at_least=_LEAST_ROUNDS, budget_s=_BUDGET_S)
    errors |= failed
    return [ListResult(one, found.get(str(one), [])[1:], errors.get(str(one))) for one in settings]


class LoadedForLists:
    """The model in the process of a number of streams."""

    def __init__(self, bundle: Path, backend: str, precision: str | None, num_threads: int, streams: int) -> None:
        from gte_deploy.loading import load

        options: dict[str, Any] = {} if precision is None else {"precision": precision}
        options |= {"backend": backend, "num_threads": num_threads, "streams": streams}
        self._model = load(bundle, **options)

    def answer(self, texts: Sequence[str], max_batch_tokens: int) -> None:
        """Answer the list."""
        answer(self._model, texts, max_batch_tokens=max_batch_tokens)


def _call(worker: Worker, texts: Sequence[str], max_batch_tokens: int) -> Callable[[], float]:
    return lambda: worker.call("answer", texts, max_batch_tokens).seconds

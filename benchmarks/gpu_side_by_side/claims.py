"""Checks what the documents claim of the GPU engines, before anything is timed: the first minutes on a GPU decide it.

For each of our contestants: whether its answers are finite and near PyTorch at every length, how often a run in
simulated traffic needs no new context or CUDA graph, and how long the first run takes in a process that finds no
compiled kernels of an earlier one, and in a process that does.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from side_by_side.accuracy import cosines
from side_by_side.workloads import Job, heldout_job

from gpu_side_by_side.contestants import Contestant, GteDeploy
from gte_deploy.backends.base import Batch
from gte_deploy.text.tokenization import TextTokenizer
from gte_deploy.tuning.measure import Worker

Array = NDArray[np.float32]
Row = dict[str, Any]

LENGTHS = (1, 2, 17, 128, 512, 2048, 8192)
TRAFFIC_CALLS = 1000


class Checked(GteDeploy):
    """A model of ours that counts what its runs prepare. `cache` is the folder for what it keeps between processes."""

    def __init__(self, folder: Path, device: str, cache: Path, backend: str, **options: Any) -> None:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        started = time.perf_counter()
        super().__init__(folder, device, backend, **options)
        self._open_s = time.perf_counter() - started

    def first_run(self, job: Job) -> dict[str, float]:
        """Return the seconds of opening the model and of its first run."""
        started = time.perf_counter()
        self.embed(job)
        return {"open_s": self._open_s, "first_run_s": time.perf_counter() - started}

    def traffic(self, calls: int, longest: int) -> dict[str, float]:
        """Return counts of `calls` single texts of lognormal lengths, median 150, after as many that do not count.

        "hit_rate" and "replay_rate" are shares of the counted runs; {} for an engine that counts nothing.
        """
        counts: Callable[[], Mapping[str, int]] | None = getattr(self._model._backend, "counts", None)
        if counts is None:
            return {}
        rng = np.random.default_rng(0)
        lengths = np.clip(np.exp(rng.normal(np.log(150), 0.8, 2 * calls)).astype(int), 1, longest).tolist()
        for length in lengths[:calls]:
            self._run_text(length)
        before = counts()
        for length in lengths[calls:]:
            self._run_text(length)
        after = counts()
        runs, prepared, replays = (after[name] - before[name] for name in ("runs", "preparations", "replays"))
        return {"hit_rate": 1 - prepared / runs, "replay_rate": replays / runs, "contexts": after["contexts"]}

    def _run_text(self, length: int) -> None:
        ids = np.full((1, length), 100)
        self._model._backend.run(Batch(ids, np.ones_like(ids)), ("sentence_embedding",))


def jobs_of(tokenizer: TextTokenizer, longest: int) -> list[Job]:
    """Return held-out text of each of `LENGTHS`, up to `longest` tokens."""
    text = heldout_job(tokenizer, texts=32, longest=min(512, longest))
    ids = text.input_ids[text.attention_mask == 1]
    rows = [np.resize(ids, (1, length)) for length in LENGTHS if length <= longest]
    return [Job([], row, np.ones_like(row)) for row in rows]


def check(
    contestant: Contestant, folder: Path, device: str, jobs: Sequence[Job], expected: Sequence[Array], cache: Path
) -> Row:
    """Return the claims of one contestant as numbers, for [1, H] embeddings `expected` of each job.

    Raises:
        WorkerError: the contestant cannot be opened, or a run fails.
    """
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    options = dict(contestant.options)
    longest = max(job.input_ids.shape[1] for job in jobs)
    with Worker(open_checked, folder, device, cache, options) as worker:
        row: Row = {"cold": worker.call("first_run", jobs[-1]).value}
        answers = [worker.call("embed", job).value for job in jobs]
        row |= worker.call("traffic", TRAFFIC_CALLS, longest).value
    with Worker(open_checked, folder, device, cache, options) as worker:
        row["warm"] = worker.call("first_run", jobs[-1]).value
    row["finite"] = all(bool(np.isfinite(answer).all()) for answer in answers)
    if row["finite"]:
        row["cosine_min"] = min(cosines(*pair)["min"] for pair in zip(expected, answers, strict=True))
    row["kept_bytes"] = sum(file.stat().st_size for file in cache.rglob("*.cache"))
    return row


def open_checked(folder: Path, device: str, cache: Path, options: dict[str, Any]) -> Checked:
    """Open a contestant in its own process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    return Checked(folder, device, cache, **options)

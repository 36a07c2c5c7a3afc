"""Saves checkpoints in the background: training waits for the copy into CPU memory, and not for the disk.

A save copies the tensors that its rank writes. Then a thread writes them, syncs them, computes their sha256, and
renames the folder, while training goes on. There is one save at a time. A sharded run has such a thread on each rank;
rank 0 renames the folder after all of them have written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gte_deploy.core.errors import CheckpointError
from gte_deploy.training.distributed import World
from gte_deploy.training.state import CheckpointStore, Parts, TensorPart, TrainingState

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run, one at a time. As a context manager it ends with the last one written.

    Args:
        store: the folder of the checkpoints.
        world: the ranks of the run.
        sharded: each rank writes its own rows; otherwise rank 0 writes everything.
    """

    def __init__(self, store: CheckpointStore, world: World, *, sharded: bool = False) -> None:
        self._store, self._world = store, world
        self._shards = world.size if sharded else 1
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainingState, *, model: Parts, optimizer: Parts) -> Path:
        """Copy the tensors, and start to write them. A save that still runs is waited for. Every rank has to call it.

        Returns:
            The folder of the checkpoint, which is there after `wait`.

        Raises:
            BaseException: the error of the save before, of any class.
        """
        self.wait()
        started = time.monotonic()
        if self._world.is_main or self._shards > 1:
            copies = self._copy(model, "model"), self._copy(optimizer, "optimizer")
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
            blocked = time.monotonic() - started
            # A daemon: a second Ctrl-C ends the process at once. The half-written folder does not look complete.
            self._thread = threading.Thread(
                target=self._run, args=(state, *copies, blocked), name="checkpoint-writer", daemon=True
            )
            self._thread.start()
        return self._store.folder / state.folder_name

    def check(self) -> None:
        """Raise the error of a save that has failed; do not wait for one that still runs."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until this rank has written its part of the last save.

        Raises:
            BaseException: the error of that save, of any class.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):  # and not KeyboardInterrupt, which ends the process at once
            try:
                self.wait()
            except BaseException as another:  # of any class, as the thread met it; the first error is the one to raise
                logger.error("the last checkpoint was not written either: %s", another)

    def _copy(self, parts: Parts, kind: str) -> dict[str, TensorPart]:
        """Copy tensors into CPU memory that is kept for the next save, and pinned where a GPU copies into it."""
        copies = {}
        for name, part in parts.items():
            rows, key = part.rows, f"{kind}/{name}"
            if key not in self._copies or self._copies[key].shape != rows.shape:
                self._copies[key] = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
            self._copies[key].copy_(rows, non_blocking=True)
            copies[name] = TensorPart(self._copies[key], part.start, part.shape)
        return copies

    def _run(self, state: TrainingState, model: Parts, optimizer: Parts, blocked: float) -> None:
        started = time.monotonic()
        try:
            self._write(state, model, optimizer)
        except BaseException as error:  # of any class: the training thread raises it
            self._error = error
            return
        logger.info(
            "checkpoint %s: training waited %.2f s, and it was written in %.2f s",
            state.folder_name,
            blocked,
            time.monotonic() - started,
        )

    def _write(self, state: TrainingState, model: Parts, optimizer: Parts) -> None:
        store, shards = self._store, self._shards
        part: dict[str, Any] = {"shard": self._world.rank if shards > 1 else 0, "shards": shards}
        try:
            self._together(lambda: store.begin(state), main=True)
            self._together(lambda: store.write_part(state, model=model, optimizer=optimizer, **part))
            self._together(lambda: store.finish(state, shards=shards), main=True)
        except BaseException:
            if self._world.is_main:
                store.abandon(state)
            raise

    def _together(self, action: Callable[[], object], *, main: bool = False) -> None:
        """Do one part of a save on all ranks, or on the main process alone; it fails on all if it fails on any."""
        error = None
        if self._world.is_main or not main:
            try:
                action()
            except BaseException as caught:  # of any class: the other ranks wait for this one's word
                error = caught
        failed = self._world.any(error is not None, group=self._world.saves) if self._shards > 1 else error is not None
        if error is not None:
            raise error
        if failed:
            raise CheckpointError("another rank could not write its part of the checkpoint; its log says why")

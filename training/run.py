"""The state that the stages of a run share: totals, log, meter and checkpoints; and the signal that stops the run."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GteConfig

from gte_deploy._version import __version__
from gte_deploy.core.errors import NonFiniteError
from gte_deploy.core.files import sha256_file
from gte_deploy.training.data.corpus import INDEX_FILE, TokenCorpus
from gte_deploy.training.distributed import World, named_parameters, optimizer_tensors, whole_tensor
from gte_deploy.training.flops import training_flops
from gte_deploy.training.log import Meter, RunLog, StepRecord
from gte_deploy.training.optim import learning_rate
from gte_deploy.training.recipe import Recipe, Stage, recipe_to_dict
from gte_deploy.training.state import Checkpoint, CheckpointStore, TrainingState


class StopSignal:
    """Takes SIGTERM or SIGINT as a request to save and stop. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


@dataclass(frozen=True)
class StepSize:
    """The size of one optimizer step over all ranks.

    Args:
        masked_tokens: masked tokens of the step, at least 1.
        tokens: tokens of the step, without padding.
        squared_lengths: sum of the squared lengths of the sequences, which determines the cost of attention.
        micro_batches: the largest number of micro-batches that a rank has.
        stopping: True if a signal has asked any rank to stop.
    """

    masked_tokens: int
    tokens: int
    squared_lengths: int
    micro_batches: int
    stopping: bool


@dataclass
class Run:
    """A run: its settings, its progress, and its folders for logs and checkpoints."""

    recipe: Recipe
    corpus: TokenCorpus
    config: GteConfig
    world: World
    store: CheckpointStore
    meter: Meter
    log: RunLog | None = None
    saved: Path | None = None
    total_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _pending: list[tuple[StepRecord, Tensor, Tensor]] = field(default_factory=list)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over the totals of a checkpoint."""
        self.saved, state = checkpoint.path, checkpoint.state
        self.total_step, self.tokens, self.seconds = state.total_step, state.tokens, state.seconds

    def count(
        self, size: StepSize, loss: Tensor, norm: Tensor, *, stage: Stage, number: int, steps_done: int, rate: float
    ) -> None:
        """Count a step. Its loss stays on the device until `flush`, so that no step waits for it."""
        self.total_step += 1
        self.tokens += size.tokens
        flops = training_flops(
            self.config, tokens=size.tokens, squared_lengths=size.squared_lengths, masked=size.masked_tokens
        )
        self.meter.add(tokens=size.tokens, flops=flops)
        record = StepRecord(
            stage=stage.name,
            stage_index=number,
            step=steps_done,
            total_step=self.total_step,
            loss=math.nan,
            learning_rate=rate,
            gradient_norm=math.nan,
            tokens=size.tokens,
            masked_tokens=size.masked_tokens,
            total_tokens=self.tokens,
            tokens_per_second=math.nan,
            peak_share=None,
            seconds=math.nan,
        )
        self._pending.append((record, loss, norm))

    def flush(self, stage: Stage) -> None:
        """Fetch the losses of the steps since the last flush, and log them. Every rank has to call it.

        Raises:
            NonFiniteError: a loss or a gradient norm is NaN or infinite.
        """
        if not self._pending:
            return
        records, losses, norms = zip(*self._pending, strict=True)
        self._pending.clear()
        values = self.world.sum(torch.stack(losses)).tolist()
        gradient_norms = torch.stack(norms).tolist()
        speed, peak_share, seconds_per_step = self.meter.read()
        filled = []
        for record, loss, norm in zip(records, values, gradient_norms, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise NonFiniteError(
                    f"stage {record.stage} step {record.step}: loss {loss}, gradient norm {norm}. The checkpoint "
                    f"{self.saved} is older than that; lower the learning rate, or set clip_norm"
                )
            self.seconds += seconds_per_step
            filled.append(
                dataclasses.replace(
                    record,
                    loss=loss,
                    gradient_norm=norm,
                    tokens_per_second=speed,
                    peak_share=peak_share,
                    seconds=self.seconds,
                )
            )
        if self.log is not None:
            self.log.write(filled)
            left = (stage.steps - filled[-1].step) * seconds_per_step
            self.log.progress(filled[-1], stage_steps=stage.steps, seconds_left=left)

    def save(
        self, stage: Stage, module: nn.Module, optimizer: torch.optim.Optimizer, *, number: int, steps_done: int
    ) -> None:
        """Write a checkpoint: the main process writes it and the others wait. Every rank has to call it."""
        model = {name: whole_tensor(parameter) for name, parameter in named_parameters(module).items()}
        moments = optimizer_tensors(module, optimizer)
        state = TrainingState(
            stage=number,
            stage_name=stage.name,
            step=steps_done,
            stage_steps=stage.steps,
            total_step=self.total_step,
            tokens=self.tokens,
            seconds=self.seconds,
            seed=self.recipe.seed,
            learning_rate=learning_rate(stage, steps_done - 1),
            recipe=recipe_to_dict(self.recipe),
            model_config=self.config.to_dict(),
            corpus=corpus_fingerprint(self.corpus),
            versions={"gte-deploy": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        )
        self.saved = self.store.folder / state.folder_name
        if self.world.is_main:
            self.store.save(state, model=model, optimizer=moments)
        self.world.barrier()
        self.meter.read()  # the time of saving belongs to no step


def corpus_fingerprint(corpus: TokenCorpus) -> str:
    """Return the sha256 of the corpus's index, which holds the sha256 of every shard."""
    return sha256_file(corpus.folder / INDEX_FILE)

"""The state that the stages of a run share: totals, log, meter and checkpoints; and the signal that stops the run."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GteConfig

from gte_deploy._version import __version__
from gte_deploy.core.errors import NonFiniteError, SpikeError
from gte_deploy.training.alarms import SpikeDetector
from gte_deploy.training.data.corpus import TokenCorpus, corpus_fingerprint
from gte_deploy.training.distributed import World, named_parameters, optimizer_tensors, parts_to_save
from gte_deploy.training.evaluation.during_run import RunEvaluation
from gte_deploy.training.flops import training_flops
from gte_deploy.training.log import Meter, RunLog, StepRecord
from gte_deploy.training.optim import learning_rate
from gte_deploy.training.recipe import Recipe, Stage, recipe_to_dict
from gte_deploy.training.saving import Saver
from gte_deploy.training.state import Checkpoint, TrainingState

logger = logging.getLogger(__name__)


class StopRequested(Exception):  # noqa: N818 -- no error: a signal asked for it
    """Ends a step that has begun: a signal has asked some rank to stop. Every rank raises it at the same place."""


class StopSignal:
    """Takes SIGTERM, SIGHUP or SIGINT as a request to save and stop. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
                    self._previous.setdefault(number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()
        # In a thread: the signal may have interrupted a message that is being written, whose locks it still holds.
        threading.Thread(target=self._tell, name="signal-message").start()

    def _tell(self) -> None:
        logger.warning(
            "received %s: the run drops the step that it is in, writes the checkpoint of the step before, and ends; "
            "another signal ends it at once",
            self.received,
        )

    def raise_if_any(self, world: World) -> None:
        """Agree with the other ranks, all of which have to call this, whether to stop here.

        Raises:
            StopRequested: a signal has asked one of the ranks to stop.
        """
        if world.any(self.received is not None):
            raise StopRequested

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
    """

    masked_tokens: int
    tokens: int
    squared_lengths: int
    micro_batches: int


@dataclass
class Run:
    """A run: its settings, its progress, and its folders for logs and checkpoints.

    `saved` is the newest checkpoint. It may still be in work; `finish_saving` waits for it.
    """

    recipe: Recipe
    corpus: TokenCorpus
    config: GteConfig
    world: World
    saver: Saver
    meter: Meter
    spikes: SpikeDetector
    tables: Path
    evaluation: RunEvaluation | None = None
    log: RunLog | None = None
    saved: Path | None = None
    total_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interventions: list[Mapping[str, Any]] = field(default_factory=list)
    _pending: list[tuple[StepRecord, Tensor, Tensor]] = field(default_factory=list)

    @property
    def corpora(self) -> list[TokenCorpus]:
        """The corpus, and that of the held-out text if there is one."""
        return [self.corpus] if self.evaluation is None else [self.corpus, self.evaluation.corpus]

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over the totals of a checkpoint."""
        self.saved, state = checkpoint.path, checkpoint.state
        self.total_step, self.tokens, self.seconds = state.total_step, state.tokens, state.seconds
        self.interventions = list(state.interventions)
        self.spikes = SpikeDetector(self.recipe.alarms, state.recent)

    def log_interventions(self) -> None:
        """Log the changes of the run that its log does not have yet."""
        assert self.log is not None  # the main process alone calls this
        known = self.log.events("change")
        for entry in self.interventions:
            if dict(entry) not in known:
                facts = {key: value for key, value in entry.items() if key != "total_step"}
                self.log.write_event("change", total_step=entry["total_step"], facts=facts)

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

    def skip(self, stage: Stage, *, steps_done: int) -> None:
        """Count a step whose batch is not trained on."""
        self.total_step += 1
        logger.info("stage %s step %d is skipped, as the recipe says", stage.name, steps_done)

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
        filled, failure = [], None
        for record, loss, norm in zip(records, values, gradient_norms, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                failure = f"stage {record.stage} step {record.step}: loss {loss}, gradient norm {norm}."
                break
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
        if self.log is not None and filled:
            self.log.write(filled)
            left = (stage.steps - filled[-1].step) * seconds_per_step
            self.log.progress(filled[-1], stage_steps=stage.steps, seconds_left=left)
        self._raise_alarms(filled)
        if failure is not None:
            raise NonFiniteError(failure, advice=self._advice(records[len(filled)]))

    def _raise_alarms(self, records: list[StepRecord]) -> None:
        for record in records:
            for alarm in self.spikes.judge(loss=record.loss, gradient_norm=record.gradient_norm):
                facts = {"stage": record.stage, "step": record.step, **asdict(alarm)}
                if self.log is not None:
                    self.log.write_event("alarm", total_step=record.total_step, facts=facts)
                message = f"stage {record.stage} step {record.step}: {alarm}."
                if self.recipe.alarms.action == "stop":
                    raise SpikeError(message, advice=self._advice(record))
                logger.warning("%s If the run does not recover: %s", message, self._advice(record))

    def _advice(self, record: StepRecord) -> str:
        """What to do about a step that went wrong."""
        self.saver.wait()
        stage, first = f"stages.{record.stage_index}", max(1, record.step - 9)
        return (
            f"The newest checkpoint is {self.saved}. To go on from it in another way, repeat the command with "
            f"--change {stage}.optimizer.clip_norm=1, --change {stage}.learning_rate=RATE, or "
            f"--change '{stage}.skip_steps=[[{first}, {record.step}]]'; --from CHECKPOINT goes on from an older one."
        )

    def evaluation_is_due(self, stage: Stage, steps_done: int) -> bool:
        """Whether the model is evaluated on held-out text after this step."""
        return self.evaluation is not None and self.evaluation.is_due(stage, steps_done)

    def evaluate(self, stage: Stage, module: nn.Module, *, steps_done: int) -> None:
        """Evaluate the model on held-out text, and log the scores. Every rank has to call it, after `flush`.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        assert self.evaluation is not None  # as evaluation_is_due said
        scores = self.evaluation.scores(module, stage)
        if self.log is not None:
            self.log.write_evaluation(stage=stage.name, step=steps_done, total_step=self.total_step, scores=scores)
        self.meter.read()  # the time of an evaluation belongs to no step

    def save(
        self, stage: Stage, module: nn.Module, optimizer: torch.optim.Optimizer, *, number: int, steps_done: int
    ) -> None:
        """Begin to write a checkpoint, unless it is there already. Every rank has to call it."""
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
            interventions=self.interventions,
            recent=self.spikes.recent(),
        )
        if self.saved is not None and self.saved.name == state.folder_name:
            return
        model = parts_to_save(named_parameters(module), self.world)
        moments = parts_to_save(optimizer_tensors(module, optimizer), self.world)
        self.saved = self.saver.save(state, model=model, optimizer=moments)
        self.meter.read()  # the time of saving belongs to no step

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is there, on every rank, each of which has to call this."""
        self.saver.wait()
        self.world.barrier()

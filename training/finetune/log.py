"""The log of a fine-tuning: a JSON line for every few steps, a progress line, and the stop at a signal or at NaN."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gte_deploy.core.errors import NonFiniteError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.training.figures import new_figure
from gte_deploy.training.log import LOG_FILE, PLOT_FILE, format_seconds, read_log
from gte_deploy.training.run import StopSignal

_FIELDS = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm", "eval_loss": "eval_loss"}


class RunCallback(TrainerCallback):
    """Writes log.jsonl, prints progress, and ends the training at a signal or at a loss that is not finite.

    A line of the log has step, epoch, loss (the mean since the line before), learning_rate, gradient_norm (before
    clipping) and seconds; or step, epoch and eval_loss.
    """

    def __init__(self, folder: Path, *, stop: StopSignal, progress: TextIO | None) -> None:
        self._path = folder / LOG_FILE
        self._stop, self._progress = stop, progress
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines after the checkpoint from which the run continues."""
        self._started, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            kept = [record for record in read_log(self._path) if record["step"] <= state.global_step]
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal came."""
        if self._stop.received is not None:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        logs = logs or {}
        found = {name: float(logs[key]) for key, name in _FIELDS.items() if key in logs}
        if "loss" not in found and "eval_loss" not in found:
            return  # the summary at the end
        bad = [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"step {state.global_step}: {', '.join(bad)}. Lower learning_rate, or raise loss.temperature"
            )
        if not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._started
        record = {"step": state.global_step, "epoch": state.epoch, **found, "seconds": round(seconds, 3)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._progress is not None and "loss" in found:
            left = (state.max_steps - state.global_step) * seconds / max(1, state.global_step - self._first_step)
            line = (
                f"step {state.global_step}/{state.max_steps}  loss {found['loss']:.4f}  ends in {format_seconds(left)}"
            )
            print(line, file=self._progress, flush=True)


def plot_finetuning(folder: Path) -> Path:
    """Plot the losses and the learning rate over the steps; return the path of the image.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    records = read_log(folder / LOG_FILE)
    figure = new_figure(9, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, name, label in ((above, "loss", "training"), (above, "eval_loss", "evaluation"), (below, _RATE, "")):
        chosen = [record for record in records if name in record]
        axes.plot([record["step"] for record in chosen], [record[name] for record in chosen], label=label)
    above.set_ylabel("loss")
    above.legend()
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path = folder / PLOT_FILE
    write_with(path, lambda aside: figure.savefig(aside, format="png", dpi=120))
    return path


_RATE = "learning_rate"

"""The log of a run: JSON lines, TensorBoard events, a progress line, and a plot.

A line of log.jsonl is one optimizer step, or an event between two steps. An event has a `kind`, and a step has none.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from gte_deploy.core.errors import MissingDependencyError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.training.evaluation.held_out import MaskedTokenScores
from gte_deploy.training.figures import new_figure

LOG_FILE = "log.jsonl"
PLOT_FILE = "training.png"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step: one line of the log.

    Args:
        stage: the stage's name.
        stage_index: its number, from 0.
        step: number of the step in the stage, from 1.
        total_step: number of the step over all stages, from 1.
        loss: mean over the masked tokens of the step, over all ranks, in nats.
        learning_rate: the learning rate of the step.
        gradient_norm: norm of the gradients before clipping.
        tokens: tokens of the step, without padding.
        masked_tokens: masked tokens of the step.
        total_tokens: tokens since the start of the run.
        tokens_per_second: mean speed since the previous flush of the log.
        peak_share: mean share of the devices' peak FLOP/s since the previous flush; None if the peak is unknown.
        seconds: time spent in training since the start of the run.
    """

    stage: str
    stage_index: int
    step: int
    total_step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    masked_tokens: int
    total_tokens: int
    tokens_per_second: float
    peak_share: float | None
    seconds: float


class RunLog:
    """Writes the records of a run. Only one process may do so. Use it as a context manager, or call `close`."""

    def __init__(self, folder: Path, *, progress: TextIO | None = None, tensorboard: bool = True) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._progress = progress
        self._rewrites = progress is not None and progress.isatty()
        self._tensorboard = tensorboard
        self._file: TextIO | None = None
        self._writer: Any = None

    def start(self, *, total_step: int) -> None:
        """Open the log of a run that has done `total_step` steps. Later records, left by a killed run, are dropped.

        Raises:
            MissingDependencyError: TensorBoard events are to be written, and tensorboard is not installed.
        """
        path = self.folder / LOG_FILE
        # A run that begins anew keeps nothing: an earlier try may have been evaluated before its first step.
        kept = [record for record in _read_lines(path) if 0 < total_step >= record["total_step"]]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        if self._tensorboard:
            self._writer = _summary_writer(self.folder / TENSORBOARD_FOLDER, purge_step=total_step + 1)

    def write(self, records: Iterable[StepRecord]) -> None:
        """Append records to the log and to the TensorBoard events."""
        assert self._file is not None  # start comes first
        for record in records:
            self._file.write(json.dumps(asdict(record)) + "\n")
            if self._writer is not None:
                for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_share"):
                    if (value := getattr(record, name)) is not None:
                        self._writer.add_scalar(name, value, record.total_step)
        self._file.flush()

    def write_event(self, kind: str, *, total_step: int, facts: Mapping[str, Any]) -> None:
        """Append what happened after `total_step` steps, such as a change of the recipe, and show it in TensorBoard.

        Args:
            kind: the kind of the event, see `read_log`.
            total_step: optimizer steps done in all stages.
            facts: what to tell, as JSON takes it.
        """
        assert self._file is not None  # start comes first
        self._file.write(json.dumps({"kind": kind, "total_step": total_step, **facts}) + "\n")
        self._file.flush()
        if self._writer is not None:
            self._writer.add_text(kind, json.dumps(facts), total_step)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind so far, each with its `total_step` and its facts."""
        found = read_log(self.folder / LOG_FILE, kind=kind)
        return [{key: value for key, value in event.items() if key != "kind"} for event in found]

    def write_evaluation(self, *, stage: str, step: int, total_step: int, scores: Sequence[MaskedTokenScores]) -> None:
        """Append the scores on held-out text after `total_step` steps: of all tokens first, and then by source."""
        facts = {"stage": stage, "step": step, "scores": [score.to_dict() for score in scores]}
        self.write_event("evaluation", total_step=total_step, facts=facts)
        if self._writer is not None:
            for score in scores:
                for name in ("loss", "top1", "top5"):
                    self._writer.add_scalar(f"held_out_{name}/{score.source}", getattr(score, name), total_step)
        if self._progress is not None:
            first, *sources = scores
            by_source = ", ".join(f"{score.source} {score.loss:.4f}" for score in sources)
            line = f"{stage} {step}  held-out loss {first.loss:.4f}  top-1 {first.top1:.1%}"
            start = "\r\x1b[K" if self._rewrites else ""
            self._progress.write(f"{start}{line}{by_source and f'  ({by_source})'}\n")
            self._progress.flush()

    def progress(self, record: StepRecord, *, stage_steps: int, seconds_left: float) -> None:
        """Show the progress line. On a terminal it replaces the line before."""
        if self._progress is None:
            return
        peak = "" if record.peak_share is None else f"  {record.peak_share:.0%} of peak"
        line = (
            f"{record.stage} {record.step}/{stage_steps}  loss {record.loss:.4f}  "
            f"{record.tokens_per_second:,.0f} tokens/s{peak}  stage ends in {format_seconds(seconds_left)}"
        )
        if self._rewrites:
            line = "\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        self._progress.write(line if self._rewrites and record.step < stage_steps else line + "\n")
        self._progress.flush()

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        for file in (self._file, self._writer):
            if file is not None:
                file.close()
        self._file = self._writer = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Meter:
    """Measures the speed since the last reading, from tokens, FLOPs and wall time."""

    def __init__(self, *, peak_flops: float | None) -> None:
        """Start to measure. `peak_flops` is the peak FLOP/s of all devices together, or None if it is unknown."""
        self._peak_flops = peak_flops
        self._started = time.monotonic()
        self._tokens = self._flops = 0.0
        self._steps = 0

    def add(self, *, tokens: int, flops: float) -> None:
        """Count one step."""
        self._tokens += tokens
        self._flops += flops
        self._steps += 1

    def read(self) -> tuple[float, float | None, float]:
        """Return tokens/s, share of the peak and seconds per step since the last reading; start a new measurement."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        share = None if self._peak_flops is None else self._flops / seconds / self._peak_flops
        result = self._tokens / seconds, share, seconds / max(1, self._steps)
        self._started, self._tokens, self._flops, self._steps = now, 0.0, 0.0, 0
        return result


def read_log(path: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the steps of a log, or its events of one kind, up to a line that a kill cut short."""
    return [record for record in _read_lines(path) if record.get("kind") == kind]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot_run(folder: Path) -> Path:
    """Plot loss, learning rate and speed over the steps, each stage as its own line; return the path of the image.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(9, 8)
    _draw(figure, folder / LOG_FILE)
    path = folder / PLOT_FILE
    write_with(path, lambda aside: figure.savefig(aside, format="png", dpi=120))
    return path


def _draw(figure: Any, log: Path) -> None:
    records = read_log(log)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, label) in zip(panels, _PANELS.items(), strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        for stage in dict.fromkeys(record["stage"] for record in records):
            mine = [record for record in records if record["stage"] == stage]
            axes.plot([record["total_step"] for record in mine], [record[name] for record in mine], label=stage)
    _plot_evaluations(panels[0], read_log(log, kind="evaluation"))
    panels[-1].set_xlabel("optimizer step")
    _draw_events(panels, log, losses={record["total_step"]: record["loss"] for record in records})
    if records:
        panels[0].legend()


def _draw_events(panels: Any, log: Path, *, losses: Mapping[int, float]) -> None:
    """Mark changes of the recipe with a line through all panels, and alarms with a cross on the loss."""
    for i, event in enumerate(read_log(log, kind="change")):
        for axes in panels:
            axes.axvline(event["total_step"], color="0.4", linestyle="--", label=None if i else "change")
    alarms = sorted({event["total_step"] for event in read_log(log, kind="alarm")} & set(losses))
    if alarms:
        panels[0].plot(alarms, [losses[step] for step in alarms], "x", color="red", label="alarm")


_PANELS = {
    "loss": "loss, nats per masked token",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
}


def _plot_evaluations(axes: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Plot the losses on held-out text with their standard errors, a line for all tokens and one for each source."""
    sources = dict.fromkeys(score["source"] for event in evaluations for score in event["scores"])
    for source in sources:
        points = [
            (event["total_step"], score["loss"], score["loss_error"] or 0.0)
            for event in evaluations
            for score in event["scores"]
            if score["source"] == source
        ]
        steps, losses, errors = zip(*points, strict=True)
        axes.errorbar(steps, losses, errors, marker="o", linestyle="--", capsize=2, label=f"held out: {source}")


def format_seconds(seconds: float) -> str:
    """Format a duration as days and a clock, as in "2d 03:04:05"; a number that is not finite is "unknown"."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def _summary_writer(folder: Path, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("tensorboard", "train") from error
    return SummaryWriter(str(folder), purge_step=purge_step)

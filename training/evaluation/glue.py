"""GLUE: fine-tune a checkpoint on the eight tasks and score it, by the protocol of the published averages.

Every family of the package goes through the same code, and so do all other encoders that transformers supports without
remote code; see `classifiers.py`. A finished task is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from gte_deploy.core.errors import CheckpointError, ConfigError, GteDeployError, InputError, NonFiniteError
from gte_deploy.core.files import read_json, read_json_object, sha256_file, write_text, write_with
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.stored_tensors import save_tensors
from gte_deploy.models.tokenizer import has_tokenizer
from gte_deploy.models.weight_files import weight_files
from gte_deploy.training.distributed import choose_device
from gte_deploy.training.evaluation.classifiers import (
    PretrainedEncoder,
    open_encoder,
    resolve_tokenizer_folder,
    run_without_padding,
    start_from,
)
from gte_deploy.training.evaluation.finetuning import Encoded, fine_tune, predict
from gte_deploy.training.evaluation.glue_tasks import (
    GLUE_TASKS,
    TaskDescription,
    load_split,
    tasks_in_order,
)
from gte_deploy.training.evaluation.plots import LOSSES_FILE, plot_losses, plot_scores
from gte_deploy.training.evaluation.published_glue import SYSTEMS, GlueSystem, system_of
from gte_deploy.training.options import GlueOptions, PaddingChoice, Protocol

logger = logging.getLogger(__name__)

RESULT_FILE = "glue.json"
GLUE_PLOT_FILE = "glue.png"
LOSSES_SUFFIX = ".losses.json"
SYSTEMS_FILE = "systems.json"


def glue(
    model: str,
    *,
    output: Path,
    options: GlueOptions = GlueOptions(),  # noqa: B008 - frozen
    protocol: Protocol = Protocol(),  # noqa: B008 - frozen
    progress: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model on each task with each seed, and write the file glue.json in `output`.

    Args:
        model: checkpoint folder, preset name or hub id.
        output: folder of the results. It holds one result per task and seed, which later calls do not compute again,
            and for each seed the MNLI checkpoint, from which RTE, MRPC and STS-B start.
        options: tasks, seeds, data, tokenizer, padding and device.
        protocol: how a task is fine-tuned; by default as published.
        progress: show progress bars on stderr.

    Returns:
        The content of glue.json: scores in percent by task and seed, and the averages; see `summarize`.

    Raises:
        CheckpointError: the model does not load strictly, or has no tokenizer.
        ConfigError: its config asks for something that is not supported, or padding is to be removed and cannot be.
        InputError: data are missing or wrong, or `output` holds results of another model or protocol.
        NonFiniteError: a fine-tuned model computes NaN.
    """
    encoder = open_checkpoint(model, system_of(model), tokenizer=options.tokenizer)
    return _evaluate(model, encoder, output=output, options=options, protocol=protocol, progress=progress)


def compare_systems(
    chosen: Mapping[str, str | None],
    *,
    output: Path,
    options: GlueOptions = GlueOptions(),  # noqa: B008 - frozen
    protocol: Protocol = Protocol(),  # noqa: B008 - frozen
    progress: bool = False,
) -> dict[str, Any]:
    """Run `glue` for several systems of the published table, and write the file systems.json in `output`.

    Every checkpoint is found and read before the first is fine-tuned. A system that then fails does not keep the others
    from running.

    Args:
        chosen: name of a system -> its checkpoint; None for none, so that the system is only listed. See
            `published_glue.choose_systems`.
        output: folder of the results, with a folder for each system.
        options: as in `glue`, without a tokenizer.
        protocol: as in `glue`.
        progress: show progress bars on stderr.

    Returns:
        The content of systems.json: for each system the published scores, and its own or the error that it ended with.

    Raises:
        CheckpointError: a checkpoint cannot be found, downloaded or read; the message names all of them.
        InputError: data are missing, or the options name a tokenizer.
    """
    if options.tokenizer is not None:
        raise InputError("a tokenizer is for one model; put its files into the folder of the system's checkpoint")
    encoders, problems = {}, []
    for name, checkpoint in chosen.items():
        try:
            if checkpoint is not None:
                encoders[name] = open_checkpoint(checkpoint, SYSTEMS[name])
        except GteDeployError as error:
            problems.append(f"{name} ({checkpoint}): {error}")
    if problems:
        raise CheckpointError("; ".join(problems))
    rows: list[dict[str, Any]] = [{**_system_row(name), "checkpoint": chosen[name]} for name in chosen]
    summary = {"protocol": dataclasses.asdict(protocol), "systems": rows}
    write_text(output / SYSTEMS_FILE, json.dumps(summary, indent=2) + "\n")
    for row in (row for row in rows if row["name"] in encoders):
        try:
            result = _evaluate(
                row["checkpoint"],
                encoders[row["name"]],
                output=output / row["name"],
                options=options,
                protocol=protocol,
                progress=progress,
            )
            row["scores"] = {task: score["mean"] for task, score in result["scores"].items()}
            row["average"] = result["average"]
        except InputError:  # of the data or the output folder: the next system would end in the same way
            raise
        except GteDeployError as error:
            logger.error("%s: %s", row["name"], error)
            row["error"] = str(error)
        write_text(output / SYSTEMS_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _system_row(name: str) -> dict[str, Any]:
    return {"name": name, "published": SYSTEMS[name].to_dict(), "scores": None, "average": None, "error": None}


def open_checkpoint(model: str, system: GlueSystem | None, *, tokenizer: str | None = None) -> PretrainedEncoder:
    """Find and read a checkpoint but its weights. A `tokenizer` replaces its own, that of the system a missing one."""
    folder = resolve_checkpoint(model)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no checkpoint")
    weight_files(folder)
    if tokenizer is None and system is not None and not has_tokenizer(folder):
        tokenizer = system.tokenizer
    return open_encoder(folder, tokenizer=None if tokenizer is None else resolve_tokenizer_folder(tokenizer))


def _evaluate(
    model: str,
    encoder: PretrainedEncoder,
    *,
    output: Path,
    options: GlueOptions,
    protocol: Protocol,
    progress: bool,
) -> dict[str, Any]:
    place = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if place.type == "cuda" else "float32")
    settings = {
        "model": model,
        "checkpoint": checkpoint_hash(encoder.folder),
        "data": "hub" if options.data is None else str(options.data.resolve()),
        "protocol": dataclasses.asdict(protocol),
        "dtype": dtype,
        **({} if options.tokenizer is None else {"tokenizer": options.tokenizer}),
    }
    is_packed = removes_padding(encoder, options.padding, is_fast=place.type == "cuda" and dtype == "bfloat16")
    ordered = tasks_in_order(options.tasks)
    results = []
    for seed in dict.fromkeys(options.seeds):
        trainer = _Trainer(
            encoder=encoder,
            output=output / f"seed-{seed}",
            data=options.data,
            protocol=protocol,
            seed=seed,
            device=place,
            is_packed=is_packed,
            settings=settings,
            progress=progress,
        )
        results += [trainer.result(task) for task in ordered]
    summary = {**settings, **summarize(results), "published": _published(model)}
    write_text(output / RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    _plot(summary, output)
    return summary


def _plot(summary: Mapping[str, Any], output: Path) -> None:
    """Plot the scores beside those that are published with the scores of the tasks, and the losses."""
    tasks = list(summary["scores"])
    rows: dict[str, list[float | None]] = {"this run": [summary["scores"][task]["mean"] for task in tasks]}
    shown = ("gte-en-mlm-base", "gte-en-mlm-large", "RoBERTa-base")
    names: list[str] = [summary["published"]["name"]] if summary["published"] else []
    for name in dict.fromkeys((*names, *shown)):
        if scores := SYSTEMS[name].scores:
            rows[f"{name} (published)"] = [scores.get(task) for task in tasks]
    plot_scores(output / GLUE_PLOT_FILE, [GLUE_TASKS[task].folder for task in tasks], rows)
    losses: dict[str, list[float]] = {}
    for result in summary["results"]:
        file = output / f"seed-{result['seed']}" / f"{result['task']}{LOSSES_SUFFIX}"
        values = read_json(file, error=InputError, advice="Remove the file.")
        losses |= {f"{GLUE_TASKS[result['task']].folder}, seed {result['seed']}": values} if values else {}
    if losses:
        plot_losses(output / LOSSES_FILE, losses)


def _published(model: str) -> dict[str, Any] | None:
    system = system_of(model)
    return None if system is None else system.to_dict()


def removes_padding(encoder: PretrainedEncoder, padding: PaddingChoice, *, is_fast: bool) -> bool:
    """Whether to fine-tune without padding: as the option says, or where attention has a kernel for it.

    Raises:
        ConfigError: padding is to be removed and the model needs it.
    """
    reason = encoder.keeps_padding_because()
    if padding == "remove" and reason is not None:
        raise ConfigError(f"{encoder.folder} cannot be fine-tuned without padding: {reason}. Leave --padding out.")
    return padding == "remove" or (padding == "auto" and is_fast and reason is None)


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores by task and seed, their means over the seeds, and the average of the eight tasks per seed.

    `average` is None unless all eight tasks were run: an average of fewer cannot be compared.
    """
    scores: dict[str, dict[int, float]] = {}
    for result in results:
        scores.setdefault(result["task"], {})[result["seed"]] = result["score"]
    seeds = list(dict.fromkeys(result["seed"] for result in results))
    averages = (
        {s: statistics.fmean(scores[t][s] for t in scores) for s in seeds} if len(scores) == len(GLUE_TASKS) else {}
    )
    return {
        "scores": {task: {"mean": statistics.fmean(by.values()), "by_seed": by} for task, by in scores.items()},
        "average": statistics.fmean(averages.values()) if averages else None,
        "average_by_seed": averages,
        "published_averages": {name: system.average for name, system in SYSTEMS.items()},
        "results": list(results),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Format the scores of one model beside the published ones for a person."""
    published = summary["published"] or {"average": None, "scores": None}
    rows = []
    for name, task in GLUE_TASKS.items():
        if name in summary["scores"]:
            score, theirs = summary["scores"][name], (published["scores"] or {}).get(name)
            rows.append((task.folder, task.metric, score["mean"], theirs, list(score["by_seed"].values())))
    if summary["average"] is not None:
        by_seed = list(summary["average_by_seed"].values())
        rows.append(("average", "of eight", summary["average"], published["average"], by_seed))
    lines = [f"{'task':<10} {'metric':<13} {'score':>6} {'published':>9}  by seed"]
    for label, metric, mean, theirs, by_seed in rows:
        spread = f"  (deviation {statistics.stdev(by_seed):.2f})" if len(by_seed) > 1 else ""
        seeds = " ".join(f"{x:.2f}" for x in by_seed)
        lines.append(f"{label:<10} {metric:<13} {mean:>6.2f} {_score(theirs):>9}  {seeds}{spread}")
    lines.append("")
    lines.append(f"{'published averages':<34} {'average':>7}")
    lines += [f"{name:<34} {average:>7.2f}" for name, average in summary["published_averages"].items()]
    ours = "needs all eight tasks" if summary["average"] is None else f"{summary['average']:>7.2f}"
    lines.append(f"{'this run: ' + str(summary['model'])[-24:]:<34} {ours}")
    return "\n".join(lines + _protocol_note(summary))


def systems_table(summary: Mapping[str, Any]) -> str:
    """Format the scores of several systems, each above its published ones, for a person."""
    tasks = GLUE_TASKS.values()
    lines = [f"{'system':<26}{'':<10}{''.join(f'{task.folder:>7}' for task in tasks)}{'average':>9}"]
    for row in summary["systems"]:
        ours, published = row["scores"], row["published"]
        if ours is None:
            reason = published["note"] if row["error"] is None else row["error"]
            lines.append(
                f"{row['name']:<26}{'this run':<10}  {'not run' if row['error'] is None else 'failed'}: {reason}"
            )
        else:
            lines.append(_system_line(row["name"], "this run", ours, row["average"]))
        lines.append(_system_line("", "published", published["scores"] or {}, published["average"]))
    return "\n".join(lines + _protocol_note(summary))


def _system_line(name: str, source: str, scores: Mapping[str, float], average: float | None) -> str:
    shown = "".join(f"{_score(scores.get(task)):>7}" for task in GLUE_TASKS)
    return f"{name:<26}{source:<10}{shown}{_score(average):>9}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _protocol_note(summary: Mapping[str, Any]) -> list[str]:
    if summary["protocol"] == dataclasses.asdict(Protocol()):
        return []
    return ["this run did not follow the published protocol: the averages do not compare"]


# --- one task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Trainer:
    """Runs the tasks of one seed; `output` receives the results of the seed."""

    encoder: PretrainedEncoder
    output: Path
    data: Path | None
    protocol: Protocol
    seed: int
    device: torch.device
    is_packed: bool
    settings: Mapping[str, Any]
    progress: bool

    def result(self, task: TaskDescription) -> dict[str, Any]:
        """Return the result of a task: from its file, if there is one, else from a fine-tuning."""
        file = self.output / f"{task.name}.json"
        if file.is_file():
            result = _read_result(file)
            self._require_same_settings(file, result)
            if task.is_start and not self._weights(task).is_file():
                raise InputError(f"{self._weights(task)} is missing; remove {file} to fine-tune the task again")
            logger.info("%s, seed %d: %.2f from %s", task.folder, self.seed, result["score"], file)
            return result
        self.output.mkdir(parents=True, exist_ok=True)
        result = self._run(task)
        write_text(file, json.dumps(result, indent=2) + "\n")
        logger.info("%s, seed %d: %s %.2f", task.folder, self.seed, task.metric, result["score"])
        return result

    def _run(self, task: TaskDescription) -> dict[str, Any]:
        started = time.monotonic()
        train, dev = (load_split(task, split, data=self.data) for split in ("train", "dev"))
        model: Any = self.encoder.classifier(num_labels=task.num_labels, seed=self.seed)
        if task.starts_from is not None:
            start_from(model, load_file(self._weights(GLUE_TASKS[task.starts_from])))
        if self.is_packed:
            run_without_padding(model)
        max_length = min(self.protocol.max_length, self.encoder.max_tokens or self.protocol.max_length)
        encode = partial(Encoded.of, encoder=self.encoder, max_length=max_length)
        bfloat16 = self.settings["dtype"] == "bfloat16"
        model.to(self.device)
        losses = fine_tune(
            model,
            encode(train),
            protocol=self.protocol,
            seed=self.seed,
            bfloat16=bfloat16,
            progress=f"{task.folder}, seed {self.seed}" if self.progress else None,
        )
        outputs = predict(model, encode(dev), bfloat16=bfloat16)
        if not np.isfinite(outputs).all():
            raise NonFiniteError(
                f"{task.folder}, seed {self.seed}: the fine-tuned model computes NaN; lower the learning rate"
            )
        write_text(self.output / f"{task.name}{LOSSES_SUFFIX}", json.dumps(losses) + "\n")
        predictions = outputs[:, 0] if task.is_regression else outputs.argmax(axis=1)
        if task.is_start:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
            write_with(self._weights(task), lambda aside: save_tensors(tensors, aside))
        return {
            "task": task.name,
            "seed": self.seed,
            "metric": task.metric,
            "score": task.score(predictions, dev.labels),
            "train_examples": len(train),
            "dev_examples": len(dev),
            "max_length": max_length,
            "padding": "removed" if self.is_packed else "kept",
            "seconds": round(time.monotonic() - started, 1),
            "settings": dict(self.settings),
        }

    def _weights(self, task: TaskDescription) -> Path:
        return self.output / f"{task.name}.safetensors"

    def _require_same_settings(self, file: Path, result: Mapping[str, Any]) -> None:
        before = result["settings"]
        keys = (self.settings.keys() | before.keys()) - {"model"}
        changed = sorted(key for key in keys if before.get(key) != self.settings.get(key))
        if changed:
            raise InputError(
                f"{file} was made with other settings ({', '.join(changed)}); use the same, or another output folder"
            )


def _read_result(file: Path) -> dict[str, Any]:
    result = read_json_object(file, error=InputError, advice="Remove the file.")
    try:
        return {**result, "score": float(result["score"]), "settings": dict(result["settings"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a result of this command ({error!r}); remove it") from error


def checkpoint_hash(folder: Path) -> str:
    """Return a text that changes with the weights and the config of a checkpoint."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return "+".join(sha256_file(file)[:16] for file in files)

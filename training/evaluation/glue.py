"""GLUE: fine-tune a checkpoint on the eight tasks and score it, by the protocol of the published averages.

GTE checkpoints in both layouts, and all other encoders that transformers supports without remote code (RoBERTa, XLM-R,
nomic-bert), go through the same code. A finished task is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GteForSequenceClassification,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)

from gte_deploy.core.errors import CheckpointError, InputError, NonFiniteError
from gte_deploy.core.files import read_json_object, sha256_file, write_text, write_with
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.reading import read_required_json
from gte_deploy.training.distributed import choose_device
from gte_deploy.training.evaluation.glue_tasks import (
    GLUE_TASKS,
    PUBLISHED_AVERAGES,
    Examples,
    TaskDescription,
    load_split,
    tasks_in_order,
)
from gte_deploy.training.options import GlueOptions, Protocol

logger = logging.getLogger(__name__)

RESULT_FILE = "glue.json"
_OUR_MODEL_TYPES = ("new", "gte")
_EVALUATION_BATCH = 128
_TOKENIZED_AT_ONCE = 10_000


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
        options: tasks, seeds, data and device.
        protocol: how a task is fine-tuned; by default as published.
        progress: show progress bars on stderr.

    Returns:
        The content of glue.json: scores in percent by task and seed, and the averages; see `summarize`.

    Raises:
        CheckpointError: the model does not load strictly, or has no tokenizer.json.
        InputError: data are missing or wrong, or `output` holds results of another model or protocol.
        NonFiniteError: a fine-tuned model computes NaN.
    """
    folder = resolve_checkpoint(model)
    place = choose_device(options.device)
    settings = {
        "model": model,
        "checkpoint": _checkpoint_hash(folder),
        "data": "hub" if options.data is None else str(options.data.resolve()),
        "protocol": dataclasses.asdict(protocol),
        "dtype": options.dtype or ("bfloat16" if place.type == "cuda" else "float32"),
    }
    ordered = tasks_in_order(options.tasks)
    results = []
    for seed in dict.fromkeys(options.seeds):
        trainer = _Trainer(folder, output / f"seed-{seed}", options.data, protocol, seed, place, settings, progress)
        results += [trainer.result(task) for task in ordered]
    summary = {**settings, **summarize(results)}
    write_text(output / RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


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
        "published_averages": PUBLISHED_AVERAGES,
        "results": list(results),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Format the scores and the published averages for a person."""
    rows = []
    for name, task in GLUE_TASKS.items():
        if name in summary["scores"]:
            score = summary["scores"][name]
            rows.append((task.folder, task.metric, score["mean"], list(score["by_seed"].values())))
    if summary["average"] is not None:
        rows.append(("average", "of eight", summary["average"], list(summary["average_by_seed"].values())))
    lines = [f"{'task':<10} {'metric':<13} {'score':>6}  by seed"]
    for label, metric, mean, by_seed in rows:
        spread = f"  (deviation {statistics.stdev(by_seed):.2f})" if len(by_seed) > 1 else ""
        lines.append(f"{label:<10} {metric:<13} {mean:>6.2f}  {' '.join(f'{x:.2f}' for x in by_seed)}{spread}")
    lines.append("")
    lines.append(f"{'published averages':<34} {'average':>7}")
    lines += [f"{name:<34} {average:>7.2f}" for name, average in summary["published_averages"].items()]
    ours = "needs all eight tasks" if summary["average"] is None else f"{summary['average']:>7.2f}"
    lines.append(f"{'this run: ' + str(summary['model'])[-24:]:<34} {ours}")
    if summary["protocol"] != dataclasses.asdict(Protocol()):
        lines.append("this run did not follow the published protocol: the averages do not compare")
    return "\n".join(lines)


# --- one task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trainer:
    """Runs the tasks of one seed. `folder` holds the checkpoint, `output` receives the results of the seed."""

    folder: Path
    output: Path
    data: Path | None
    protocol: Protocol
    seed: int
    device: torch.device
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
        model: Any = load_classifier(self.folder, num_labels=task.num_labels, seed=self.seed)
        if task.starts_from is not None:
            start_from(model, load_file(self._weights(GLUE_TASKS[task.starts_from])))
        encode = partial(Encoded.of, folder=self.folder, model=model, max_length=self.protocol.max_length)
        bfloat16 = self.settings["dtype"] == "bfloat16"
        model.to(self.device)
        fine_tune(
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
        predictions = outputs[:, 0] if task.is_regression else outputs.argmax(axis=1)
        if task.is_start:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
            write_with(self._weights(task), lambda aside: save_file(tensors, aside))
        return {
            "task": task.name,
            "seed": self.seed,
            "metric": task.metric,
            "score": task.score(predictions, dev.labels),
            "train_examples": len(train),
            "dev_examples": len(dev),
            "seconds": round(time.monotonic() - started, 1),
            "settings": dict(self.settings),
        }

    def _weights(self, task: TaskDescription) -> Path:
        return self.output / f"{task.name}.safetensors"

    def _require_same_settings(self, file: Path, result: Mapping[str, Any]) -> None:
        before = result["settings"]
        changed = [key for key, value in self.settings.items() if key != "model" and before.get(key) != value]
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


def _checkpoint_hash(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no checkpoint")
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return "+".join(sha256_file(file)[:16] for file in files)


# --- models ---------------------------------------------------------------------------------------------------------


def load_classifier(folder: Path, *, num_labels: int, seed: int) -> PreTrainedModel:
    """Load a sequence classifier, float32 on the CPU: the checkpoint's encoder with a new head.

    Every weight of the encoder comes from the checkpoint. Only the head, and a pooler if the checkpoint has none, are
    new; `seed` draws their weights.

    Raises:
        CheckpointError: the weights do not fit, or transformers does not support the architecture without remote code.
        ConfigError: the config of a GTE checkpoint asks for something that this package does not support.
    """
    torch.manual_seed(seed)
    if read_required_json(folder / "config.json").get("model_type") in _OUR_MODEL_TYPES:
        return _our_classifier(folder, num_labels)
    return _other_classifier(folder, num_labels)


def _our_classifier(folder: Path, num_labels: int) -> PreTrainedModel:
    encoder = load_model(folder, task="embed")
    config = encoder.config
    config.num_labels = num_labels
    model = GteForSequenceClassification._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    missing, unexpected = model.gte.load_state_dict(encoder.state_dict(), strict=False)
    left = [name for name in missing if not name.startswith("pooler.")] + unexpected
    if left:
        raise CheckpointError(f"{folder} does not fit GteForSequenceClassification; differing: {', '.join(left[:5])}")
    return model


def _other_classifier(folder: Path, num_labels: int) -> PreTrainedModel:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=num_labels,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:  # transformers raises these for files, configs and unknown architectures
        raise CheckpointError(
            f"transformers cannot load {folder} by itself as a sequence classifier ({error}). It needs a known "
            "model_type and safetensors weights; remote code is never run"
        ) from error
    # transformers only warns of weights that it initialized itself: the score of a half-loaded encoder would mislead.
    prefix = f"{model.base_model_prefix}."
    invented = [name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in f".{name}"]
    invented += [str(item) for item in info["mismatched_keys"]]
    if invented:
        raise CheckpointError(f"{folder} does not fill the encoder; missing: {', '.join(sorted(invented)[:5])}")
    return model


def start_from(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the weights of a classifier with another number of labels into `model`, whose last layer stays new.

    Raises:
        CheckpointError: the models differ in more than the layer that has a row per label.
    """
    own = model.state_dict()
    odd = sorted(own.keys() ^ tensors.keys())
    new = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    odd += [name for name in new if own[name].shape != (model.num_labels, *tensors[name].shape[1:])]
    if odd:
        raise CheckpointError(f"the checkpoint to start from does not fit; differing: {', '.join(odd[:5])}")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in new}, strict=False)


# --- examples as tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """N examples as token ids, laid end to end, because a list of small arrays would take ten times the memory.

    `type_ids` is None if the model has only one token type, or if the checkpoint's tokenizer returns no types.
    """

    input_ids: NDArray[np.int32]  # [T]
    type_ids: NDArray[np.int8] | None  # [T]
    ends: NDArray[np.int64]  # [N + 1]
    labels: NDArray  # [N] int64 or float32
    pad_id: int

    @classmethod
    def of(cls, examples: Examples, *, folder: Path, model: PreTrainedModel, max_length: int) -> Encoded:
        """Tokenize with the checkpoint's tokenizer.json. Of two texts the longer one is truncated first.

        Raises:
            CheckpointError: there is no tokenizer.json.
        """
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; write one with AutoTokenizer.save_pretrained")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, strategy="longest_first")
        # The runtime and transformers' own tokenizer will feed the fine-tuned model in the same way.
        has_types = getattr(model.config, "type_vocab_size", 0) > 1 and _tokenizer_gives_types(folder)
        ids, types, lengths = [], [], []
        for start in range(0, len(examples), _TOKENIZED_AT_ONCE):
            texts = examples.texts[start : start + _TOKENIZED_AT_ONCE]
            for encoding in tokenizer.encode_batch([text[0] if len(text) == 1 else text for text in texts]):
                ids.append(np.array(encoding.ids, dtype=np.int32))
                types.append(np.array(encoding.type_ids, dtype=np.int8))
                lengths.append(len(encoding.ids))
        return cls(
            input_ids=np.concatenate(ids),
            type_ids=np.concatenate(types) if has_types else None,
            ends=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            labels=examples.labels,
            pad_id=model.config.pad_token_id or 0,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, members: NDArray[np.int64], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's inputs [B, S], padded to the longest example of the batch, and the labels [B]."""
        starts, lengths = self.ends[members], self.ends[members + 1] - self.ends[members]
        places = np.arange(int(lengths.max()))
        mask = places < lengths[:, None]
        source = np.where(mask, starts[:, None] + places, 0)
        inputs = {
            "input_ids": np.where(mask, self.input_ids[source], self.pad_id).astype(np.int64),
            "attention_mask": mask.astype(np.int64),
        }
        if self.type_ids is not None:
            inputs["token_type_ids"] = np.where(mask, self.type_ids[source], 0).astype(np.int64)
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        return tensors, torch.from_numpy(self.labels[members]).to(device)


def _tokenizer_gives_types(folder: Path) -> bool:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot open the tokenizer of {folder} ({error}), which tells if pairs have token types. "
            "Name its class in tokenizer_config.json, such as BertTokenizer."
        ) from error
    return "token_type_ids" in tokenizer.model_input_names


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def fine_tune(
    model: PreTrainedModel,
    train: Encoded,
    *,
    protocol: Protocol,
    seed: int,
    bfloat16: bool = False,
    progress: str | None = None,
) -> None:
    """Fine-tune a model in place, on its device: AdamW, linear warm-up and decay, and a new order in each epoch."""
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay, fused=device.type == "cuda"
    )
    steps = protocol.epochs * math.ceil(len(train) / protocol.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(protocol.warmup_ratio * steps), steps)
    torch.manual_seed(seed)
    model.train()
    with tqdm(total=steps, desc=progress, disable=progress is None, file=sys.stderr, unit="step") as bar:
        for members in _order(len(train), protocol, seed):
            inputs, labels = train.batch(members, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(**inputs).logits.float()
            loss = _loss(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            if bar.n % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def predict(model: PreTrainedModel, data: Encoded, *, bfloat16: bool = False) -> NDArray[np.float32]:
    """Compute the classifier's outputs, [N, labels]. Examples of similar length share a batch."""
    model.eval()
    order = np.argsort(np.diff(data.ends), kind="stable")
    rows = []
    for start in range(0, len(order), _EVALUATION_BATCH):
        inputs, _ = data.batch(order[start : start + _EVALUATION_BATCH], model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            rows.append(model(**inputs).logits.float().cpu().numpy())
    outputs = np.concatenate(rows)
    back = np.empty_like(outputs)
    back[order] = outputs
    return back


def _order(size: int, protocol: Protocol, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    for _ in range(protocol.epochs):
        order = generator.permutation(size)
        yield from np.split(order, range(protocol.batch_size, size, protocol.batch_size))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of classes, or the mean squared error for the float labels of a regression."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)

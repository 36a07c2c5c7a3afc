"""XTREME-R: fine-tune a checkpoint in English, and score it in all languages of the ten tasks without further training.

The protocol is that of the published table, see `xtreme_tasks.py`. A model that several tasks need is fine-tuned once,
and a finished task is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from gte_deploy.core.errors import InputError, NonFiniteError
from gte_deploy.core.files import read_json_object, write_text, write_with
from gte_deploy.models.stored_tensors import save_tensors
from gte_deploy.training.distributed import choose_device
from gte_deploy.training.evaluation import xtreme_data as data_sets
from gte_deploy.training.evaluation.classifiers import PretrainedEncoder, run_without_padding
from gte_deploy.training.evaluation.finetuning import (
    BatchLoss,
    Encoded,
    TrainingRows,
    classification_loss,
    fine_tune,
    predict,
    predict_tokens,
)
from gte_deploy.training.evaluation.glue import checkpoint_hash, open_checkpoint, removes_padding
from gte_deploy.training.evaluation.glue_tasks import accuracy
from gte_deploy.training.evaluation.heads import (
    AnswerRows,
    ChoiceRows,
    DualEncoder,
    PairRows,
    TagRows,
    TokenHead,
    answer_loss,
    bare_encoder,
    choice_loss,
    embed_texts,
    encode_texts,
    nearest,
    tag_loss,
    token_dropout,
)
from gte_deploy.training.evaluation.plots import LOSSES_FILE, plot_losses, plot_scores
from gte_deploy.training.evaluation.published_glue import system_of
from gte_deploy.training.evaluation.published_xtreme import XTREME_SYSTEMS, xtreme_system_of
from gte_deploy.training.evaluation.xtreme_hub import has_clones, readers_of_hub
from gte_deploy.training.evaluation.xtreme_metrics import answer_f1, answer_match, chunk_f1, mean_average_precision
from gte_deploy.training.evaluation.xtreme_tasks import (
    TUNINGS,
    XTREME_TASKS,
    CrossLingualTask,
    Tuning,
    choose_languages,
    choose_tasks,
)
from gte_deploy.training.options import Protocol
from gte_deploy.training.xtreme_options import XtremeOptions

logger = logging.getLogger(__name__)

XTREME_RESULT_FILE = "xtreme.json"
XTREME_PLOT_FILE = "xtreme.png"
_TOP = 20  # passages that count in the mean average precision
_TAGS = {"udpos": data_sets.UPOS_TAGS, "wikiann": data_sets.WIKIANN_TAGS}
_LOSSES: dict[str, BatchLoss] = {
    "classify": classification_loss,
    "choose": choice_loss,
    "tag": tag_loss,
    "answer": answer_loss,
    "embed": classification_loss,
}


def xtreme(
    model: str,
    *,
    output: Path,
    data: Path | None = None,
    options: XtremeOptions = XtremeOptions(),  # noqa: B008 - frozen
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on XTREME-R with each seed, and write xtreme.json and plots in `output`.

    Args:
        model: checkpoint folder, preset name or hub id.
        output: folder of the results. For each seed it holds the fine-tuned models and a result of each task, which
            later calls do not compute again.
        data: folder of the data sets, see `xtreme_data.DATA_FILES`, or of clones of the hub's datasets, each in
            OWNER/NAME; None reads the hub, see `xtreme_hub.HUB_SOURCES`.
        options: tasks, languages, seeds, padding, device, and changes of the protocol.
        progress: show progress bars on stderr.

    Returns:
        The content of xtreme.json: scores in percent by task, language and seed, and the averages; see
        `summarize_xtreme`.

    Raises:
        CheckpointError: the model does not load strictly, or has no tokenizer.
        ConfigError: its config asks for something that is not supported, or padding is to be removed and cannot be.
        InputError: data are missing or wrong, or `output` holds results of another model or protocol.
        NonFiniteError: a fine-tuned model computes NaN.
    """
    tasks = choose_tasks(options.tasks)
    for task in tasks:  # before the first model is fine-tuned
        choose_languages(task, options.languages)
    encoder = open_checkpoint(model, system_of(model), tokenizer=options.tokenizer)
    device = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    is_fast = device.type == "cuda" and dtype == "bfloat16"
    settings = {
        "model": model,
        "checkpoint": checkpoint_hash(encoder.folder),
        "data": "hub" if data is None else str(data.resolve()),
        "dtype": dtype,
        "changes": _changes(options),
        **({} if options.tokenizer is None else {"tokenizer": options.tokenizer}),
    }
    commits: dict[str, str] = {}
    readers = _readers(data, commits)
    results = []
    for seed in dict.fromkeys(options.seeds):
        run = _Run(
            encoder=encoder,
            output=output / f"seed-{seed}",
            readers=readers,
            commits=commits,
            seed=seed,
            device=device,
            is_packed=removes_padding(encoder, options.padding, is_fast=is_fast),
            settings=settings,
            progress=progress,
        )
        results += [run.result(task, choose_languages(task, options.languages)) for task in tasks]
    summary = {**settings, **summarize_xtreme(results), "published": xtreme_system_of(model)}
    write_text(output / XTREME_RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    _plot(summary, output)
    return summary


def summarize_xtreme(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores by task with their means over the seeds, and the average of the ten tasks.

    `average` is None unless all ten tasks were run in all of their languages: an average of fewer cannot be compared.
    """
    scores: dict[str, dict[str, Any]] = {}
    for task in XTREME_TASKS.values():
        mine = [result for result in results if result["task"] == task.name]
        if not mine:
            continue
        languages = mine[0]["by_language"]
        scores[task.name] = {
            "mean": statistics.fmean(result["score"] for result in mine),
            "by_seed": {result["seed"]: result["score"] for result in mine},
            "by_language": {
                code: statistics.fmean(result["by_language"][code] for result in mine) for code in languages
            },
            "complete": tuple(languages) == task.languages,
        }
        if "exact_match" in mine[0]:
            scores[task.name]["exact_match"] = statistics.fmean(result["exact_match"] for result in mine)
    complete = len(scores) == len(XTREME_TASKS) and all(score["complete"] for score in scores.values())
    return {
        "scores": scores,
        "average": statistics.fmean(score["mean"] for score in scores.values()) if complete else None,
        "published_systems": list(XTREME_SYSTEMS.values()),
        "results": list(results),
    }


def xtreme_table(summary: Mapping[str, Any]) -> str:
    """Format the scores of a model beside the published ones for a person."""
    systems = {row["name"]: row for row in summary["published_systems"]}
    names = "".join(f"{name[-13:]:>14}" for name in systems)
    lines = [f"{'task':<14}{'metric':<10}{'languages':>9}{'this run':>10}{names}"]
    for name, score in summary["scores"].items():
        task = XTREME_TASKS[name]
        tested = f"{len(score['by_language'])}/{len(task.languages)}"
        published = "".join(f"{row['scores'][name]:>14.2f}" for row in systems.values())
        lines.append(f"{task.title:<14}{task.metric:<10}{tested:>9}{score['mean']:>10.2f}{published}")
        if "exact_match" in score:
            published = "".join(f"{row['exact_match'][name]:>14.2f}" for row in systems.values())
            lines.append(f"{'':<14}{'exact':<10}{'':>9}{score['exact_match']:>10.2f}{published}")
    ours = "-" if summary["average"] is None else f"{summary['average']:.2f}"
    published = "".join(f"{row['average']:>14.2f}" for row in systems.values())
    lines.append(f"{'average':<14}{'of ten':<10}{'':>9}{ours:>10}{published}")
    lines += ["", f"published: {', '.join(systems)}"]
    if summary["average"] is None:
        lines.append("the average needs all ten tasks in all of their languages")
    if summary["changes"]:
        lines.append("this run did not follow the published protocol: the scores do not compare")
    return "\n".join(lines)


def _readers(data: Path | None, commits: dict[str, str]) -> data_sets.XtremeReaders:
    if data is None:
        return readers_of_hub(commits=commits)
    return readers_of_hub(data) if has_clones(data) else data_sets.readers_of_files(data)


def _changes(options: XtremeOptions) -> dict[str, Any]:
    names = ("max_length", "batch_size", "learning_rate", "epochs")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _plot(summary: Mapping[str, Any], output: Path) -> None:
    tasks = list(summary["scores"])
    rows = {"this run": [summary["scores"][task]["mean"] for task in tasks]}
    for row in summary["published_systems"]:
        rows[f"{row['name']} (published)"] = [row["scores"][task] for task in tasks]
    plot_scores(output / XTREME_PLOT_FILE, [XTREME_TASKS[task].title for task in tasks], rows)
    losses: dict[str, list[float]] = {}
    for folder in dict.fromkeys(f"seed-{result['seed']}" for result in summary["results"]):
        for name in TUNINGS:
            record = read_json_object(output / folder / f"{name}.tuning.json", error=InputError)
            losses |= {f"{name}, {folder}": record["losses"]} if record else {}
    if losses:
        plot_losses(output / LOSSES_FILE, losses)


# --- one seed ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Fine-tunes and tests with one seed; `output` receives the models and the results of the seed."""

    encoder: PretrainedEncoder
    output: Path
    readers: data_sets.XtremeReaders
    commits: Mapping[str, str]
    seed: int
    device: torch.device
    is_packed: bool
    settings: Mapping[str, Any]
    progress: bool

    def result(self, task: CrossLingualTask, languages: Sequence[str]) -> dict[str, Any]:
        """Return the result of a task: from its file, if there is one, else from a fine-tuned model."""
        file = self.output / f"{task.name}.json"
        if file.is_file():
            result = self._stored(file)
            if result["languages"] == list(languages):
                logger.info("%s, seed %d: %.2f from %s", task.title, self.seed, result["score"], file)
                return result
        self.output.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        result = {
            "task": task.name,
            "seed": self.seed,
            "metric": task.metric,
            "languages": list(languages),
            **self._test(task, languages),
            "seconds": round(time.monotonic() - started, 1),
            "settings": dict(self.settings),
            **({"commits": dict(self.commits)} if self.commits else {}),
        }
        write_text(file, json.dumps(result, indent=2) + "\n")
        logger.info("%s, seed %d: %s %.2f", task.title, self.seed, task.metric, result["score"])
        return result

    def _stored(self, file: Path) -> dict[str, Any]:
        result = read_json_object(file, error=InputError, advice="Remove the file.")
        before = result.get("settings", {})
        keys = (self.settings.keys() | before.keys()) - {"model"}
        if changed := sorted(key for key in keys if before.get(key) != self.settings.get(key)):
            raise InputError(
                f"{file} was made with other settings ({', '.join(changed)}); use the same, or another output folder"
            )
        return result

    def _test(self, task: CrossLingualTask, languages: Sequence[str]) -> dict[str, Any]:
        tuning = TUNINGS[task.tuning]
        model = self._tuned(tuning)
        model.to(self.device)
        if task.name in ("lareqa", "mewslix"):  # all languages search the same passages
            load = self.readers.lareqa if task.name == "lareqa" else self.readers.mewslix
            scores = self._search(model, tuning, load(languages), _precision)
        elif task.name == "tatoeba":
            scores = {}
            for code in languages:
                scores |= self._search(model, tuning, self.readers.tatoeba(code), _hit_rate)
        elif tuning.head == "answer":
            return self._test_answers(task, model, tuning, languages)
        else:
            scores = {code: self._score(task, model, tuning, code) for code in languages}
        return {"score": statistics.fmean(scores.values()), "by_language": scores}

    def _score(self, task: CrossLingualTask, model: Any, tuning: Tuning, language: str) -> float:
        protocol = self._protocol(tuning)
        if tuning.head == "classify":
            examples = self.readers.xnli(language)
            rows = Encoded.of(examples, encoder=self.encoder, max_length=protocol.max_length)
            return accuracy(self._finite(task, predict(model, rows, bfloat16=self._bfloat16)).argmax(1), rows.labels)
        if tuning.head == "choose":
            choices = self.readers.xcopa(language)
            asked = ChoiceRows.of(choices, encoder=self.encoder, max_length=protocol.max_length)
            outputs = self._finite(task, predict(model, asked.rows, bfloat16=self._bfloat16))
            return accuracy(outputs.reshape(-1, choices.num_choices).argmax(1), choices.labels)
        load = self.readers.udpos if task.name == "udpos" else self.readers.wikiann
        tags = _TAGS[task.name]
        sentences = TagRows.of(load(language, "test"), tags, encoder=self.encoder, max_length=protocol.max_length)
        found = predict_tokens(model, sentences.rows, bfloat16=self._bfloat16)
        self._finite(task, *found)
        return chunk_f1(*sentences.decode(found, tags))

    def _test_answers(
        self, task: CrossLingualTask, model: Any, tuning: Tuning, languages: Sequence[str]
    ) -> dict[str, Any]:
        loaders = {"xquad": self.readers.xquad, "mlqa": self.readers.mlqa, "tydiqa": self.readers.tydiqa}
        protocol = self._protocol(tuning)
        f1, exact = {}, {}
        for code in languages:
            questions = loaders[task.name](code)
            rows = AnswerRows.of(questions, encoder=self.encoder, max_length=protocol.max_length, stride=tuning.stride)
            outputs = predict_tokens(model, rows.rows, bfloat16=self._bfloat16)
            self._finite(task, *outputs)
            answers = list(zip(rows.answers(outputs, questions), questions, strict=True))
            f1[code] = statistics.fmean(answer_f1(answer, item.answers) for answer, item in answers)
            exact[code] = statistics.fmean(answer_match(answer, item.answers) for answer, item in answers)
        return {
            "score": statistics.fmean(f1.values()),
            "by_language": f1,
            "exact_match": statistics.fmean(exact.values()),
            "exact_match_by_language": exact,
        }

    def _search(
        self,
        model: DualEncoder,
        tuning: Tuning,
        data: data_sets.RetrievalData,
        score: Callable[[np.ndarray, Sequence[set[int]]], float],
    ) -> dict[str, float]:
        length = self._protocol(tuning).max_length
        rows = encode_texts(data.passages, encoder=self.encoder, max_length=length)
        passages = embed_texts(model, rows, bfloat16=self._bfloat16)
        if not passages.isfinite().all():
            raise NonFiniteError(f"{tuning.name}, seed {self.seed}: the fine-tuned model computes NaN")
        scores = {}
        for code, texts in data.queries.items():
            rows = encode_texts(texts, encoder=self.encoder, max_length=min(tuning.query_length, length))
            queries = embed_texts(model, rows, bfloat16=self._bfloat16)
            scores[code] = score(nearest(queries, passages, top=_TOP, device=self.device), data.relevant[code])
        return scores

    # --- fine-tuning --------------------------------------------------------------------------------------------------

    def _tuned(self, tuning: Tuning) -> Any:
        """Return a fine-tuned model on the CPU: stored, or fine-tuned now and stored."""
        model = self._new_model(tuning)
        weights, record = self.output / f"{tuning.name}.safetensors", self.output / f"{tuning.name}.tuning.json"
        if weights.is_file() and record.is_file():
            self._stored(record)
            model.load_state_dict(load_file(weights))
            return model
        if tuning.starts_from is not None:
            model.load_state_dict(self._tuned(TUNINGS[tuning.starts_from]).state_dict())
        model.to(self.device)
        started = time.monotonic()
        train = self._training_rows(tuning)
        losses = fine_tune(
            model,
            train,
            protocol=self._protocol(tuning),
            seed=self.seed,
            loss_of=_LOSSES[tuning.head],
            bfloat16=self._bfloat16,
            progress=f"{tuning.name}, seed {self.seed}" if self.progress else None,
        )
        if not np.isfinite(losses).all():
            raise NonFiniteError(
                f"{tuning.name}, seed {self.seed}: the loss becomes NaN or infinite; lower the learning rate"
            )
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        write_with(weights, lambda aside: save_tensors(tensors, aside))
        facts = {
            "tuning": tuning.name,
            "protocol": dataclasses.asdict(self._protocol(tuning)),
            "train_examples": len(train),
            "padding": "removed" if self.is_packed else "kept",
            "seconds": round(time.monotonic() - started, 1),
            "settings": dict(self.settings),
            "losses": losses,
        }
        write_text(record, json.dumps(facts) + "\n")
        return model.cpu()

    def _new_model(self, tuning: Tuning) -> Any:
        if tuning.head in ("classify", "choose"):
            outputs = len(data_sets.NLI_CLASSES) if tuning.head == "classify" else 1
            model = self.encoder.classifier(num_labels=outputs, seed=self.seed)
            if self.is_packed:
                run_without_padding(model)
            return model
        encoder = bare_encoder(self.encoder, seed=self.seed, is_packed=self.is_packed)
        torch.manual_seed(self.seed)
        if tuning.head == "tag":
            return TokenHead(encoder, len(_TAGS[tuning.name]), dropout=token_dropout(encoder))
        if tuning.head == "answer":
            return TokenHead(encoder, 2, dropout=0.0, masked=True)
        return DualEncoder(encoder)

    def _training_rows(self, tuning: Tuning) -> TrainingRows:
        length, encoder, readers = self._protocol(tuning).max_length, self.encoder, self.readers
        if tuning.name == "mnli":
            return Encoded.of(readers.mnli(), encoder=encoder, max_length=length)
        if tuning.head == "choose":
            load = readers.siqa if tuning.name == "siqa" else readers.copa
            return ChoiceRows.of(load(), encoder=encoder, max_length=length)
        if tuning.head == "tag":
            read = readers.udpos if tuning.name == "udpos" else readers.wikiann
            return TagRows.of(read("en", "train"), _TAGS[tuning.name], encoder=encoder, max_length=length)
        if tuning.head == "answer":
            ask = readers.squad if tuning.name == "squad" else readers.tydiqa_train
            return AnswerRows.of(ask(), encoder=encoder, max_length=length, stride=tuning.stride).rows
        pairs = readers.mewslix_train if tuning.name == "mewslix" else readers.squad_pairs
        query_length = min(tuning.query_length, length)
        return PairRows.of(pairs(), encoder=encoder, query_length=query_length, max_length=length)

    def _protocol(self, tuning: Tuning) -> Protocol:
        protocol = dataclasses.replace(tuning.protocol, **self.settings["changes"])
        return dataclasses.replace(
            protocol, max_length=min(protocol.max_length, self.encoder.max_tokens or protocol.max_length)
        )

    @property
    def _bfloat16(self) -> bool:
        return self.settings["dtype"] == "bfloat16"

    def _finite(self, task: CrossLingualTask, *outputs: np.ndarray) -> np.ndarray:
        if not all(np.isfinite(output).all() for output in outputs):
            raise NonFiniteError(
                f"{task.title}, seed {self.seed}: the fine-tuned model computes NaN; lower the learning rate"
            )
        return outputs[0]


def _precision(ranked: np.ndarray, relevant: Sequence[set[int]]) -> float:
    return mean_average_precision(ranked, relevant, top=_TOP)


def _hit_rate(ranked: np.ndarray, relevant: Sequence[set[int]]) -> float:
    return 100 * statistics.fmean(float(row[0] in wanted) for row, wanted in zip(ranked, relevant, strict=True))

"""Fine-tuning of a checkpoint on pairs of texts, with sentence-transformers' trainers.

A run's folder holds recipe.yaml, run.json (what the run was started with), log.jsonl, training.png, checkpoints/ and,
at the end, model/ and results.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
import transformers
from safetensors import SafetensorError
from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gte_deploy.core.errors import CheckpointError, InputError, NonFiniteError
from gte_deploy.core.files import names_in_errors, read_json, require_utf8, sync_tree, write_text
from gte_deploy.models.stored_tensors import unwritten
from gte_deploy.training.evaluation.retrieval import query_metrics, rank_by_model
from gte_deploy.training.evaluation.retrieval_sets import RetrievalSet
from gte_deploy.training.finetune.card import complete_card
from gte_deploy.training.finetune.data import has_scores, read_pairs, relevance_of, rows_fingerprint, training_rows
from gte_deploy.training.finetune.log import RunCallback, plot_finetuning
from gte_deploy.training.finetune.losses import build_loss
from gte_deploy.training.finetune.opening import open_initial
from gte_deploy.training.finetune.options import RetrievalOptions
from gte_deploy.training.finetune.recipe import FineTuneRecipe
from gte_deploy.training.recipe import changed_fields, dump_recipe, recipe_to_dict
from gte_deploy.training.run import StopSignal

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
_RUN_FILE, _MODEL, _CHECKPOINTS = "run.json", "model", "checkpoints"
_TRAINERS: Mapping[str, tuple[Any, Any]] = {
    "embed": (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    "rerank": (CrossEncoderTrainer, CrossEncoderTrainingArguments),
    "sparse": (SparseEncoderTrainer, SparseEncoderTrainingArguments),
}


@dataclass(frozen=True)
class FineTuneResult:
    """The outcome of a fine-tuning.

    Args:
        model: the folder of the trained model; None if a signal stopped the run, which the same call continues.
        steps: optimizer steps so far.
        before: figures on the evaluation data before training; empty without such data.
        after: the same after training.
    """

    model: Path | None
    steps: int
    before: Mapping[str, float]
    after: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        model = None if self.model is None else str(self.model)
        return {"path": model, "steps": self.steps, "before": dict(self.before), "after": dict(self.after)}


def fine_tune_on_pairs(
    recipe: FineTuneRecipe,
    *,
    data: Sequence[str],
    output: Path,
    eval_data: Sequence[str] = (),
    device: str | None = None,
    progress: TextIO | None = None,
) -> FineTuneResult:
    """Train a model, or continue its run.

    The weights are float32 in training and in the saved model. The checkpoints of a run are those of transformers'
    Trainer: weights in safetensors, and optimizer, schedule and random state in files that it reads with torch's
    restricted unpickler (`weights_only=True`), which runs no code. SIGTERM, SIGHUP and SIGINT save one and stop.

    Args:
        recipe: the recipe.
        data: inputs of `read_pairs`.
        output: the folder of the run.
        eval_data: inputs of pairs that are not trained on.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        progress: stream for progress lines.

    Raises:
        InputError: the data cannot be read or does not fit the loss, or the folder holds a run of another recipe or
            other data.
        CheckpointError: the model to start from cannot be loaded.
        NonFiniteError: the loss is NaN or infinite.
    """
    with _quiet_libraries(), names_in_errors(output):
        rows = read_pairs(data, recipe)
        held_out = read_pairs(eval_data, recipe) if eval_data else None
        finished = _finished(output)
        _require_same_run(output, recipe, {"data": rows_fingerprint(rows)})
        if finished is not None:
            logger.info("%s is finished", output)
            return finished
        model = open_initial(recipe, device=device)
        train_rows = training_rows(rows, recipe)
        before = {} if held_out is None else measure(model, held_out, recipe)
        with StopSignal() as stop:
            trainer = _trainer(model, recipe, train_rows, output, held_out=held_out, device=device)
            trainer.add_callback(RunCallback(output, stop=stop, progress=progress))
            try:
                trainer.train(resume_from_checkpoint=_newest_checkpoint(output))
            except SafetensorError as error:  # of a checkpoint, where the disk is full
                raise unwritten(output / _CHECKPOINTS, error) from error
        state = trainer.state
        if state.global_step < state.max_steps:
            return FineTuneResult(None, state.global_step, before, {})
        after = {} if held_out is None else {**measure(model, held_out, recipe), **_eval_loss(trainer)}
        result = FineTuneResult(output / _MODEL, state.global_step, before, after)
        if state.is_world_process_zero:
            _save(model, recipe, result, output, data=data, rows=len(rows))
    return result


def measure(model: Any, rows: datasets.Dataset, recipe: FineTuneRecipe) -> dict[str, float]:
    """Measure a model on pairs: the retrieval of the positives, or Spearman's correlation with the scores.

    A reranker orders the best 50 documents of BM25. The documents are the distinct texts of the rows.
    """
    was_training = model.training
    model.eval()
    try:
        if has_scores(rows):
            return {"spearman": _correlation(model, rows, recipe)}
        options = RetrievalOptions(recall_at=(1, 10), rerank_depth=50)
        data = RetrievalSet(*relevance_of(rows))
        ranking = rank_by_model(recipe.kind, model, data, options)
        return {name: float(values.mean()) for name, values in query_metrics(ranking, data, options).items()}
    finally:
        model.train(was_training)


def _correlation(model: Any, rows: datasets.Dataset, recipe: FineTuneRecipe) -> float:
    from scipy.stats import spearmanr

    queries, documents = list(rows["query"]), list(rows["document"])
    if recipe.kind == "rerank":
        found = model.predict(list(zip(queries, documents, strict=True)), show_progress_bar=False)
    else:
        rest: dict[str, Any] = {"show_progress_bar": False, "convert_to_tensor": True}
        pairs = model.encode_query(queries, **rest), model.encode_document(documents, **rest)
        found = model.similarity_pairwise(*pairs).cpu().numpy()
    correlation: Any = spearmanr(found, list(rows["score"]))
    return float(correlation.statistic)


def _trainer(
    model: Any,
    recipe: FineTuneRecipe,
    rows: datasets.Dataset,
    output: Path,
    *,
    held_out: datasets.Dataset | None,
    device: str | None,
) -> Any:
    trainer_class, arguments_class = _TRAINERS[recipe.kind]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.batch_size % ranks:
        raise InputError(f"batch_size {recipe.batch_size} is no multiple of the {ranks} ranks")
    columns = [name for name in rows.column_names if name not in ("score", "label")]
    prompts = {} if recipe.kind == "rerank" else _column_prompts(columns, recipe.prompts)
    evaluated = None if held_out is None else training_rows(held_out, recipe)
    arguments = arguments_class(
        output_dir=str(output / _CHECKPOINTS),
        per_device_train_batch_size=recipe.batch_size // ranks,
        per_device_eval_batch_size=recipe.batch_size // ranks,
        num_train_epochs=recipe.epochs,
        max_steps=-1 if recipe.steps is None else recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip_norm or 0.0,
        bf16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
        # A document that is there twice would be its own negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES if recipe.loss.name == "contrastive" else BatchSamplers.BATCH_SAMPLER,
        prompts=prompts,
        eval_strategy="steps" if evaluated is not None and recipe.evaluate_every else "no",
        eval_steps=recipe.evaluate_every,
        save_steps=recipe.checkpoint_every,
        save_total_limit=recipe.keep_checkpoints,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **({"gradient_checkpointing": True} if recipe.gradient_checkpointing else {}),
    )
    negatives = sum(name.startswith("negative") for name in columns)
    loss = build_loss(model, recipe, num_negatives=negatives, gather=ranks > 1)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=evaluated,
        loss=loss,
        callbacks=[SpladeRegularizerWeightSchedulerCallback(loss)] if isinstance(loss, SpladeLoss) else [],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _column_prompts(columns: Sequence[str], prompts: Mapping[str, str]) -> dict[str, str]:
    found = {name: prompts.get("query" if name == "query" else "document", "") for name in columns}
    return {name: prompt for name, prompt in found.items() if prompt}


def _eval_loss(trainer: Any) -> dict[str, float]:
    value = float(trainer.evaluate()["eval_loss"])
    if value != value:
        raise NonFiniteError("the loss on the evaluation data is NaN. Lower learning_rate")
    return {"loss": value}


def _save(
    model: Any, recipe: FineTuneRecipe, result: FineTuneResult, output: Path, *, data: Sequence[str], rows: int
) -> None:
    """Write the model aside, complete its card, and rename it; then the results and the plot."""
    model.max_seq_length = recipe.saved_max_length or recipe.max_length
    aside = output / f"{_MODEL}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    model.model_card_data.base_model = _base_model(recipe)
    try:
        model.save_pretrained(str(aside), model_name=recipe.name)
    except SafetensorError as error:
        raise unwritten(aside, error) from error
    complete_card(aside / "README.md", recipe, result.before, result.after, data=data, rows=rows)
    sync_tree(aside)
    shutil.rmtree(output / _MODEL, ignore_errors=True)  # of a run that was killed before it wrote its results
    aside.rename(output / _MODEL)
    plot_finetuning(output)
    write_text(output / RESULTS_FILE, json.dumps(result.to_dict(), indent=2) + "\n")


def _base_model(recipe: FineTuneRecipe) -> str:
    """The name for the card: a hub id or preset as it is, and of a path only the folder's name."""
    return Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model


def _finished(output: Path) -> FineTuneResult | None:
    found = read_json(output / RESULTS_FILE)
    if not isinstance(found, dict) or not (output / _MODEL).is_dir():
        return None
    return FineTuneResult(output / _MODEL, found["steps"], found["before"], found["after"])


def _require_same_run(output: Path, recipe: FineTuneRecipe, facts: Mapping[str, str]) -> None:
    """Write what the run is started with; refuse to continue a run of something else."""
    now: dict[str, Any] = {"recipe": recipe_to_dict(recipe), **facts}
    before = read_json(output / _RUN_FILE)
    if isinstance(before, dict):
        changed = changed_fields(before["recipe"], now["recipe"])
        changed += [name for name in facts if before.get(name) != facts[name]]
        if changed:
            raise InputError(
                f"{output} holds a run that differs in {', '.join(changed)}. Choose another folder, or remove this one"
            )
        return
    require_utf8(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "recipe.yaml", dump_recipe(recipe))
    write_text(output / _RUN_FILE, json.dumps(now, indent=2) + "\n")


def _newest_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer writes its state last."""
    found = [path for path in (output / _CHECKPOINTS).glob("checkpoint-*") if _has_state(path)]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _has_state(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / "trainer_state.json") is not None
    except CheckpointError:  # a killed run wrote a part of it
        return False


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Turn off the progress bars of transformers and datasets, which would be mixed with our lines."""
    bars = transformers.utils.logging
    shown, shows_data = bars.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    bars.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        if shows_data:
            datasets.enable_progress_bars()

"""Describes a checkpoint folder: reads once every file that can change an answer.

Models, exporters, the runtime and Triton share the result of `describe`. `models.fields` and docs/checkpoints.md list
the fields of each file that are honoured and those that are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.spec import ModelSpec, Pooling, TaskName
from gte_deploy.models.adapters import Places, places_of
from gte_deploy.models.config import read_config, task_of_files, task_of_tensors
from gte_deploy.models.families import family_of
from gte_deploy.models.families.base import Family
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import (
    DenseModule,
    SentenceSettings,
    checked_pooling,
    read_settings,
    reranker_activation,
)
from gte_deploy.models.multi_vector_modules import multi_vector_spec
from gte_deploy.models.sparse_modules import read_sparse_spec
from gte_deploy.models.tokenizer import ResolvedTokenizer, has_tokenizer, resolve_tokenizer
from gte_deploy.models.weight_files import ADAPTER_WEIGHTS, WEIGHTS
from gte_deploy.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of a checkpoint, except its weights.

    Args:
        files: the checkpoint's folder and its JSON files.
        places: the folders of its parts.
        task: the task of the head.
        config: config of the model; its padding id is the tokenizer's, except for a multi-vector model with its own.
        spec: the facts that the runtime needs.
        tokenizer: the tokenizer that AutoTokenizer builds.
        settings: contents of sentence-transformers' files.
    """

    files: CheckpointFiles
    places: Places
    task: TaskName
    config: PreTrainedConfig
    spec: ModelSpec
    tokenizer: ResolvedTokenizer
    settings: SentenceSettings

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.files.path

    @property
    def dense(self) -> tuple[DenseModule, ...]:
        """Dense modules after the pooling, or after the encoder of a multi-vector model."""
        return self.settings.dense

    @property
    def family(self) -> Family:
        """Family of the model."""
        return family_of(self.config)

    @property
    def sites(self) -> Mapping[str, int]:
        """How often each fusion pass must fire on a graph of the model; see `Family.sites`."""
        return self.family.sites(self.config)

    @property
    def weight_files(self) -> list[Path]:
        """Every safetensors file with weights of the model."""
        adapter = self.places.adapter
        modules = (self.folder / dense.path / WEIGHTS for dense in self.dense if dense.path)
        files = [*self.places.weight_files, *modules]
        return files if adapter is None else [*files, adapter.folder / ADAPTER_WEIGHTS]


def describe(
    folder: str | Path, *, task: str = "auto", pooling: str = "auto", tokenizer_folder: Path | None = None
) -> Description:
    """Read every file of a checkpoint folder except its weights.

    Args:
        folder: a local checkpoint (see `resolve_checkpoint`).
        task: one of gte_deploy.core.spec.TASK_NAMES, or "auto" for the task that the checkpoint was trained for.
        pooling: "mean", "cls", or "auto" for the checkpoint's own pooling. If no file names one, that is "cls" for an
            embedding checkpoint, as the family was trained, and "mean" for other checkpoints.
        tokenizer_folder: folder of the tokenizer's files; None for the checkpoint's own.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: a file has a setting that is not supported; the message names file, field and value.
    """
    files = CheckpointFiles(folder)
    places = places_of(files)
    resolved: TaskName = task_of_files(files, places) if task == "auto" else task  # type: ignore[assignment]
    if resolved not in TASKS:
        raise CheckpointError(f"task is {task!r}; expected one of auto, {', '.join(TASKS)}")
    settings = read_settings(files, resolved)
    config = read_config(places.config, settings.config_overrides)
    tokenizer = resolve_tokenizer(
        tokenizer_folder or (places.model if has_tokenizer(places.model) else places.config),
        arguments=settings.tokenizer_arguments,
        lowercase=settings.lowercase,
    )
    if tokenizer.pad_token_id >= config.vocab_size:
        raise CheckpointError(
            f"{files.path}: the tokenizer's padding has id {tokenizer.pad_token_id}, and the model's vocabulary "
            f"{config.vocab_size:,} rows. Take the tokenizer that belongs to the checkpoint."
        )
    # PyLate saves the mask token as the tokenizer's padding; positions are still counted from that of the config.
    keeps_padding = settings.multi_vector is not None and config.pad_token_id is not None
    pad_token_id = config.pad_token_id if keeps_padding else tokenizer.pad_token_id
    if family_of(config).counts_after_padding and config.pad_token_id != pad_token_id:
        raise ConfigError(
            f"{places.config / 'config.json'}: pad_token_id is {config.pad_token_id}, and positions are counted from "
            f"it; expected {tokenizer.pad_token_id}, the tokenizer's"
        )
    config.pad_token_id = pad_token_id
    return Description(
        files=files,
        places=places,
        task=resolved,
        config=config,
        spec=_spec(files, places, config, resolved, settings, tokenizer, pooling),
        tokenizer=tokenizer,
        settings=settings,
    )


def _spec(
    files: CheckpointFiles,
    places: Places,
    config: PreTrainedConfig,
    task: TaskName,
    settings: SentenceSettings,
    tokenizer: ResolvedTokenizer,
    pooling: str,
) -> ModelSpec:
    labels = config.id2label or {}
    activation = settings.activation
    if task == "classify" and activation is None:
        activation = reranker_activation(places.config)
    sparse = None
    if task in ("sparse", "hybrid"):
        sparse = read_sparse_spec(
            files,
            places.sparse,
            lambda: task_of_tensors(places),
            config.num_labels,
            lambda: tokenizer.unweighted_ids,
        )
    if task == "hybrid" and sparse is not None and sparse.head != "token-weights":
        raise ConfigError(
            f"{files.path} has no head for task hybrid, which needs a token classifier of one label: its head is for "
            "fill-mask. Take task embed or sparse."
        )
    max_length, multi_vector = _max_length(config, settings, tokenizer), None
    if settings.multi_vector is not None:
        multi_vector = multi_vector_spec(
            settings.multi_vector,
            tokenizer,
            files.path,
            own_limit=max_length,
            limit=family_of(config).max_tokens(config),
        )
        max_length = max(multi_vector.query_length, multi_vector.document_length)
    has_labels = TASKS[task].has_labels
    types = getattr(config, "type_vocab_size", 0)  # a family without token types has no such field
    return ModelSpec(
        task=task,
        max_length=max_length,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        pad_token_id=tokenizer.pad_token_id,
        pooling=_pooling(config, task, settings, pooling),
        num_labels=(config.num_labels or 0) if has_labels else 0,
        id2label={int(i): str(label) for i, label in labels.items()} if has_labels else {},
        prompts=settings.prompts,
        default_prompt_name=settings.default_prompt_name,
        normalize=settings.normalize,
        token_types=types > 1 and tokenizer.gives_token_types,
        type_vocab_size=types,
        embedding_size=settings.dense[-1].out_features if settings.dense else None,
        truncate_dim=settings.truncate_dim,
        similarity=settings.similarity or TASKS[task].similarity,
        sparse=sparse,
        activation=activation if task == "classify" else None,
        multi_vector=multi_vector,
    )


def _max_length(config: PreTrainedConfig, settings: SentenceSettings, tokenizer: ResolvedTokenizer) -> int:
    # As in sentence-transformers, max_seq_length replaces the tokenizer's own limit.
    own = tokenizer.max_length if settings.max_length is None else settings.max_length
    limit = family_of(config).max_tokens(config)
    return limit if own is None else min(own, limit)


def _pooling(config: PreTrainedConfig, task: TaskName, settings: SentenceSettings, pooling: str) -> Pooling:
    if pooling != "auto":
        return checked_pooling(pooling, "the `pooling` argument")
    field = family_of(config).pooling_field
    own = getattr(config, field) if field is not None else None
    return settings.pooling or own or ("cls" if TASKS[task].pools else "mean")

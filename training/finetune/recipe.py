"""Recipes of fine-tuning: kind, model, loss and schedule, read from YAML as those of pretraining are.

An unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import Pooling
from gte_deploy.training.finetune.options import FINETUNE_RECIPES, FineTuneKind
from gte_deploy.training.options import Dtype
from gte_deploy.training.recipe import load_recipe_as

LossName = Literal["contrastive", "cosent", "binary_cross_entropy"]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
LOSSES: Mapping[FineTuneKind, tuple[LossName, ...]] = {
    "embed": ("contrastive", "cosent"),
    "rerank": ("binary_cross_entropy", "contrastive"),
    "sparse": ("contrastive", "cosent"),
}
"""The losses of each kind."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss, which is one of sentence-transformers'.

    Args:
        name: "contrastive" (InfoNCE, arXiv 1807.03748): each query has to find its document among all documents of the
            batch; needs positives. "cosent": pairs of a higher score get a higher similarity; needs scores.
            "binary_cross_entropy": of a reranker's score with 1 for a positive and 0 for a negative, or with the score.
        temperature: similarities are divided by it.
        mini_batch_size: texts that go through the model at once. The gradient is that of the whole batch (GradCache,
            arXiv 2101.06983), for about a fifth more time; null sends the whole batch through.
        directions: what is compared with what in an embedding model's contrastive loss.
        matryoshka_dims: the loss is also computed on these numbers of leading dimensions, which then work alone
            (arXiv 2205.13147); embedding models only.
        query_regularizer: weight of the FLOPS regularizer (arXiv 2004.05665) of queries, which makes sparse vectors
            sparse; it grows over the first third of the steps.
        document_regularizer: the same for documents.

    Raises:
        ConfigError: a value is out of its range.
    """

    name: LossName = "contrastive"
    temperature: float = 0.05
    mini_batch_size: int | None = None
    directions: tuple[Direction, ...] = ("query_to_doc",)
    matryoshka_dims: tuple[int, ...] = ()
    query_regularizer: float = 5e-5
    document_regularizer: float = 3e-5

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "temperature", self.temperature, "more than 0")
        size = self.mini_batch_size
        _check(size is None or size >= 1, "mini_batch_size", size, "1 or more texts, or null")
        _check("query_to_doc" in self.directions, "directions", self.directions, "query_to_doc among them")
        _check(all(n >= 1 for n in self.matryoshka_dims), "matryoshka_dims", self.matryoshka_dims, "positive numbers")
        for name in ("query_regularizer", "document_regularizer"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class HardNegatives:
    """Mining of hard negatives: documents of the data that look like an answer to a query and are none.

    Args:
        count: negatives of each query.
        model: the embedding model that finds them: a folder or hub id; null takes BM25, which needs no model.
        skip: the best documents that are left out, because they may be answers that nobody marked.
        depth: the rank down to which negatives are taken.
        relative_margin: with a model, a negative is at most this share below the similarity of the positive.

    Raises:
        ConfigError: a value is out of its range.
    """

    count: int = 4
    model: str | None = None
    skip: int = 0
    depth: int = 50
    relative_margin: float | None = 0.05

    def __post_init__(self) -> None:
        _check(self.count >= 1, "count", self.count, "1 or more")
        _check(self.skip >= 0, "skip", self.skip, "0 or more")
        _check(self.depth >= self.skip + self.count, "depth", self.depth, f"at least {self.skip + self.count}")
        margin = self.relative_margin
        _check(margin is None or 0 <= margin < 1, "relative_margin", margin, "in [0, 1), or null")


@dataclass(frozen=True, kw_only=True)
class FineTuneRecipe:
    """The recipe of a fine-tuning.

    Args:
        name: the name of the model, in its card.
        kind: "embed" trains an embedding model, "rerank" a reranker (cross-encoder), "sparse" a SPLADE model.
        model: the checkpoint to start from: a folder or hub id in either layout, or the built-in model.
        loss: the loss.
        max_length: tokens at which texts are cut in training; of a reranker's query and document together.
        saved_max_length: the limit that the trained model states; null for `max_length`. RoPE allows more.
        batch_size: rows of a step, over all ranks.
        epochs: passes over the data; `steps` takes precedence.
        steps: optimizer steps; null for those of `epochs`.
        learning_rate: the peak of the schedule.
        schedule: the fall of the learning rate after the warm-up.
        warmup_ratio: share of the steps in which the learning rate rises.
        weight_decay: of AdamW, times the learning rate, as in torch.
        clip_norm: gradients are clipped to this norm; null does not clip.
        prompts: text before each "query" and each "document"; the trained model keeps them. Not for rerankers.
        pooling: how an embedding model pools; null takes the checkpoint's own, or cls.
        normalize: whether the embeddings have the length 1.
        columns: name of query, positive, negative, document or score -> the column of the data that has it.
        hard_negatives: negatives are mined before training; null takes those of the data.
        dtype: "bfloat16" computes in bfloat16 autocast. The weights are float32 in any case.
        gradient_checkpointing: keep only the layers' inputs, and compute the rest again in the backward pass.
        seed: seed of new layers, the order of the rows and the dropout.
        evaluate_every: steps between measurements of the loss on the evaluation data; null measures at the end.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: number of newest checkpoints to keep.
        log_every: steps between lines of the log.

    Raises:
        ConfigError: a value is out of its range, or does not fit the kind.
    """

    name: str
    kind: FineTuneKind
    model: str
    loss: Loss = field(default_factory=Loss)
    max_length: int = 512
    saved_max_length: int | None = None
    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    prompts: Mapping[str, str] = field(default_factory=dict)
    pooling: Pooling | None = None
    normalize: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)
    hard_negatives: HardNegatives | None = None
    dtype: Dtype = "bfloat16"
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        allowed = LOSSES[self.kind]
        _check(self.loss.name in allowed, "loss.name", self.loss.name, f"{' or '.join(allowed)} for {self.kind}")
        for name in ("batch_size", "epochs", "checkpoint_every", "keep_checkpoints", "log_every"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("steps", "evaluate_every"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "1 or more, or null")
        for name in ("max_length", "saved_max_length"):
            value = getattr(self, name)
            _check(value is None or value >= 4, name, value, "at least 4 tokens")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _check(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "more than 0, or null")
        _check(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        self._check_kind()

    def _check_kind(self) -> None:
        known = set() if self.kind == "rerank" else {"query", "document"}
        _check(set(self.prompts) <= known, "prompts", dict(self.prompts), f"names among {sorted(known) or 'none'}")
        names = {"query", "positive", "negative", "document", "score"}
        _check(set(self.columns) <= names, "columns", dict(self.columns), f"names among {', '.join(sorted(names))}")
        dims = self.loss.matryoshka_dims
        _check(not dims or self.kind == "embed", "loss.matryoshka_dims", dims, "none, except for kind embed")
        if self.loss.name == "cosent":
            _check(
                self.hard_negatives is None, "hard_negatives", self.hard_negatives, "null: cosent learns from scores"
            )


def load_finetune_recipe(
    source: str | Path, *, kind: FineTuneKind | None = None, overrides: Sequence[str] = ()
) -> FineTuneRecipe:
    """Read a recipe of fine-tuning.

    Args:
        source: path of a YAML file, or the name of a shipped one.
        kind: the kind that the recipe must have; None for any.
        overrides: changes such as "loss.temperature=0.02".

    Raises:
        ConfigError: there is no such recipe, a key or value is wrong, or the kind is another.
    """
    recipe = load_recipe_as(FineTuneRecipe, source, overrides=overrides, folder=FINETUNE_RECIPES)
    if kind is not None and recipe.kind != kind:
        raise ConfigError(f"{source} is of kind {recipe.kind}; expected {kind}. Run `gte-train {recipe.kind} {source}`")
    return recipe


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")

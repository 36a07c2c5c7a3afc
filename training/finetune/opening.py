"""Opens checkpoints as models of sentence-transformers: in float32, from every layout, and without remote code.

A checkpoint is loaded strictly by `load_model`, written in the native layout of transformers, and read from there. So a
checkpoint of float16 weights trains in float32, where half precision would overflow, and the original layout needs no
code of its repository.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import ModelSpec, SparseActivation, SparsePooling
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.checkpoint import copy_tokenizer, load_described, save_model
from gte_deploy.models.description import Description, describe
from gte_deploy.training.evaluation.classifiers import open_encoder
from gte_deploy.training.finetune.options import FineTuneKind
from gte_deploy.training.finetune.recipe import FineTuneRecipe

TextModel = SentenceTransformer | CrossEncoder | SparseEncoder
"""A model of sentence-transformers of each kind."""

_LENGTH = "model_max_length"


@dataclass(frozen=True)
class _Parts:
    """How a model is put together: kind, limit in tokens, and for embeddings pooling, normalisation and prompts."""

    kind: FineTuneKind
    max_length: int
    pooling: str = "cls"
    normalize: bool = True
    prompts: dict[str, str] | None = None
    splade: tuple[SparsePooling, SparseActivation] = ("max", "relu")
    similarity: Any = None


def open_initial(recipe: FineTuneRecipe, *, device: str | None = None) -> TextModel:
    """Open the model that a recipe starts from, float32 in train mode.

    A masked-LM checkpoint gets what its kind lacks: pooling and normalisation, or a reranker's new head, whose weights
    the recipe's seed draws. Text is cut at the recipe's max_length.

    Args:
        recipe: its kind, model, pooling, normalisation, prompts, length and seed count.
        device: "cpu" or "cuda"; None takes a GPU if there is one.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or lacks the masked-LM head that sparse embeddings need.
        ConfigError: it has modules that training would lose.
    """
    folder = resolve_checkpoint(recipe.model)
    with tempfile.TemporaryDirectory() as work:
        native = Path(work)
        if recipe.kind == "rerank":
            _write_reranker(folder, native, seed=recipe.seed)
            parts = _Parts("rerank", recipe.max_length)
        else:
            description = describe(folder, task="embed" if recipe.kind == "embed" else "fill-mask")
            if recipe.kind == "embed":
                _refuse_dense(description)
            _write_native(description, native)
            parts = _initial_parts(recipe, description.spec)
        model = _assembled(native, parts, device)
    return model.train()


def open_trained(name: str, *, max_length: int | None = None, device: str | None = None) -> tuple[FineTuneKind, Any]:
    """Open a checkpoint for what it was trained for, float32 in eval mode.

    A masked-LM checkpoint counts as an embedding model with the family's pooling.

    Args:
        name: a folder or hub id in either layout, or the built-in model.
        max_length: tokens at which texts are cut; None for the model's own limit.
        device: "cpu" or "cuda"; None takes a GPU if there is one.

    Returns:
        "embed", "sparse" or "rerank", and the model.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: it is trained for something else, or has modules that are not supported here.
    """
    description = describe(resolve_checkpoint(name))
    if description.task == "fill-mask":
        description = describe(description.folder, task="embed")
    spec, limit = description.spec, min(max_length or description.spec.max_length, description.spec.max_length)
    if spec.task == "classify" and spec.num_labels == 1:
        parts = _Parts("rerank", limit)
    elif spec.task == "embed":
        _refuse_dense(description)
        prompts = dict(spec.prompts)
        parts = _Parts("embed", limit, spec.pooling, spec.normalize, prompts, similarity=spec.similarity)
    elif spec.sparse is not None and spec.sparse.head == "splade" and spec.sparse.query_weights is None:
        parts = _Parts("sparse", limit, splade=(spec.sparse.pooling, spec.sparse.activation))
    else:
        labels = f" of {spec.num_labels} labels" if spec.num_labels else ""
        raise ConfigError(
            f"{name} is a model for {spec.task}{labels}; expected an embedding model, a SPLADE model, or a reranker of "
            "one label"
        )
    with tempfile.TemporaryDirectory() as work:
        _write_native(description, Path(work))
        return parts.kind, _assembled(Path(work), parts, device).eval()


def _initial_parts(recipe: FineTuneRecipe, spec: ModelSpec) -> _Parts:
    prompts = {**spec.prompts, **recipe.prompts}
    if recipe.kind == "sparse":
        return _Parts("sparse", recipe.max_length, prompts=dict(recipe.prompts))
    return _Parts("embed", recipe.max_length, recipe.pooling or spec.pooling, recipe.normalize, prompts)


def _assembled(folder: Path, parts: _Parts, device: str | None) -> Any:
    """Put a model together from a native float32 folder."""
    loading: dict[str, Any] = {
        "model_kwargs": {"dtype": torch.float32},
        "processor_kwargs": {_LENGTH: parts.max_length},
    }
    if parts.kind == "rerank":
        return CrossEncoder(str(folder), num_labels=1, device=device, local_files_only=True, **loading)
    if parts.kind == "sparse":
        transformer = Transformer(str(folder), transformer_task="fill-mask", **loading)
        return SparseEncoder(modules=[transformer, SpladePooling(*parts.splade)], device=device, prompts=parts.prompts)
    transformer = Transformer(str(folder), **loading)
    pooling: Any = parts.pooling  # one of the library's modes, which the recipe or the checkpoint names
    modules: list[Any] = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
    modules += [Normalize()] if parts.normalize else []
    return SentenceTransformer(
        modules=modules, device=device, prompts=parts.prompts, similarity_fn_name=parts.similarity or "cosine"
    )


def _write_native(description: Description, folder: Path) -> None:
    """Write the weights in float32, config and tokenizer of a checkpoint in the native layout."""
    save_model(load_described(description, dtype=torch.float32), folder, layout="native", dtype=torch.float32)
    copy_tokenizer(description.places.model, folder)


def _write_reranker(folder: Path, native: Path, *, seed: int) -> None:
    description = describe(folder)
    if description.task == "classify" and description.spec.num_labels == 1:
        _write_native(description, native)
        return
    save_model(open_encoder(folder).classifier(num_labels=1, seed=seed), native, layout="native", dtype=torch.float32)
    copy_tokenizer(description.places.model, native)


def _refuse_dense(description: Description) -> None:
    if description.dense:
        raise ConfigError(
            f"{description.folder} has Dense modules after its pooling, which would be lost. Train it with "
            "sentence-transformers itself"
        )

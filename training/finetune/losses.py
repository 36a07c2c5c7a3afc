"""The loss of a recipe, from the losses of sentence-transformers."""

from __future__ import annotations

from typing import Any

from sentence_transformers.cross_encoder import losses as rerank_losses
from sentence_transformers.sentence_transformer import losses as embed_losses
from sentence_transformers.sparse_encoder import losses as sparse_losses
from torch import nn

from gte_deploy.core.errors import InputError
from gte_deploy.training.finetune.recipe import FineTuneRecipe


def build_loss(model: Any, recipe: FineTuneRecipe, *, num_negatives: int = 0, gather: bool = False) -> nn.Module:
    """Build the loss of a recipe on a model.

    Args:
        model: the model of the recipe's kind; see `open_initial`.
        recipe: its kind and loss count.
        num_negatives: hard negatives of a row, which a reranker's contrastive loss adds to those of the batch.
        gather: whether the documents of other ranks count as negatives too.

    Raises:
        InputError: a Matryoshka dimension is above the width of the embeddings.
    """
    if recipe.kind == "embed":
        return _embed_loss(model, recipe, gather)
    if recipe.kind == "rerank":
        return _rerank_loss(model, recipe, num_negatives)
    return _sparse_loss(model, recipe, gather)


def _embed_loss(model: Any, recipe: FineTuneRecipe, gather: bool) -> nn.Module:
    loss, scale = recipe.loss, 1 / recipe.loss.temperature
    inner: nn.Module
    if loss.name == "cosent":
        inner = embed_losses.CoSENTLoss(model, scale=scale)
    else:
        rest: dict[str, Any] = {"scale": scale, "gather_across_devices": gather, "directions": loss.directions}
        if loss.mini_batch_size is None:
            inner = embed_losses.MultipleNegativesRankingLoss(model, **rest)
        else:
            cached = embed_losses.CachedMultipleNegativesRankingLoss
            inner = cached(model, mini_batch_size=loss.mini_batch_size, **rest)
    if not loss.matryoshka_dims:
        return inner
    width = model.get_embedding_dimension()
    if max(loss.matryoshka_dims) > width:
        raise InputError(f"loss.matryoshka_dims are {loss.matryoshka_dims}; the embeddings have {width} dimensions")
    dims = sorted({width, *loss.matryoshka_dims}, reverse=True)
    return embed_losses.MatryoshkaLoss(model, inner, matryoshka_dims=dims)


def _rerank_loss(model: Any, recipe: FineTuneRecipe, num_negatives: int) -> nn.Module:
    loss = recipe.loss
    if loss.name == "binary_cross_entropy":
        return rerank_losses.BinaryCrossEntropyLoss(model)
    # In-batch documents, too, are drawn as negatives: as many again as a row has, and at least four.
    rest: dict[str, Any] = {"num_negatives": max(4, num_negatives), "scale": 1 / loss.temperature}
    if loss.mini_batch_size is None:
        return rerank_losses.MultipleNegativesRankingLoss(model, **rest)
    return rerank_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=loss.mini_batch_size, **rest)


def _sparse_loss(model: Any, recipe: FineTuneRecipe, gather: bool) -> nn.Module:
    loss, scale = recipe.loss, 1 / recipe.loss.temperature
    inner: nn.Module
    if loss.name == "cosent":
        inner = sparse_losses.SparseCoSENTLoss(model, scale=scale)
    else:
        inner = sparse_losses.SparseMultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=gather)
    weights: dict[str, Any] = {
        "query_regularizer_weight": loss.query_regularizer,
        "document_regularizer_weight": loss.document_regularizer,
    }
    if loss.mini_batch_size is None:
        return sparse_losses.SpladeLoss(model, inner, **weights)
    return sparse_losses.CachedSpladeLoss(model, inner, mini_batch_size=loss.mini_batch_size, **weights)

"""From hidden states to sparse embeddings in torch, for the torch backend and for the tracer of graphs.

The vocabulary logits of a long text are large: 8,192 tokens x 30,528 words are 1 GB. They are made, and pooled over the
tokens, for one part of the vocabulary after another, so no more than a part's exist at once; the answer is the same.

Shapes: B rows, S tokens, H hidden size, V vocabulary, W words of a part.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import SparseSpec
from gte_deploy.models.families import head_of, head_transform_of

PART = 2048
"""Number of vocabulary entries in a part: 64 MB of logits at 8,192 tokens. Measured in docs/performance.md."""


def sparse_head(model: Any, sparse: SparseSpec) -> SpladeHead | TokenWeightsHead:
    """The sparse head of a model for fill-mask or token-classify; its parameters are the model's own, uncopied.

    Raises:
        ConfigError: a splade head on a masked-LM head of an unknown form.
    """
    transform = head_transform_of(model)
    if sparse.head == "splade":
        head = head_of(model, "fill-mask")
        if transform is not None:
            return SpladeHead(SimpleNamespace(transform=transform, decoder=head), sparse)
        head = getattr(head, "predictions", head)  # BERT's
        if not hasattr(head, "transform"):
            missing = [name for name in ("dense", "layer_norm", "decoder") if not hasattr(head, name)]
            if missing:
                raise ConfigError(
                    f"a splade head takes a masked-LM head of dense, layer_norm and decoder; {type(head).__name__} has "
                    f"no {', '.join(missing)}. Take the task fill-mask."
                )
        return SpladeHead(head, sparse)
    classifier = head_of(model, "token-classify")
    classifier = classifier if transform is None else nn.Sequential(transform, classifier)
    return TokenWeightsHead(classifier, model.config.vocab_size, sparse)


class SpladeHead(nn.Module):
    """sentence-transformers' SpladePooling over a masked-LM head."""

    def __init__(self, lm_head: Any, sparse: SparseSpec, part: int | None = None) -> None:
        super().__init__()
        self._sparse = sparse
        part = PART if part is None else part
        if hasattr(lm_head, "transform"):
            self.transform = lm_head.transform
        else:
            self.dense, self.layer_norm = lm_head.dense, lm_head.layer_norm
        weights, bias = lm_head.decoder.weight.detach().split(part), lm_head.decoder.bias
        biases = [None] * len(weights) if bias is None else bias.detach().split(part)
        self.decoder = nn.ModuleList(map(_LinearOf, weights, biases))

    def forward(self, hidden: Tensor, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        """[B, S, H], [B, S] and [B, S] to [B, V]; the first token of each row is real, padding stands on the right."""
        is_max = self._sparse.pooling == "max"
        if is_max:
            # Padding repeats the first token, which changes no maximum: cheaper than a mask on [B, S, V].
            hidden = torch.where(attention_mask[:, :, None] == 1, hidden, hidden[:, :1])
        rows = self._transformed(hidden.reshape(-1, hidden.shape[-1]))
        pooled = [self._pooled(part(rows).reshape(*hidden.shape[:2], -1), attention_mask) for part in self.decoder]
        weights = torch.cat(pooled, dim=-1)
        # The activation only rises, so it commutes with the maximum: [B, V] instead of [B, S, V].
        return self._activated(weights) if is_max else weights

    def _transformed(self, rows: Tensor) -> Tensor:
        """[B*S, H] to the input of the decoder, of the same shape."""
        return self.transform(rows) if hasattr(self, "transform") else self.layer_norm(F.gelu(self.dense(rows)))

    def _pooled(self, logits: Tensor, mask: Tensor) -> Tensor:
        """[B, S, W] to [B, W]."""
        if self._sparse.pooling == "max":
            return logits.amax(dim=1)
        return torch.matmul(mask[:, None].to(logits.dtype), self._activated(logits)).squeeze(1)

    def _activated(self, logits: Tensor) -> Tensor:
        weights = torch.log1p(torch.relu(logits))
        return torch.log1p(weights) if self._sparse.activation == "log1p_relu" else weights


class TokenWeightsHead(nn.Module):
    """The sparse head of gte-multilingual-base: a vocabulary entry weighs the largest relu(logit) of its positions."""

    keep: Tensor

    def __init__(self, classifier: nn.Module, vocab_size: int, sparse: SparseSpec) -> None:
        super().__init__()
        self.classifier = classifier
        keep = torch.ones(vocab_size, device=next(classifier.parameters()).device)
        keep[list(sparse.unweighted)] = 0
        self.register_buffer("keep", keep)

    def forward(self, hidden: Tensor, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        """[B, S, H], [B, S] and [B, S] to [B, V]."""
        weights = torch.relu(self.classifier(hidden)[:, :, 0].float()) * attention_mask
        none = weights.new_zeros(1, 1).expand(weights.shape[0], self.keep.shape[0])
        return none.scatter_reduce(1, input_ids, weights, reduce="amax", include_self=True) * self.keep


class _LinearOf(nn.Module):
    """A linear layer that shares some rows of another layer's matrix, without a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

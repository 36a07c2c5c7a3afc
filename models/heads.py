"""One head for each task in torch: from the encoder's hidden states to the output of the task.

The torch backend, the tracer of graphs and the reference of parity checks compute their answers with these heads. A
head reads hidden states through `PaddedStates` or `PackedStates`, so each head is written once for both layouts.

Shapes: B rows, S tokens of the longest row, T tokens of all rows without padding, M masks, H hidden size,
E embedding size, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import Logits, ModelSpec, Pooling, SparseSpec, TaskName
from gte_deploy.models.families import family_of, head_of, head_transform_of
from gte_deploy.models.sparse_heads import sparse_head
from gte_deploy.tasks.multi_vector import TOKEN_VECTORS
from gte_deploy.tasks.sparse import TOKEN_WEIGHTS


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding, in float32 or better.

    Args:
        hidden: [B, S, H].
        attention_mask: [B, S], 1 for a token and 0 for padding; None where no row has padding.

    Returns:
        [B, H]. A row without any token gives the zero vector.
    """
    states = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return states.mean(dim=1)
    mask = attention_mask.to(states.dtype)
    total = torch.matmul(mask.unsqueeze(1), states).squeeze(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1.0)


class States(Protocol):
    """The hidden states of a batch, in either layout."""

    @property
    def hidden(self) -> Tensor:
        """[B, S, H] or, without padding, [T, H]."""
        ...

    def padded(self, values: Tensor) -> Tensor:
        """Values of tokens in the layout of `hidden`, [..., X], as [B, S, X]; 0 at padding where none is computed."""
        ...

    def first_tokens(self) -> Tensor:
        """[B, H]"""
        ...

    def mean_tokens(self) -> Tensor:
        """[B, H] in float32 or better."""
        ...

    def pooled(self) -> Tensor:
        """[B, H], the output of the model's pooler."""
        ...

    def masked_tokens(self) -> Tensor | None:
        """[M, H] at the mask positions, or None where the batch names no positions."""
        ...

    def tokens_of_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, S, H], attention mask [B, S] and token ids [B, S]."""
        ...


@dataclass(frozen=True)
class PaddedStates:
    """Hidden states of rows that are padded on the right.

    Args:
        hidden: [B, S, H].
        attention_mask: [B, S] int64.
        input_ids: [B, S] int64.
        mask_positions: [M, 2] int64 of (row, token), or None.
        pooler_output: [B, H], or None where the model has no pooler.
        is_full: whether no row has padding. Only a caller that has looked at the mask can know.
    """

    hidden: Tensor
    attention_mask: Tensor
    input_ids: Tensor
    mask_positions: Tensor | None = None
    pooler_output: Tensor | None = None
    is_full: bool = False

    def padded(self, values: Tensor) -> Tensor:
        """See `States`."""
        return values

    def first_tokens(self) -> Tensor:
        """See `States`."""
        return self.hidden[:, 0]

    def mean_tokens(self) -> Tensor:
        """See `States`."""
        return mean_pool(self.hidden, None if self.is_full else self.attention_mask)

    def pooled(self) -> Tensor:
        """See `States`."""
        assert self.pooler_output is not None  # every classifier has a pooler
        return self.pooler_output

    def masked_tokens(self) -> Tensor | None:
        """See `States`."""
        if self.mask_positions is None:
            return None
        return self.hidden[self.mask_positions[:, 0], self.mask_positions[:, 1]]

    def tokens_of_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `States`."""
        return self.hidden, self.attention_mask, self.input_ids


@dataclass(frozen=True)
class PackedStates:
    """Hidden states of the tokens of all rows in one sequence without padding.

    Args:
        hidden: [T, H].
        attention_mask: [B, S] int64.
        input_ids: [B, S] int64.
        mask_positions: [M, 2] int64 of (row, token), or None.
        pooler: the model's pooler, from [B, 1, H] to [B, H]; None where it has none.
        starts: [B] int64, number of each row's first token among the T tokens.
    """

    hidden: Tensor
    attention_mask: Tensor
    input_ids: Tensor
    mask_positions: Tensor | None
    pooler: Callable[[Tensor], Tensor] | None
    starts: Tensor

    def padded(self, values: Tensor) -> Tensor:
        """See `States`."""
        out = values.new_zeros((*self.attention_mask.shape, values.shape[-1]))
        out[self.attention_mask == 1] = values
        return out

    def first_tokens(self) -> Tensor:
        """See `States`."""
        return self.hidden[self.starts]

    def mean_tokens(self) -> Tensor:
        """See `States`."""
        # `mean_pool` in this layout: the rows are segments of one sequence.
        return torch.segment_reduce(self.hidden.float(), "mean", lengths=self.attention_mask.sum(dim=1))

    def pooled(self) -> Tensor:
        """See `States`."""
        assert self.pooler is not None  # every classifier has a pooler
        return self.pooler(self.first_tokens()[:, None])

    def masked_tokens(self) -> Tensor | None:
        """See `States`."""
        if self.mask_positions is None:
            return None
        row, column = self.mask_positions.unbind(1)
        return self.hidden[self.starts[row] + self.attention_mask.cumsum(dim=1)[row, column] - 1]

    def tokens_of_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `States`."""
        return self.padded(self.hidden), self.attention_mask, self.input_ids


def encode_padded(encoder: Any, batch: Batch, device: torch.device | None = None) -> PaddedStates:
    """Run transformers' encoder over a padded batch.

    Args:
        encoder: the encoder of a model, compiled or not.
        batch: in numpy.
        device: the device of the encoder; None is the CPU.
    """
    mask = torch.tensor(batch.attention_mask, device=device)
    ids = torch.tensor(batch.input_ids, device=device)
    types, positions = batch.token_type_ids, batch.mask_positions
    is_full = bool(batch.attention_mask.all())
    encoded = encoder(
        input_ids=ids,
        # A mask of ones changes nothing, and scaled_dot_product_attention is faster and smaller without a mask.
        attention_mask=None if is_full else mask,
        **({} if types is None else {"token_type_ids": torch.tensor(types, device=device)}),
    )
    return PaddedStates(
        hidden=encoded.last_hidden_state,
        attention_mask=mask,
        input_ids=ids,
        mask_positions=None if positions is None else torch.tensor(positions, device=device),
        pooler_output=getattr(encoded, "pooler_output", None),
        is_full=is_full,
    )


def encode_packed(encoder: Any, batch: Batch, device: torch.device | None = None) -> PackedStates:
    """Run transformers' encoder over the tokens of all rows as one row, without padding.

    The attention implementation of the encoder must be `attention.PACKED_ATTENTION`. Arguments as in `encode_padded`.
    """
    real = batch.attention_mask == 1
    lengths = real.sum(axis=1)
    bounds = np.concatenate(([0], lengths.cumsum()))
    types, positions = batch.token_type_ids, batch.mask_positions
    encoded = encoder(
        input_ids=torch.tensor(batch.input_ids[real], device=device)[None],
        position_ids=torch.tensor(_position_ids(encoder.config, batch.input_ids, real), device=device)[None],
        cu_seqlens=torch.tensor(bounds.astype(np.int32), device=device),
        # An upper bound is enough, and a few fixed bounds cause fewer compilations.
        max_seqlen=1 << int(lengths.max() - 1).bit_length(),
        **({} if types is None else {"token_type_ids": torch.tensor(types[real], device=device)[None]}),
    )
    return PackedStates(
        hidden=encoded.last_hidden_state[0],
        attention_mask=torch.tensor(batch.attention_mask, device=device),
        input_ids=torch.tensor(batch.input_ids, device=device),
        mask_positions=None if positions is None else torch.tensor(positions, device=device),
        pooler=getattr(encoder, "pooler", None),
        starts=torch.tensor(bounds[:-1], device=device),
    )


def _position_ids(config: Any, input_ids: NDArray[np.int64], real: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The positions [T] of the tokens of all rows, as transformers computes them in padded rows [B, S]."""
    if not family_of(config).counts_after_padding:
        return np.nonzero(real)[1]
    # transformers looks at ids, not at the mask: a padding token that a text spells takes no position of its own.
    counted = input_ids != config.pad_token_id
    return (counted.cumsum(axis=1) * counted + config.pad_token_id)[real]


@dataclass(frozen=True)
class HeadOptions:
    """The options of a head; see `ModelSpec`."""

    task: TaskName
    pooling: Pooling = "mean"
    logits: Logits = "masked"
    sparse: SparseSpec | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> HeadOptions:
        """The options of a model with this spec."""
        return cls(spec.task, spec.pooling, spec.logits, spec.sparse)


class Head(Protocol):
    """Computes one output from hidden states. It runs the model's own modules, in evaluation mode."""

    output: ClassVar[str]
    """Name of the output."""

    def __call__(self, states: States) -> Tensor:
        """Compute the output; see `Backend.run` for its shape."""
        ...


def _transformed(model: Any, hidden: Tensor) -> Tensor:
    """What the head of a task reads, [..., H], of hidden states of the same shape."""
    transform = head_transform_of(model)
    return hidden if transform is None else transform(hidden)


@dataclass(frozen=True)
class EmbedHead:
    """Pooled hidden states, through the checkpoint's Dense modules where it has any: [B, E]."""

    output: ClassVar[str] = "sentence_embedding"
    model: Any
    options: HeadOptions

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        pooled = states.first_tokens() if self.options.pooling == "cls" else states.mean_tokens()
        projection = getattr(self.model, "sentence_projection", None)
        return pooled if projection is None else projection(pooled.to(states.hidden.dtype))


@dataclass(frozen=True)
class MultiVectorHead:
    """Hidden states of all tokens, through the checkpoint's Dense modules where it has any: [B, S, E]."""

    output: ClassVar[str] = TOKEN_VECTORS
    model: Any
    options: HeadOptions

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        projection = getattr(self.model, "token_projection", None)
        return states.padded(states.hidden if projection is None else projection(states.hidden))


@dataclass(frozen=True)
class FillMaskHead:
    """Vocabulary logits of the masks, [M, V], or of all tokens, [B, S, V], as the options or the batch ask."""

    output: ClassVar[str] = "logits"
    model: Any
    options: HeadOptions

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        # Only the masked rows: the whole [S, V] product of one long text would take a gigabyte.
        masked = states.masked_tokens() if self.options.logits == "masked" else None
        head = head_of(self.model, "fill-mask")
        if masked is not None:
            return head(_transformed(self.model, masked))
        hidden = states.hidden
        # On rows [B*S, H] a graph's decoder is a Gemm that shares the embedding's matrix as it is stored.
        logits = head(_transformed(self.model, hidden.reshape(-1, hidden.shape[-1])))
        return states.padded(logits.reshape(*hidden.shape[:-1], -1))


@dataclass(frozen=True)
class ClassifyHead:
    """Logits of the labels of each row, [B, L]."""

    output: ClassVar[str] = "logits"
    model: Any
    options: HeadOptions

    @property
    def classifier(self) -> torch.nn.Module:
        """The linear layer."""
        return head_of(self.model, "classify")

    def features(self, states: States) -> Tensor:
        """Return the input of the linear layer, [B, H]."""
        family = family_of(self.model.config)
        if family.head_transform is not None:
            takes_first = family.classifier_pooling(self.model.config) == "cls"
            pooled = states.first_tokens() if takes_first else states.mean_tokens()
            return _transformed(self.model, pooled.to(states.hidden.dtype))
        dense = family.classifier_dense
        return states.pooled() if dense is None else self.model.get_submodule(dense)(states.first_tokens()).tanh()

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        logits: Tensor = self.classifier(self.features(states))
        return logits


@dataclass(frozen=True)
class TokenClassifyHead:
    """Logits of the labels of each token, [B, S, L]."""

    output: ClassVar[str] = "logits"
    model: Any
    options: HeadOptions

    @property
    def classifier(self) -> torch.nn.Module:
        """The linear layer."""
        return head_of(self.model, "token-classify")

    def features(self, states: States) -> Tensor:
        """Return the input of the linear layer, [B, S, H] or [T, H]."""
        return _transformed(self.model, states.hidden)

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        return states.padded(self.classifier(self.features(states)))


@dataclass(frozen=True)
class TokenReluHead(TokenClassifyHead):
    """Weights of the tokens for a hybrid model: relu of the logit of a classifier with one label, [B, S, 1]."""

    output: ClassVar[str] = TOKEN_WEIGHTS

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        return torch.relu(super().__call__(states))


@dataclass(frozen=True)
class SparseHead:
    """Weights of the vocabulary's entries, [B, V], by a module of `sparse_heads`."""

    output: ClassVar[str] = "sparse_embedding"
    module: torch.nn.Module

    @classmethod
    def of(cls, model: Any, options: HeadOptions) -> SparseHead:
        """Build the module. Its parameters are those of the model, not copies."""
        assert options.sparse is not None  # a model for this task has a SparseSpec
        return cls(sparse_head(model, options.sparse))

    def __call__(self, states: States) -> Tensor:
        """See `Head`."""
        return self.module(*states.tokens_of_batch())


HEADS: dict[TaskName, tuple[Callable[[Any, HeadOptions], Head], ...]] = {
    "fill-mask": (FillMaskHead,),
    "embed": (EmbedHead,),
    "classify": (ClassifyHead,),
    "token-classify": (TokenClassifyHead,),
    "sparse": (SparseHead.of,),
    "hybrid": (EmbedHead, TokenReluHead),
    "multi-vector": (MultiVectorHead,),
}
"""Task -> functions that make its heads, one for each output, from a transformers model and options."""


def make_heads(model: Any, options: HeadOptions) -> tuple[Head, ...]:
    """The heads of the task in `options`, on the modules of `model`."""
    return tuple(make(model, options) for make in HEADS[options.task])

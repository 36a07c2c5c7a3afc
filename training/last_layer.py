"""The last layer of an encoder for some rows only: the masked ones, which alone are predicted.

All tokens give keys and values. Only the chosen rows need a query, and only they go through the output projection, the
MLP and the norms. nomic's contrastors leave out the same work. The chosen rows are those of the whole layer.

Legend: T tokens of a packed row, N sequences, M chosen tokens, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GteForMaskedLM
from transformers.models.gte.modeling_gte import GteAttention, GteLayer, rotate_half

from gte_deploy.models.attention import packed_attention


class ChosenRowsLayer(GteLayer):
    """A GteLayer that returns the outputs of chosen rows. It has the parameters of GteLayer, under their names."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        rows: Tensor,
        cu_seqlens_q: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Compute the outputs `[1, M, H]` of the chosen rows.

        Args:
            hidden_states: `[1, T, H]`.
            rows: `[M] int64`, positions in the packed row, ascending; at least one.
            cu_seqlens_q: `[N + 1] int32`, the number of chosen rows before each boundary (see `rows_before`).
            position_embeddings: cosines and sines of RoPE, `[1, T, D]` each.
            cu_seqlens: `[N + 1] int32`, the offset of each sequence, and T.
            max_seqlen: upper bound of the sequences' lengths.
        """
        chosen = hidden_states.index_select(1, rows)
        attended = self.self_attn(
            hidden_states,
            chosen=chosen,
            position_embeddings=position_embeddings,
            of_chosen=[x.index_select(1, rows) for x in position_embeddings],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cu_seqlens_q=cu_seqlens_q,
        )
        chosen = self.post_attention_layernorm(chosen + self.post_attention_dropout(attended))
        return self.post_mlp_layernorm(chosen + self.post_mlp_dropout(self.mlp(chosen)))


class ChosenRowsAttention(GteAttention):
    """The attention of a ChosenRowsLayer, with the parameters of GteAttention: sharding gathers them when it runs."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        *,
        chosen: Tensor,
        position_embeddings: Sequence[Tensor],
        of_chosen: Sequence[Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        cu_seqlens_q: Tensor,
    ) -> Tensor:
        """Compute what the attention adds to the chosen rows, `[1, M, H]`.

        Args:
            hidden_states: `[1, T, H]`, for keys and values.
            chosen: `[1, M, H]`, for queries.
            position_embeddings: cosines and sines of RoPE of all tokens, `[1, T, D]` each.
            of_chosen: those of the chosen rows, `[1, M, D]` each.
            cu_seqlens: `[N + 1] int32`, as of ChosenRowsLayer.
            max_seqlen: as of ChosenRowsLayer.
            cu_seqlens_q: `[N + 1] int32`, as of ChosenRowsLayer.
        """
        attended, _ = packed_attention(
            self,
            _rotate(_heads(self.q_proj(chosen), self.head_dim), *of_chosen),
            _rotate(_heads(self.k_proj(hidden_states), self.head_dim), *position_embeddings),
            _heads(self.v_proj(hidden_states), self.head_dim),
            None,
            scaling=self.scaling,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cu_seqlens_q=cu_seqlens_q,
        )
        return self.o_proj(attended.flatten(2))


def rows_before(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Count the chosen rows before each boundary of the sequences, `[N + 1] int32`. `rows` ascends."""
    # Not in the layer: inductor's C++ for this does not compile.
    return torch.searchsorted(rows, cu_seqlens.to(rows.dtype), out_int32=True)


def choose_rows_in_last_layer(model: GteForMaskedLM) -> None:
    """Turn the last layer of a model into a ChosenRowsLayer, in place. The model's own forward does not run then."""
    # A class of its own, and no module around the layer, which would change the names of the parameters.
    last: Any = model.gte.layers[-1]
    last.__class__, last.self_attn.__class__ = ChosenRowsLayer, ChosenRowsAttention


def _heads(x: Tensor, size: int) -> Tensor:
    """Split `[1, T, H]` into heads, `[1, heads, T, D]`."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to `[1, heads, T, D]`."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]

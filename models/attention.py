"""Packed (padding-free) attention for the models of transformers, registered as `gte_packed`.

Several sequences follow one another in one row `[1, T]`; `cu_seqlens` holds their boundaries, and no token sees
another sequence. transformers' own implementations cannot do this here: with `position_ids` alone, or with
`cu_seq_lens_*` under eager, sdpa and flex attention, packed sequences leak into each other without an error.

    register_packed_attention()
    model = GteForMaskedLM._from_config(config, attn_implementation=PACKED_ATTENTION)
    model.gte(input_ids=ids[None], position_ids=positions[None], cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)

Legend: T tokens of the whole row, N sequences, H heads, D head size, L tokens of one sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gte_deploy.core.errors import InputError

PACKED_ATTENTION = "gte_packed"

_Attention = TypeVar("_Attention", bound=Callable[..., Tensor])


def register_packed_attention() -> None:
    """Register `attn_implementation="gte_packed"` with transformers; further calls change nothing."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _refuse_mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    sliding_window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute attention to both sides inside each packed sequence, in the calling convention of transformers.

    Args:
        module: the calling attention layer; unused.
        query: `[1, H, T, D]`, or `[1, H, Q, D]` with `cu_seqlens_q`.
        key: `[1, H, T, D]`.
        value: as key.
        attention_mask: None; `cu_seqlens` replaces it.
        scaling: factor of the scores; None for 1/sqrt(D).
        dropout: 0; the family uses none here, and the variable-length kernels support none.
        cu_seqlens: `[N + 1] int32`: the start of each sequence, then T. Equal neighbours are empty sequences.
        max_seqlen: length in tokens of the longest sequence, or any larger number; only the CUDA kernel reads it.
        sliding_window: a token sees those that are fewer than this many tokens away; None for the whole sequence.
        cu_seqlens_q: `[N + 1] int32`: where the queries of each sequence start, then Q, if only some tokens ask. None:
            every token asks.
        kwargs: arguments for other implementations; unused.

    Returns:
        `[1, T, H, D]` (Q in place of T with `cu_seqlens_q`), and None in place of the attention weights.

    Raises:
        InputError: there is more than one row, a mask, dropout, no `cu_seqlens`, a `cu_seqlens` that does not end at T,
            or both a window and `cu_seqlens_q`.
    """
    if cu_seqlens is None or max_seqlen is None:
        raise InputError(f"{PACKED_ATTENTION} got no cu_seqlens or max_seqlen: pass both to the model's forward")
    if query.shape[0] != 1 or attention_mask is not None or dropout:
        raise InputError(
            f"{PACKED_ATTENTION} takes one packed row, no mask and no dropout; received {query.shape[0]} rows, "
            f"mask {attention_mask is not None}, dropout {dropout}"
        )
    if cu_seqlens_q is not None and sliding_window is not None:
        raise InputError(f"{PACKED_ATTENTION} takes a sliding_window or cu_seqlens_q, not both")
    q, k, v = (_in_autocast_dtype(x)[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    reach = None if sliding_window is None else sliding_window - 1
    if _has_varlen_kernel(q, windows=reach is not None):
        out = _attend_varlen(
            q, k, v, cu_seqlens, max_seqlen=max_seqlen, scaling=scaling, reach=reach, cu_seqlens_q=cu_seqlens_q
        )
    elif cu_seqlens_q is not None:
        out = _attend_from_some(q, k, v, cu_seqlens, cu_seqlens_q, scaling=scaling)
    else:
        out = _attend_per_segment(q, k, v, cu_seqlens, scaling=scaling, reach=reach)
    return out[None], None


def _refuse_mask(*, attention_mask: Tensor | None = None, **kwargs: object) -> None:
    """Return no mask: `gte_packed` would ignore a padding mask, so one is refused."""
    if attention_mask is not None:
        raise InputError(f"{PACKED_ATTENTION} takes cu_seqlens in place of attention_mask; remove the padding first")


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """Cast to autocast's dtype. RoPE turns 16-bit q and k into float32; autocast does not cover the flash kernel."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _find_varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # The first versions of the function have no parameter `scale`.
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


_VARLEN_ATTN = _find_varlen_attn()
# The next version of the function got this parameter.
_HAS_WINDOWS = _VARLEN_ATTN is not None and "window_size" in inspect.signature(_VARLEN_ATTN).parameters


def _has_varlen_kernel(query: Tensor, *, windows: bool = False) -> bool:
    """Whether the flash kernel can run: CUDA, Ampere or newer, 16-bit. Otherwise attention runs segment by segment."""
    return (
        _VARLEN_ATTN is not None
        and (_HAS_WINDOWS or not windows)
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _not_compiled(function: _Attention) -> _Attention:
    # The annotations of torch.compiler.disable lose the function's signature.
    return cast(_Attention, torch.compiler.disable(function))


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scaling: float | None,
    reach: int | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Compute `[T, H, D]` with the variable-length flash kernel; `reach` as in `_attend_per_segment`."""
    assert _VARLEN_ATTN is not None  # as _has_varlen_kernel checked
    window: dict[str, Any] = {} if reach is None else {"window_size": (reach, reach)}
    asking = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    return _VARLEN_ATTN(query, key, value, asking, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, **window)


@_not_compiled
def _attend_per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float | None,
    reach: int | None = None,
) -> Tensor:
    """Compute `[T, H, D]` with one call of scaled_dot_product_attention for each distinct length.

    A token sees those that are at most `reach` tokens away; None for all of its sequence.
    """
    lengths = _lengths(cu_seqlens, tokens=query.shape[0])
    # split and stack, not indexing: their gradients are plain copies, while that of index_select is a slow scattered
    # sum.
    segments = [x.split(lengths) for x in (query, key, value)]
    out: list[Tensor] = [query[:0]] * len(lengths)
    for members in _equal_lengths(lengths):
        q, k, v = (torch.stack([part[i] for i in members]).transpose(1, 2) for part in segments)  # [n, H, L, D]
        mask = None if reach is None else _band(q.shape[2], reach, q.device)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2)
        for i, rows in zip(members, attended.unbind(), strict=True):
            out[i] = rows
    return torch.cat(out)


@_not_compiled
def _attend_from_some(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_q: Tensor, *, scaling: float | None
) -> Tensor:
    """Compute `[Q, H, D]` where only some tokens of each sequence ask, with one call for each distinct length of keys.

    The queries of sequences of one length are padded to the most that one of them has; the padding is left out again.
    """
    lengths = _lengths(cu_seqlens, tokens=key.shape[0])
    asking = _lengths(cu_seqlens_q, tokens=query.shape[0])
    queries, keys, values = query.split(asking), key.split(lengths), value.split(lengths)
    out: list[Tensor] = [query[:0]] * len(lengths)
    for members in _equal_lengths(lengths):
        q = nn.utils.rnn.pad_sequence([queries[i] for i in members], batch_first=True).transpose(1, 2)  # [n, H, Q, D]
        k, v = (torch.stack([part[i] for i in members]).transpose(1, 2) for part in (keys, values))  # [n, H, L, D]
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
        for i, rows in zip(members, attended.unbind(), strict=True):
            out[i] = rows[: asking[i]]
    return torch.cat(out)


def _lengths(cu_seqlens: Tensor, *, tokens: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise InputError(
            f"cu_seqlens must rise from 0 to the row's {tokens} tokens; it goes from {bounds[0]} to {bounds[-1]}, with "
            f"steps from {min(lengths)}. Give padding tokens a sequence of their own"
        )
    return lengths


def _band(length: int, reach: int, device: torch.device) -> Tensor | None:
    """The bool mask `[L, L]` of the pairs of tokens that are at most `reach` away; None where these are all pairs."""
    if length <= reach + 1:
        return None
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() <= reach


def _equal_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the non-empty segments, grouped by length."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        if length:
            groups.setdefault(length, []).append(i)
    return list(groups.values())

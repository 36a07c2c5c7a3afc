"""RoPE as the family scales it: formulas, and the RoPE that transformers does not know.

Legend: theta = RoPE base, s = NTK factor, d = head size, b = mixed_b, i = 0 … d/2 - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

NTK_MIXED = "ntk_mixed"
"""Name under which the RoPE with mixed_b is registered with transformers; see `register_rope`."""

LONGROPE_FIELDS = ("short_factor", "long_factor", "attention_factor", "original_max_position_embeddings")
"""The fields that `longrope` adds."""


def ntk_rope(*, theta: float, factor: float, head_dim: int, mixed_b: float | None = None) -> dict[str, Any]:
    """`rope_parameters` of the family's fixed NTK scaling, which holds at every length.

    Without mixed_b, inv_freq_i = (theta s)^(-2i/d) / s^(2/d): transformers' "linear" type of base theta s and factor
    s^(2/d). With it, inv_freq_i = theta^(-2i/d) / exp(a (i+1)^b), a = ln(s) / (d/2)^b, which has a type of our own.
    """
    if mixed_b is None:
        return {"rope_type": "linear", "rope_theta": float(theta * factor), "factor": factor ** (2 / head_dim)}
    return {"rope_type": NTK_MIXED, "rope_theta": float(theta), "factor": float(factor), "mixed_b": float(mixed_b)}


def register_rope() -> None:
    """Make the RoPE with mixed_b known to transformers, through the table it offers for that; twice does no harm."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS[NTK_MIXED] = _compute_ntk_mixed


def longrope(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> dict[str, Any]:
    """A RoPE with mixed_b as "longrope", the one type of transformers that has a divisor for each frequency."""
    divisors = _ntk_mixed_divisors(rope["factor"], rope["mixed_b"], head_dim)
    return {
        **rope,
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": list(divisors),
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_positions,
    }


def ntk_of_linear(base: float, linear_factor: float, head_dim: int) -> tuple[float, float]:
    """(theta, s) of a linear RoPE. Every linear RoPE is one: s = factor^(d/2), theta = base / s."""
    factor = linear_factor ** (head_dim / 2)
    # The power amplifies the last bit; the published factors are short decimals, so a rounded one that gives exactly
    # the same linear RoPE is the one that was meant.
    rounded = float(f"{factor:.10g}")
    theta = float(f"{base / rounded:.10g}")
    exact = ntk_rope(theta=theta, factor=rounded, head_dim=head_dim)
    if exact["rope_theta"] == base and exact["factor"] == linear_factor:
        return theta, rounded
    return base / factor, factor


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's own `rope_parameters`, as a copy."""
    return dict(config.rope_parameters or {})


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return config.hidden_size // config.num_attention_heads


def _ntk_mixed_divisors(factor: float, mixed_b: float, head_dim: int) -> list[float]:
    half = head_dim // 2
    a = math.log(factor) / half**mixed_b
    return [math.exp(a * (i + 1) ** mixed_b) for i in range(half)]


def _compute_ntk_mixed(
    config: PreTrainedConfig,
    device: torch.device | None = None,
    seq_len: int | None = None,
    layer_type: str | None = None,
) -> tuple[torch.Tensor, float]:
    """inv_freq [d/2] float32 and the attention factor, in the signature of transformers' ROPE_INIT_FUNCTIONS."""
    import torch

    rope, head_dim = rope_parameters(config), head_size(config)
    divisors = _ntk_mixed_divisors(rope["factor"], rope["mixed_b"], head_dim)
    inv_freq = [rope["rope_theta"] ** (-2 * i / head_dim) / divisor for i, divisor in enumerate(divisors)]
    return torch.tensor(inv_freq, dtype=torch.float32, device=device), 1.0

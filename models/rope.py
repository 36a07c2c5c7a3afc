"""The family's scaled RoPE: its formulas, and the variant that transformers does not have.

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
"""The name of the RoPE with mixed_b in transformers; see `register_rope`."""

LONGROPE_FIELDS = ("short_factor", "long_factor", "attention_factor", "original_max_position_embeddings")
"""The fields that a `longrope` config adds."""


def ntk_rope(*, theta: float, factor: float, head_dim: int, mixed_b: float | None = None) -> dict[str, Any]:
    """Return `rope_parameters` for the family's fixed NTK scaling, which is the same at every length.

    Without mixed_b, inv_freq_i = (theta s)^(-2i/d) / s^(2/d): transformers' "linear" type of base theta s and factor
    s^(2/d). With mixed_b, inv_freq_i = theta^(-2i/d) / exp(a (i+1)^b), a = ln(s) / (d/2)^b, a type of this package.
    """
    if mixed_b is None:
        return {"rope_type": "linear", "rope_theta": float(theta * factor), "factor": factor ** (2 / head_dim)}
    return {"rope_type": NTK_MIXED, "rope_theta": float(theta), "factor": float(factor), "mixed_b": float(mixed_b)}


def register_rope() -> None:
    """Register the RoPE with mixed_b in transformers' table of RoPE types; further calls change nothing."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS[NTK_MIXED] = _compute_ntk_mixed


def longrope(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> dict[str, Any]:
    """Convert a RoPE with mixed_b to "longrope", the only type of transformers with one divisor for each frequency."""
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
    """Return (theta, s) of a linear RoPE. Every linear RoPE has these: s = factor^(d/2), theta = base / s."""
    factor = linear_factor ** (head_dim / 2)
    # The power amplifies the last bit. The published factors are short decimals, so a rounded factor that gives
    # exactly the same linear RoPE is the published one.
    rounded = float(f"{factor:.10g}")
    theta = float(f"{base / rounded:.10g}")
    exact = ntk_rope(theta=theta, factor=rounded, head_dim=head_dim)
    if exact["rope_theta"] == base and exact["factor"] == linear_factor:
        return theta, rounded
    return base / factor, factor


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a copy of the config's own `rope_parameters`."""
    return dict(config.rope_parameters or {})


def rope_kinds(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Return kind of layer -> its `rope_parameters`; the kind is None where all layers have the same."""
    rope = rope_parameters(config)
    kinds: Any = getattr(config, "layer_types", None)
    return {None: rope} if not kinds or "rope_type" in rope else {kind: dict(rope[kind]) for kind in sorted(set(kinds))}


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
    """Return inv_freq [d/2] float32 and the attention factor, with the signature of ROPE_INIT_FUNCTIONS."""
    import torch

    rope, head_dim = rope_parameters(config), head_size(config)
    divisors = _ntk_mixed_divisors(rope["factor"], rope["mixed_b"], head_dim)
    inv_freq = [rope["rope_theta"] ** (-2 * i / head_dim) / divisor for i, divisor in enumerate(divisors)]
    return torch.tensor(inv_freq, dtype=torch.float32, device=device), 1.0

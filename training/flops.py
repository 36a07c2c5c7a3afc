"""Floating-point operations of a training step, counted as model FLOPs: what is computed again is not counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import GteConfig

# Backward costs twice the forward: one product for the inputs' gradient, one for the weights'.
_FORWARD_AND_BACKWARD = 3

# Dense bfloat16 peak with fp32 accumulation, without sparsity, FLOP/s, from NVIDIA's data sheets. Longest name first.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def training_flops(config: GteConfig, *, tokens: float, squared_lengths: float, masked: float) -> float:
    """FLOPs of forward and backward over packed sequences, a multiply-add counted as two.

    Args:
        config: of the model.
        tokens: real tokens.
        squared_lengths: sum over the sequences of length²; every token attends to its whole sequence.
        masked: tokens that go through the vocabulary projection.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * hidden + 3 * hidden * wide
    attention = 2 * hidden  # scores and weighted sum, per pair of tokens
    head = hidden * hidden + hidden * config.vocab_size
    products = config.num_hidden_layers * (layer * tokens + attention * squared_lengths) + head * masked
    return 2.0 * _FORWARD_AND_BACKWARD * products


def device_peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of a known GPU; None for a CPU or an unknown one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)

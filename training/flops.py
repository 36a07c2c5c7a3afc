"""Floating-point operations of training, and the peaks of GPUs.

A share of the peak is that of model FLOPs: those of the model as published, whatever a run computes. Gradient
checkpointing computes parts of the forward pass again, and these are not counted; the last layer computes less than the
others (see `training/last_layer.py`), and this is not deducted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import GteConfig

# The backward pass has two matrix products (the gradients of inputs and of weights) for each one of the forward pass.
_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Gpu:
    """One model of GPU, from NVIDIA's data sheets.

    Args:
        device_name: a part of the name that CUDA reports.
        peak_flops: dense bfloat16 peak in FLOP/s, with fp32 accumulation and without sparsity.
        memory: bytes.
    """

    device_name: str
    peak_flops: float
    memory: float


# The GPUs that `gte-train estimate --gpu` knows.
GPUS = {
    "b200": Gpu("B200", 2250e12, 180e9),
    "h200": Gpu("H200", 989e12, 141e9),
    "h100": Gpu("H100", 989e12, 80e9),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 80e9),
    "a100": Gpu("A100", 312e12, 80e9),
    "a100-40gb": Gpu("A100", 312e12, 40e9),
    "l40s": Gpu("L40S", 362e12, 48e9),
    "a10g": Gpu("A10G", 70e12, 24e9),
    "l4": Gpu("L4", 121e12, 24e9),
    "rtx4090": Gpu("RTX 4090", 165e12, 24e9),
}
# Further GPUs of which a run reports its share of the peak: peak FLOP/s by a part of CUDA's name, as above.
_OTHER_PEAKS = {"H100 NVL": 835e12, "A10": 125e12, "V100": 125e12, "T4": 65e12, "RTX 3090": 71e12}


def training_flops(config: GteConfig, *, tokens: float, squared_lengths: float, masked: float) -> float:
    """Count the FLOPs of a forward and a backward pass over packed sequences. A multiply-add counts as two.

    Args:
        config: the model's config.
        tokens: number of tokens, without padding.
        squared_lengths: sum of the squared lengths of the sequences; every token attends to its whole sequence.
        masked: number of masked tokens, which go through the vocabulary projection.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * hidden + 3 * hidden * wide
    attention = 2 * hidden  # scores and weighted sum, per pair of tokens
    head = hidden * hidden + hidden * config.vocab_size
    products = config.num_hidden_layers * (layer * tokens + attention * squared_lengths) + head * masked
    return 2.0 * _FORWARD_AND_BACKWARD * products


def computed_flops(
    config: GteConfig, *, tokens: float, squared_lengths: float, masked: float, masked_by_lengths: float
) -> float:
    """Count the FLOPs that a pass of `PackedMaskedLM` really has, without gradient checkpointing.

    They are fewer than `training_flops`: in the last layer only masked tokens have a query and an MLP.

    Args:
        config: the model's config.
        tokens: number of tokens.
        squared_lengths: sum of the squared lengths of the sequences.
        masked: number of masked tokens.
        masked_by_lengths: sum over the sequences of their masked tokens times their length.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    unmasked_products = (2 * hidden * hidden + 3 * hidden * wide) * (tokens - masked)
    unmasked_attention = 2 * hidden * (squared_lengths - masked_by_lengths)
    whole = training_flops(config, tokens=tokens, squared_lengths=squared_lengths, masked=masked)
    return whole - 2.0 * _FORWARD_AND_BACKWARD * (unmasked_products + unmasked_attention)


def device_peak_flops(device: torch.device) -> float | None:
    """Return the peak bfloat16 FLOP/s of a known GPU; None for an unknown GPU or a CPU."""
    if device.type != "cuda":
        return None
    import torch  # here: this module's table is read by `gte-train --help`, which must not wait for torch

    name = torch.cuda.get_device_name(device)
    peaks = {gpu.device_name: gpu.peak_flops for gpu in GPUS.values()} | _OTHER_PEAKS
    known = [part for part in peaks if part in name]
    return peaks[max(known, key=len)] if known else None  # "H100 PCIe" rather than "H100"

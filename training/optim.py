"""The card's optimizer, AdamW with weight decay decoupled from the learning rate, and the schedules.

Composer's DecoupledAdamW (which MosaicBERT used, and GTE after it) multiplies a weight by `1 - decay * lr_t / lr_peak`
in each step. torch.optim.AdamW multiplies it by `1 - lr_t * weight_decay`. The two are equal for
`weight_decay = decay / lr_peak`: 1e-5 becomes 0.05 at a peak of 2e-4, and 0.2 at 5e-5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from gte_deploy.training.recipe import Stage


def build_optimizer(model: nn.Module, stage: Stage, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW of a stage. Vectors (biases, LayerNorm) do not decay, as in BERT's own optimizer (arXiv 1810.04805, code).

    The recipe's papers do not say whether they decay; MosaicBERT decays everything.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": stage.optimizer.weight_decay / stage.learning_rate,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=stage.learning_rate, betas=stage.optimizer.betas, eps=stage.optimizer.eps, fused=fused
    )


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate of a step in 0 … stage.steps - 1: a pure function, so a resume needs no scheduler state.

    Warm-up and linear decay are transformers' `get_linear_schedule_with_warmup`, the others its `get_wsd_schedule`
    with linear or 1-sqrt decay (the latter from arXiv 2405.18392).
    """
    warmup = math.ceil(stage.warmup_ratio * stage.steps)
    if step < warmup:
        return stage.learning_rate * step / warmup
    decay = stage.steps - warmup
    if stage.schedule != "linear":
        decay = math.ceil(stage.decay_ratio * stage.steps)
    progress = max(0.0, (step - (stage.steps - decay)) / max(1, decay))
    if stage.schedule == "one_minus_sqrt":
        progress = math.sqrt(progress)
    return stage.learning_rate * max(0.0, 1.0 - progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value

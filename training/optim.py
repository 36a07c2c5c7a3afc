"""The published optimizer, AdamW with a weight decay decoupled from the learning rate, and the schedules.

Composer's DecoupledAdamW, which MosaicBERT and after it GTE used, multiplies a weight by `1 - decay * lr_t / lr_peak`
in each step. torch.optim.AdamW multiplies it by `1 - lr_t * weight_decay`. Both do the same if
`weight_decay = decay / lr_peak`: a decay of 1e-5 becomes 0.05 at a peak of 2e-4, and 0.2 at a peak of 5e-5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from gte_deploy.training.recipe import Optimizer, Stage


def build_optimizer(
    model: nn.Module, settings: Optimizer, *, learning_rate: float, fused: bool = False
) -> torch.optim.AdamW:
    """Make AdamW for a model.

    Vectors (biases, LayerNorm) do not decay, as in BERT's own optimizer (arXiv 1810.04805, code). The papers of the
    recipe do not say whether they decay; MosaicBERT decays everything.

    Args:
        model: the parameters that need a gradient are optimized.
        settings: weight decay, betas and eps.
        learning_rate: the peak of the schedule, from which the decay is decoupled.
        fused: use PyTorch's fused step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay / learning_rate},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=settings.betas, eps=settings.eps, fused=fused)


def decay_start(stage: Stage) -> int:
    """The number of steps before the learning rate begins to fall: the end of the warm-up, or of the plateau."""
    if stage.schedule == "linear":
        return math.ceil(stage.warmup_ratio * stage.steps)
    return stage.steps - math.ceil(stage.decay_ratio * stage.steps)


def plateau_end(stage: Stage) -> int | None:
    """The number of steps after which the plateau of a stage is over; None for a schedule without a plateau."""
    return None if stage.schedule == "linear" else decay_start(stage)


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step in 0 … stage.steps - 1. It is a pure function: a resumed run needs no scheduler.

    The schedule "linear" equals transformers' `get_linear_schedule_with_warmup`. "wsd" and "one_minus_sqrt" equal its
    `get_wsd_schedule` with a linear and a 1-sqrt decay (the latter from arXiv 2405.18392).
    """
    warmup = math.ceil(stage.warmup_ratio * stage.steps)
    if step < warmup:
        return stage.learning_rate * step / warmup
    start = decay_start(stage)
    progress = max(0.0, (step - start) / max(1, stage.steps - start))
    if stage.schedule == "one_minus_sqrt":
        progress = math.sqrt(progress)
    return stage.learning_rate * max(0.0, 1.0 - progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value

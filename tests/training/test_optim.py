"""AdamW's decoupled decay against Composer's rule written out, and the schedules against transformers'."""

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup, get_wsd_schedule

from gte_deploy.training.optim import build_optimizer, learning_rate, set_learning_rate
from gte_deploy.training.recipe import Optimizer, Stage


def make_stage(**changes) -> Stage:
    base = dict(name="s", max_length=8, rope_theta=1e4, steps=50, batch_size=1, learning_rate=2e-3, warmup_ratio=0.1)
    return Stage(**{**base, **changes})


def composer_step(p, gradient, moments, step, *, lr, initial_lr, decay, betas, eps):
    """Composer's DecoupledAdamW: the decay is multiplied by lr / initial_lr, not by lr."""
    p.mul_(1 - decay * (lr / initial_lr))
    first, second = moments
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (second / (1 - betas[1] ** step)).sqrt().add_(eps)
    p.addcdiv_(first, denominator, value=-lr / (1 - betas[0] ** step))


def test_decay_equals_composers_decoupled_adamw():
    # A large decay, so that a wrong scale would show.
    stage = make_stage(optimizer=Optimizer(weight_decay=1e-2, betas=(0.9, 0.98), eps=1e-6))
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 5).double()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    optimizer = build_optimizer(model, stage.optimizer, learning_rate=stage.learning_rate)
    for step in range(stage.steps):
        rate = learning_rate(stage, step)
        set_learning_rate(optimizer, rate)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            composer_step(
                expected[name],
                parameter.grad,
                moments[name],
                step + 1,
                lr=rate,
                initial_lr=stage.learning_rate,
                decay=1e-2 if name == "weight" else 0.0,
                betas=(0.9, 0.98),
                eps=1e-6,
            )
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-10, atol=1e-12)


def test_published_values_in_torch_terms():
    model = nn.Linear(2, 2)
    decays = [
        build_optimizer(model, Optimizer(), learning_rate=lr).param_groups[0]["weight_decay"] for lr in (2e-4, 5e-5)
    ]
    assert decays == pytest.approx([0.05, 0.2])


def test_vectors_do_not_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    decayed, plain = build_optimizer(model, Optimizer(), learning_rate=2e-3).param_groups
    assert decayed["params"] == [model[0].weight] and plain["weight_decay"] == 0
    assert plain["params"] == [model[0].bias, model[1].weight, model[1].bias]


@pytest.mark.parametrize(
    ("schedule", "decay_type"), [("linear", None), ("wsd", "linear"), ("one_minus_sqrt", "1-sqrt")]
)
def test_schedules_equal_transformers(schedule, decay_type):
    stage = make_stage(schedule=schedule, decay_ratio=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=stage.learning_rate)
    if decay_type is None:
        theirs = get_linear_schedule_with_warmup(optimizer, 5, stage.steps)
    else:
        theirs = get_wsd_schedule(optimizer, 5, 15, num_training_steps=stage.steps, decay_type=decay_type)
    for step in range(stage.steps):
        assert learning_rate(stage, step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(make_stage(warmup_ratio=0.0), 0) == 2e-3

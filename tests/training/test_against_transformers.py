"""Ours against training as a user of transformers would write it, on the same pre-masked batches."""

import numpy as np
import torch
from torch import nn
from transformers import GteConfig, GteForMaskedLM, get_linear_schedule_with_warmup

from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.packing import StepSettings, padded_micro_batches
from gte_deploy.training.data.sampling import ChunkIndex, Chunking
from gte_deploy.training.log import read_log
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.state import stage_seed
from gte_deploy.training.train import train

STEPS, BATCH, LENGTH, RATE, DECAY, SEED = 200, 8, 32, 1e-3, 1e-5, 3


def plain_losses(architecture, corpus_folder) -> list[float]:
    """Padded rows, GteForMaskedLM's own loss, torch's AdamW in two groups, transformers' schedule."""
    config = GteConfig.from_pretrained(architecture)
    torch.manual_seed(SEED)
    model = GteForMaskedLM(config).train()
    named = list(model.named_parameters())
    without_decay = [p for name, p in named if name.endswith("bias") or "norm" in name.lower()]
    skipped = {id(p) for p in without_decay}
    groups = [
        {"params": [p for _, p in named if id(p) not in skipped], "weight_decay": DECAY / RATE},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * STEPS), STEPS)
    seed = stage_seed(SEED, 0)
    index = ChunkIndex(TokenCorpus.open(corpus_folder), Chunking(LENGTH), seed=seed)
    settings = StepSettings(batch_size=BATCH, token_budget=BATCH * LENGTH, seed=seed, masking=Masking())
    losses = []
    for step in range(STEPS):
        (batch,) = padded_micro_batches(index, step, settings)
        labels = np.full(batch.input_ids.size, -100)
        labels[batch.masked_positions] = batch.labels
        loss = model(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.attention_mask),
            labels=torch.from_numpy(labels.reshape(batch.input_ids.shape)),
        ).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_200_steps_equal_plain_transformers(corpus_folder, make_recipe, tmp_path):
    stage = {"max_length": LENGTH, "batch_size": BATCH, "learning_rate": RATE}
    raw = make_recipe(steps=(STEPS,), dropout=0.0, stage=stage, seed=SEED, tokens_per_micro_batch=96, log_every=50)
    raw["checkpoint_every"] = STEPS
    train(recipe_from_dict(raw), data=corpus_folder, output=tmp_path, tensorboard=False)
    ours = [record["loss"] for record in read_log(tmp_path / "log.jsonl")]
    plain = plain_losses(raw["model"], corpus_folder)
    assert len(ours) == STEPS and np.mean(plain[-10:]) < plain[0] - 0.02  # it learnt, so the steps did something
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


def test_the_comparison_would_see_a_missing_decay_or_another_rate():
    """The tolerance of the comparison above is small against what a wrong optimizer would do."""
    target = torch.ones(4)
    results = []
    for rate, decay in ((RATE, DECAY / RATE), (RATE, 0.0), (1.05 * RATE, DECAY / RATE)):
        weight = nn.Parameter(torch.zeros(4) + 3.0)
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay, betas=(0.9, 0.98), eps=1e-6)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (weight - target).square().mean()
            loss.backward()
            optimizer.step()
        results.append(loss.item())
    assert min(abs(results[0] - other) for other in results[1:]) > 1e-3

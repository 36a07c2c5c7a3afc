"""The bill before the run: against the published totals, against tensors counted in a backward pass, and by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gte_deploy.core.errors import ConfigError, InputError
from gte_deploy.models.config import build_config
from gte_deploy.training.cli import main
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.sampling import ChunkIndex
from gte_deploy.training.estimate import (
    activation_bytes,
    average_lengths,
    corpus_lengths,
    estimate,
    parameter_sizes,
    stage_lengths,
    table,
)
from gte_deploy.training.flops import GPUS, device_peak_flops
from gte_deploy.training.model import PackedMaskedLM, build_model
from gte_deploy.training.options import Hardware
from gte_deploy.training.recipe import load_recipe, recipe_from_dict

H100 = GPUS["h100"].peak_flops


@pytest.mark.parametrize(
    ("name", "tokens", "gpu_hours"),
    [("gte-en-mlm-base", [587, 168], 583), ("gte-en-mlm-large", [629, 252, 252], 2570)],
)
def test_english_recipes_cost_what_the_published_totals_say(name, tokens, gpu_hours):
    result = estimate(load_recipe(name), Hardware(gpus=8, peak_flops=H100, utilization=0.4))
    assert result.gpu_hours == pytest.approx(gpu_hours, rel=0.02)
    assert result.hours == pytest.approx(result.gpu_hours / 8)
    assert [round(stage.tokens / 1e9) for stage in result.stages] == tokens


@pytest.mark.parametrize(
    ("name", "millions"), [("gte-en-mlm-base", 137), ("gte-en-mlm-large", 435), ("gte-multilingual-mlm-base", 306)]
)
def test_parameters_are_the_published_counts(name, millions):
    assert parameter_sizes(build_config(name)).total / 1e6 == pytest.approx(millions, abs=0.7)


def test_flops_per_token_by_hand():
    stage = estimate(load_recipe("gte-en-mlm-base"), Hardware(peak_flops=H100)).stages[0]
    assert stage.body_flops_per_token == 6 * 12 * (4 * 768**2 + 3 * 768 * 3072)
    assert stage.attention_flops_per_token == 6 * 12 * 2 * 768 * 2048
    assert stage.head_flops_per_token == pytest.approx(6 * 0.3 * (768**2 + 768 * 30528))
    parts = stage.body_flops_per_token + stage.attention_flops_per_token + stage.head_flops_per_token
    assert stage.flops == pytest.approx(stage.tokens * parts)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_bytes_are_those_that_autograd_keeps(bfloat16, dropout):
    tokens = 320  # no dimension of the model, so that a tensor's first size tells activations from cast weights
    config = build_config("gte-en-mlm-tiny")
    config.hidden_dropout_prob, config.vocab_size = dropout, 64
    module = PackedMaskedLM(build_model(config, rope_theta=10_000))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids, masked = torch.arange(tokens) % 50 + 5, torch.tensor([3])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
        module(input_ids, torch.arange(tokens), cu_seqlens, tokens, masked, input_ids[masked])
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    # What only the CPU keeps: a copy of the attention's output, and dropout masks as wide as the values.
    size, hidden, wide = 2 if bfloat16 else 4, config.hidden_size, config.intermediate_size
    extra = tokens * (config.num_hidden_layers - 1) * (hidden * size + (size - 1) * (2 * hidden + wide) * (dropout > 0))
    counted = activation_bytes(config, tokens=tokens, masked=1, bfloat16=bfloat16, gradient_checkpointing=False)
    assert counted + extra == pytest.approx(measured, rel=0.06)


def test_gradient_checkpointing_keeps_inputs_of_layers_and_one_layer():
    config = build_config("gte-en-mlm-base")
    whole = activation_bytes(config, tokens=1000, masked=1000, bfloat16=True, gradient_checkpointing=False)
    less = activation_bytes(config, tokens=1000, masked=1000, bfloat16=True, gradient_checkpointing=True)
    # Keys, values and their inputs, which the last layer has for all tokens, and here for as many masked ones too.
    whole -= 1000 * 4 * 768 * 2
    assert less == pytest.approx(whole / 12 + 1000 * 12 * 4 * 768)


def test_memory_of_weights_optimizer_and_gradients():
    recipe = load_recipe("gte-en-mlm-large", overrides=["dtype=float32"])
    parameters = parameter_sizes(build_config("gte-en-mlm-large")).total
    memory = estimate(recipe, Hardware(gpus=8, peak_flops=H100)).stages[0].memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert memory.total == sum((16 * parameters, memory.activations, memory.logits))


def test_fsdp_shards_and_accumulated_gradients_stay_whole():
    sharded = load_recipe("gte-en-mlm-large", overrides=["sharding=fsdp"])
    whole = estimate(load_recipe("gte-en-mlm-large"), Hardware(gpus=64, peak_flops=H100)).stages[0]
    few, many = (estimate(sharded, Hardware(gpus=gpus, peak_flops=H100)).stages[0] for gpus in (64, 256))
    assert few.memory.optimizer == pytest.approx(whole.memory.optimizer / 64)
    assert few.memory.weights < whole.memory.weights
    assert few.micro_batches_per_gpu == 2
    assert few.memory.gradients == whole.memory.gradients
    assert many.micro_batches_per_gpu == 1
    assert many.memory.gradients < whole.memory.gradients / 4


def test_fsdp_gathers_layers_in_bfloat16_and_needs_no_casts_of_them():
    """Counted by hand: shards of everything; root and two layers gathered; casts of the root's matrices."""
    recipe = load_recipe("gte-en-mlm-base", overrides=["sharding=fsdp"])
    with torch.device("meta"):
        model = build_model(build_config("gte-en-mlm-base"), rope_theta=10_000)
    layers = list(model.gte.layers.parameters())
    total, in_layers = (sum(p.numel() for p in some) for some in (model.parameters(), layers))
    root_matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - sum(
        p.numel() for p in layers if p.ndim > 1
    )
    found = estimate(recipe, Hardware(gpus=8, peak_flops=H100)).stages[0].memory.weights
    assert found == 4 * total / 8 + 4 * (total - in_layers) + 2 * in_layers / 6 + 2 * root_matrices


def test_lengths_of_a_corpus_are_those_that_are_sampled(corpus_folder: Path, make_recipe):
    recipe = recipe_from_dict(make_recipe(steps=(6, 6, 6), stage={"resampling": {"short_threshold": 20}}))
    corpus = TokenCorpus.open(corpus_folder)
    lengths = [corpus_lengths(corpus, stage, seed=recipe.seed) for stage in recipe.stages]
    chunks = ChunkIndex(corpus, recipe.stages[1].chunking, seed=recipe.seed).lengths
    assert lengths[1].mean == pytest.approx(np.mean(chunks))
    assert lengths[1].mean_square == pytest.approx(np.mean(chunks.astype(float) ** 2))

    sampled = estimate(recipe, Hardware(peak_flops=1e12), lengths=lengths)
    full = estimate(recipe, Hardware(peak_flops=1e12))
    assert sampled.flops < full.flops
    bound = estimate(recipe, Hardware(peak_flops=1e12), lengths=[average_lengths(recipe.stages[0], 16)] * 3).stages[0]
    assert (bound.tokens, bound.attention_flops_per_token) == (6 * 8 * 16, full.stages[0].attention_flops_per_token)


def test_lengths_of_a_corpus_at_a_url_need_no_shard_of_tokens(corpus_folder: Path, make_recipe, tmp_path):
    recipe = recipe_from_dict(make_recipe(steps=(6, 6)))
    place = shutil.copytree(corpus_folder, tmp_path / "storage")
    for file in place.glob("*.tokens"):
        file.unlink()
    assert stage_lengths(recipe, averages=None, data=place.as_uri()) == stage_lengths(
        recipe, averages=None, data=corpus_folder
    )


def test_peaks_are_those_of_the_training_log(monkeypatch):
    names = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200", "l4": "NVIDIA L4"}
    names |= {"h100-pcie": "NVIDIA H100 PCIe", "a100": "NVIDIA A100-SXM4-80GB", "a100-40gb": "NVIDIA A100-SXM4-40GB"}
    names |= {"l40s": "NVIDIA L40S", "a10g": "NVIDIA A10G", "rtx4090": "NVIDIA GeForce RTX 4090"}
    assert names.keys() == GPUS.keys()
    for gpu, name in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak_flops(torch.device("cuda")) == GPUS[gpu].peak_flops, gpu


@pytest.mark.parametrize(
    "wrong",
    [{"gpus": 0}, {"peak_flops": 0.0}, {"utilization": 0.0}, {"utilization": 1.5}, {"peak_flops": float("nan")}],
)
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(InputError, match="expected at least one"):
        Hardware(**{"peak_flops": H100, **wrong})


def test_unknown_model_is_refused(tmp_path: Path):
    recipe = load_recipe("gte-en-mlm-tiny", overrides=[f"model={tmp_path}"])
    with pytest.raises(ConfigError, match="has no config.json"):
        estimate(recipe, Hardware(peak_flops=H100))


def test_average_above_the_stage_is_refused():
    with pytest.raises(InputError, match="600 tokens on average"):
        average_lengths(load_recipe("gte-en-mlm-large").stages[0], 600)


def test_command_prints_table_and_json(capsys):
    assert main(["estimate", "gte-en-mlm-base", "--gpus", "16", "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "mlm-2048" in out and "total" in out and "583.3" in out and "1,167" in out

    arguments = [
        "estimate",
        "gte-en-mlm-base",
        "--gpus",
        "16",
        "--peak-tflops",
        "500",
        "--avg-tokens",
        "434",
        "2550",
    ]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["total"]["tokens"] == pytest.approx(4096 * 434 * 70_000 + 1024 * 2550 * 20_000)
    assert result["peak_flops"] == 500e12
    assert result["stages"][0]["memory"]["total"] > 16 * result["parameters"]


def test_command_wants_one_average_per_stage(capsys):
    assert main(["estimate", "gte-en-mlm-base", "--avg-tokens", "256"]) == 2
    assert "1 average lengths for 2 stages" in capsys.readouterr().err


def test_command_warns_of_too_little_memory(caplog):
    assert main(["estimate", "gte-en-mlm-large", "--gpu", "l4"]) == 0
    assert "gradient_checkpointing" in caplog.text


def test_table_shows_every_stage():
    text = table(estimate(load_recipe("gte-multilingual-mlm-base"), Hardware(gpus=8, peak_flops=H100)))
    assert "mlm-2048" in text and "mlm-8192" in text and "306.2 M" in text


def test_small_runs_are_shown_in_small_units(capsys):
    """Nothing that takes time or money is shown as 0: each figure is the exact one in the unit of its column."""
    assert main(["estimate", "gte-en-mlm-tiny", "--price", "2"]) == 0
    out = capsys.readouterr().out
    result = estimate(load_recipe("gte-en-mlm-tiny"), Hardware())
    _, header, *rows = out.splitlines()
    assert header.split()[7:9] == ["TFLOP", "GPU-s"]
    for stage, row in zip(result.stages, rows, strict=False):
        flops, seconds = map(float, row.split()[7:9])
        assert flops == pytest.approx(stage.flops / 1e12, rel=0.05) and seconds > 0
        assert seconds == pytest.approx(stage.gpu_hours * 3600, rel=0.05)
        assert row.split()[9:11] == [row.split()[8], "s"]  # on one GPU
    assert float(out.splitlines()[-1].rpartition(": ")[2]) == pytest.approx(2 * result.gpu_hours, rel=0.05)
    hours = table(estimate(load_recipe("gte-en-mlm-tiny"), Hardware(peak_flops=1e11)))
    assert "GPU-hours" in hours and "GPU-min" in table(
        estimate(load_recipe("gte-en-mlm-tiny"), Hardware(peak_flops=1e12))
    )


def test_the_table_in_the_documentation_is_what_the_command_prints():
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text("utf-8")
    printed = table(estimate(load_recipe("gte-en-mlm-base"), Hardware(gpus=8, peak_flops=H100))).splitlines()
    missing = [line for line in printed[:-1] if line.rstrip() not in text]
    assert not missing
    large = estimate(load_recipe("gte-en-mlm-large"), Hardware(gpus=8, peak_flops=H100))
    assert f"The large model takes {large.gpu_hours:,.0f} GPU-hours" in text

"""The roofline of training: FLOPs are those that torch counts in a real pass, bytes those of a count by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import metrics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GteConfig

from gte_deploy.models.config import build_config
from gte_deploy.training.flops import computed_flops
from gte_deploy.training.model import PackedMaskedLM, build_model
from gte_deploy.training.optim import build_optimizer
from gte_deploy.training.recipe import Optimizer
from loading import load_file

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
RESULT = FOLDER / "results" / "2026-12-01-training-roofline.json"


@pytest.fixture(scope="module")
def folder_of_benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(FOLDER))
        yield
    sys.modules.pop("training_kernels", None)
    sys.modules.pop("training_roofline", None)


@pytest.fixture(scope="module")
def kernels(folder_of_benchmarks: None) -> ModuleType:
    import training_kernels

    return training_kernels


@pytest.fixture(scope="module")
def roofline(folder_of_benchmarks: None) -> ModuleType:
    import training_roofline

    return training_roofline


@pytest.fixture(scope="module")
def config() -> GteConfig:
    config = build_config("gte-en-mlm-tiny")
    config.num_hidden_layers, config.vocab_size = 3, 512
    return config


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flops_are_those_that_torch_counts_in_a_real_pass(
    roofline: ModuleType, kernels: ModuleType, config: GteConfig, compiled: bool
):
    tokens, length, masked = 64, 16, 24
    measures = roofline.Measures(compile=compiled)
    predicted = roofline.predict(config, roofline.Shape(tokens, length, masked), measures, micro_batches=1)

    model = PackedMaskedLM(build_model(config, rope_theta=10_000.0))
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    rows = torch.cat([torch.arange(start, start + 6) for start in bounds[:-1].tolist()])
    # In float32 the loss adds in place, which torch does not count.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.ones(tokens, dtype=torch.int64), torch.arange(tokens), bounds, length, rows, rows % 100)
        loss.backward()

    attention = 4 * config.hidden_size * length * (tokens * (config.num_hidden_layers - 1) + masked)
    # The flash kernel computes the scores again in the backward pass: 2.5 times the forward pass, here twice.
    assert predicted.computed_flops == counter.get_total_flops() + 0.5 * attention
    formula = computed_flops(
        config, tokens=tokens, squared_lengths=tokens * length, masked=masked, masked_by_lengths=masked * length
    )
    assert predicted.computed_flops == formula + 0.5 * attention


TOKENS, INPUT, WIDE = 4096, 256, 1024


def linear_and_gelu(kernels: ModuleType, trace: str) -> list[Any]:
    with kernels.on_fake_gpu():
        x = torch.zeros(TOKENS, INPUT, requires_grad=True)
        layer = nn.Linear(INPUT, WIDE)

        def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.gelu(F.linear(x, weight, bias))

        return getattr(kernels, trace)(compute, (x, layer.weight, layer.bias))


def products_by_hand() -> float:
    x, weight, out = TOKENS * INPUT, WIDE * INPUT, TOKENS * WIDE
    forward = 2 * (WIDE + x + weight + out)  # bias, input, weight; output; all in bfloat16
    return forward + 2 * (out + weight + x) + 2 * (out + x + weight)  # gradients of the input and of the weight


def test_eager_bytes_are_those_of_a_count_by_hand(kernels: ModuleType):
    x, weight, out = TOKENS * INPUT, WIDE * INPUT, TOKENS * WIDE
    casts = 2 * (4 + 2) * (x + weight + WIDE)  # float32 to bfloat16, and the gradients back
    gelu = (2 + 2) * out + (2 + 2 + 2) * out  # reads and writes; reads gradient and input, and writes
    bias = 2 * out + 2 * WIDE
    found = linear_and_gelu(kernels, "eager_kernels")
    assert sum(k.bytes for k in found if k.kind == "gemm") == products_by_hand()
    assert sum(k.bytes for k in found if k.kind == "elementwise") == casts + gelu + bias


def test_compiled_bytes_are_those_of_a_count_by_hand(kernels: ModuleType):
    x, weight, out = TOKENS * INPUT, WIDE * INPUT, TOKENS * WIDE
    casts = 2 * (4 + 2) * (x + weight) + (4 + 2) * WIDE
    gelu = (2 + 2) * out + (2 + 2 + 2) * out
    bias = 2 * out + 4 * WIDE  # the sum and its cast are one kernel
    found = linear_and_gelu(kernels, "compiled_kernels")
    assert sum(k.bytes for k in found if k.kind == "gemm") == products_by_hand()
    assert sum(k.bytes for k in found if k.kind == "elementwise") == casts + gelu + bias


def test_a_chain_is_one_kernel_that_reads_and_writes_once(kernels: ModuleType):
    with kernels.on_fake_gpu():
        x = torch.zeros(TOKENS, INPUT, requires_grad=True)
        forward, backward = kernels.compiled_kernels(lambda x: (x.exp() * 2 + 1).sigmoid().softmax(-1), (x,))
    assert forward.bytes >= 2 * 4 * TOKENS * INPUT and forward.flops == 0
    assert backward.bytes >= 3 * 4 * TOKENS * INPUT


@pytest.mark.slow
def test_a_layer_norm_and_mlp_move_the_bytes_that_inductor_counts_after_its_fusions(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Inductor compiles for the CPU here; its log of metrics turns the count on, and a cached graph has none."""
    layer: Any = build_model(build_config("gte-en-mlm-tiny"), rope_theta=10_000.0).gte.layers[0]

    def compute(x: Tensor) -> Tensor:
        return layer.post_mlp_layernorm(x + layer.post_mlp_dropout(layer.mlp(x)))

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compute(x)

    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._logging.set_logs(inductor_metrics=True)
    try:
        metrics.reset()
        x = torch.randn(1, 1024, 256, requires_grad=True)
        torch.compile(under_autocast)(x).sum().backward()
        counted = metrics.num_bytes_accessed
    finally:
        torch._logging.set_logs()
        torch._dynamo.reset()
    assert counted > 0
    with kernels.on_fake_gpu():
        layer = build_model(build_config("gte-en-mlm-tiny"), rope_theta=10_000.0).gte.layers[0]
        found = kernels.kernels_of(
            kernels.compiled_kernels, layer, compute, (torch.zeros(1, 1024, 256, requires_grad=True),)
        )
    assert sum(kernel.bytes for kernel in found) == pytest.approx(counted, rel=0.03)


def test_adamw_reads_and_writes_what_its_update_needs(kernels: ModuleType):
    parameter = nn.Parameter(torch.zeros(40, 50))
    optimizer = build_optimizer(nn.ParameterList([parameter]), Optimizer(), learning_rate=1e-3, fused=True)
    with kernels.KernelCounter() as counter:
        for _ in range(2):
            parameter.grad = torch.ones(40, 50)
            optimizer.step()
    updates = [k.bytes for k in counter.kernels if k.name.startswith("_fused_adamw")]
    assert updates == [7 * 4 * 2000] * 2  # reads weight, gradient, two moments; writes all but the gradient


def test_a_kernel_takes_the_longer_of_products_and_traffic(kernels: ModuleType):
    machine = kernels.Machine(gemm_flops=100.0, bandwidth=10.0, kernel_seconds=0.5)
    assert machine.seconds(kernels.Kernel("mm", "gemm", 1000.0, 10.0), flash="FA2") == 10
    assert machine.seconds(kernels.Kernel("mm", "gemm", 1000.0, 500.0), flash="FA2") == 50
    assert machine.seconds(kernels.Kernel("add", "elementwise", 0.0, 1.0), flash="FA2") == 0.5


def test_rates_of_attention_are_those_of_the_table_and_lie_between_its_points(kernels: ModuleType):
    machine = kernels.Machine()
    assert machine.attention_flops("FA2", "forward", 512) == 282e12
    assert machine.attention_flops("FA3", "backward", 8192) == 472e12
    assert machine.attention_flops("FA2", "forward", 128) == 282e12
    assert 264e12 < machine.attention_flops("FA2", "backward", 3000) < 279e12


@pytest.mark.slow
def test_measures_save_what_they_are_said_to_save(roofline: ModuleType, config: GteConfig):
    config.vocab_size = 8192
    shape = roofline.Shape(4096, 512, 1228)
    rows = [roofline.predict(config, shape, m, micro_batches=2) for m in roofline.STEPS.values()]
    whole, last, chunks, compiled, apart, packed, flash3, halved = rows
    assert last.computed_flops < whole.computed_flops and last.model_flops == whole.model_flops
    assert chunks.logits_bytes < last.logits_bytes
    assert compiled.bytes["elementwise"] < 0.6 * chunks.bytes["elementwise"]
    assert compiled.bytes["elementwise"] < apart.bytes["elementwise"] < 1.3 * compiled.bytes["elementwise"]
    assert apart.computed_flops == compiled.computed_flops
    assert packed.kernels < compiled.kernels and packed.computed_flops == compiled.computed_flops
    assert (
        flash3.by_kind["attention"] <= packed.by_kind["attention"] and flash3.by_kind["gemm"] == packed.by_kind["gemm"]
    )


@pytest.mark.slow
def test_the_command_writes_a_table_that_says_what_it_is(folder_of_benchmarks: None, tmp_path: Path, capsys):
    benchmark = load_file(FOLDER / "training.py", "training_benchmark")
    output = tmp_path / "roofline.json"
    assert benchmark.main(["--roofline", "--recipes", "gte-en-mlm-tiny", "--output", str(output)]) == 0
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    assert "Modelled, not measured" in printed and output.with_suffix(".md").read_text() == printed
    assert [stage["stage"] for stage in report["stages"]] == ["mlm-512", "mlm-2048", "mlm-8192"]
    assert report["machine"]["gemm_flops"] == 650e12 and report["versions"]["torch"] == torch.__version__


def test_the_table_of_the_documentation_is_that_of_the_stored_result():
    page = (FOLDER.parent / "docs" / "training.md").read_text(encoding="utf-8")
    shown = ("eager, all logits at once, whole last layer", "+ torch.compile", "+ FlashAttention-3")
    for stage in json.loads(RESULT.read_text())["stages"]:
        rows = [stage["rows"][name] for name in shown]
        cells = [f"{r['share_of_peak'] * 100:.0f} %, {round(r['tokens_per_second'], -3):,.0f}" for r in rows]
        logits = [stage["rows"][name]["logits_bytes"] / 1e9 for name in (shown[0], "+ loss in chunks")]
        row = f"| {stage['recipe']}, {stage['stage']} | {' | '.join(cells)} | {logits[0]:.1f} → {logits[1]:.1f} |"
        assert row in page


@pytest.mark.slow
def test_the_stored_result_is_what_the_command_computes(roofline: ModuleType, kernels: ModuleType):
    stored = json.loads(RESULT.read_text())
    if stored["versions"]["torch"] != torch.__version__:
        pytest.skip(f"needs torch {stored['versions']['torch']}, whose operators were counted: another has other ones")
    stage = next(s for s in stored["stages"] if (s["recipe"], s["stage"]) == ("gte-en-mlm-base", "mlm-2048"))
    shape = roofline.Shape(stage["tokens_per_micro_batch"], 2048, int(0.3 * stage["tokens_per_micro_batch"]))
    for name, measures in roofline.STEPS.items():
        row = roofline.predict(build_config("gte-en-mlm-base"), shape, measures, micro_batches=stage["micro_batches"])
        assert row.seconds == pytest.approx(stage["rows"][name]["seconds"], rel=1e-6), name

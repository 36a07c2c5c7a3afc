"""The choice of the attention kernel, with torch's own registry, and the kernel itself on a Hopper GPU."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.attention as torch_attention

from gte_deploy.core.errors import ConfigError
from gte_deploy.training.flash_attention import flash_attention
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.train import train

if not hasattr(torch_attention, "activate_flash_attention_impl"):
    pytest.skip("needs a torch that has activate_flash_attention_impl", allow_module_level=True)

CUDA = torch.device("cuda")


class Handle:
    removed = False

    def remove(self) -> None:
        Handle.removed = True


@pytest.fixture
def hopper(monkeypatch, tmp_path: Path):
    """A machine with a Hopper GPU, and with a package whose kernel registers itself."""
    from torch.nn.attention import _registry

    Handle.removed = False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", Handle)
    (tmp_path / "flash_attn_interface.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


@pytest.mark.parametrize("choice", ["auto", "FA3"])
def test_hopper_takes_it_and_gives_it_back(choice, hopper, caplog):
    caplog.set_level(logging.INFO)
    with flash_attention(choice, CUDA):
        assert torch_attention.current_flash_attention_impl() == "FA3" and not Handle.removed
    assert torch_attention.current_flash_attention_impl() is None and Handle.removed
    assert [record.message for record in caplog.records] == ["attention: FlashAttention-3"]


def test_it_is_given_back_after_an_error(hopper):
    with pytest.raises(KeyError), flash_attention("auto", CUDA):
        raise KeyError
    assert torch_attention.current_flash_attention_impl() is None


def test_default_leaves_it(hopper, caplog):
    caplog.set_level(logging.INFO)
    with flash_attention("default", CUDA):
        assert torch_attention.current_flash_attention_impl() is None
    assert [record.message for record in caplog.records] == [
        "attention: FlashAttention-2, because flash_attention is 'default'"
    ]


def _older_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def _no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def _broken_package(monkeypatch):
    from torch.nn.attention import _registry

    def fail() -> None:
        raise RuntimeError("undefined symbol")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", fail)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_older_gpu, "compute capability 8.0"),
        (_no_package, "flash_attn_interface is not installed"),
        (_broken_package, "cannot be loaded (undefined symbol)"),
    ],
)
def test_elsewhere_auto_says_why_in_one_line_and_fa3_is_refused(change, reason, hopper, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    change(monkeypatch)
    with flash_attention("auto", CUDA):
        assert torch_attention.current_flash_attention_impl() is None
    (record,) = caplog.records
    assert record.message.startswith("attention: FlashAttention-2, because") and reason in record.message
    with pytest.raises(ConfigError) as refused, flash_attention("FA3", CUDA):
        pass
    assert reason in str(refused.value) and "set it to auto" in str(refused.value)


def test_a_cpu_has_no_such_kernel(caplog):
    caplog.set_level(logging.INFO)
    with flash_attention("auto", torch.device("cpu")):
        pass
    assert not caplog.records
    with pytest.raises(ConfigError, match="not a GPU"), flash_attention("FA3", torch.device("cpu")):
        pass


def test_a_run_obeys_its_recipe(make_recipe, corpus_folder, tmp_path):
    recipe = recipe_from_dict(make_recipe(steps=(1,), flash_attention="FA3"))
    with pytest.raises(ConfigError, match="flash_attention is 'FA3', but the device is 'cpu'"):
        train(recipe, data=corpus_folder, output=tmp_path, device="cpu", tensorboard=False)


@pytest.mark.gpu
def test_flash_attention_3_equals_segments():
    from gte_deploy.models.attention import _attend_per_segment, _attend_varlen

    if torch.cuda.get_device_capability()[0] != 9 or importlib.util.find_spec("flash_attn_interface") is None:
        pytest.skip("needs a Hopper GPU and the package flash-attn-3")
    generator = torch.Generator("cuda").manual_seed(0)
    bounds = torch.tensor([0, 5, 5, 300, 812], dtype=torch.int32, device="cuda")
    rows = [
        torch.randn(812, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for _ in range(3)
    ]
    wide = [row.detach().float().requires_grad_() for row in rows]
    segments = _attend_per_segment(*wide, bounds, scaling=None)
    with flash_attention("FA3", CUDA):
        flash = _attend_varlen(*rows, bounds, max_seqlen=512, scaling=None)
        flash.float().square().sum().backward()
    segments.square().sum().backward()
    torch.testing.assert_close(flash.float(), segments, atol=2e-2, rtol=2e-2)
    for row, exact in zip(rows, wide, strict=True):
        torch.testing.assert_close(row.grad.float(), exact.grad, atol=5e-2, rtol=5e-2)

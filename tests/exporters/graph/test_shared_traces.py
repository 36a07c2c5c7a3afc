"""Tests share traces (tests/support/traces.py): what they get must be what torch.onnx.export makes for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from factories import make_checkpoint
from family_checkpoints import PREFIXES, make_family_checkpoint
from gte_deploy.exporters.graph.trace import trace
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.heads import EmbedHead
from traces import digest, fresh_traces, sharing


def arguments_of(task: str, **change: Any) -> dict[str, Any]:
    return {"task": task, "max_length": 32, "pooling": "cls", "logits": "masked", "opset": 20, **change}


def assert_shared_as_fresh(first: Any, second: Any, task: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace `first`, and let `second`, which has other weights, take its graph; compare with its own trace."""
    with fresh_traces():
        traced: list[Any] = []
        real = torch.onnx.export
        own = ir.to_proto(trace(second, **arguments_of(task))).SerializeToString(deterministic=True)
        monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: traced.append(a) or real(*a, **k))
        monkeypatch.setattr(torch.onnx, "export", sharing(torch.onnx.export, folder))
        other = ir.to_proto(trace(first, **arguments_of(task))).SerializeToString(deterministic=True)
        taken = trace(second, **arguments_of(task))
        monkeypatch.undo()
    assert len(traced) == 1
    assert ir.to_proto(taken).SerializeToString(deterministic=True) == own != other


def test_a_shared_trace_is_that_of_the_model(tmp_path, monkeypatch):
    first, second = (
        load_model(make_checkpoint(tmp_path / str(seed), task="embed", pooling="cls", layers=1, seed=seed))
        for seed in (1, 2)
    )
    assert_shared_as_fresh(first, second, "embed", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["fill-mask", "embed", "classify", "token-classify"])
@pytest.mark.parametrize("kind", [kind for kind in PREFIXES])
def test_a_shared_trace_of_every_family(kind, task, tmp_path, monkeypatch):
    first, second = (
        load_model(make_family_checkpoint(tmp_path / str(seed), kind, task, seed=seed), task=task) for seed in (1, 2)
    )
    assert_shared_as_fresh(first, second, task, tmp_path, monkeypatch)


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """`digest_of(seed=1, layers=1, **arguments)`: what the trace of a model is kept under."""

    class Stop(Exception):
        pass

    def stop(module: Any, arguments: Any, **options: Any) -> None:
        raise Stop(digest(module, arguments, options))

    def of(*, seed: int = 1, layers: int = 1, **change: Any) -> str:
        folder = tmp_path / f"{seed}-{layers}"
        if not folder.exists():
            make_checkpoint(folder, task="embed", pooling="cls", layers=layers, seed=seed)
        with pytest.raises(Stop) as caught:
            trace(load_model(folder), **arguments_of("embed", **change))
        return caught.value.args[0]

    monkeypatch.setattr(torch.onnx, "export", stop)
    return of


def test_weights_have_no_part_in_the_digest_and_all_else_has(digest_of, monkeypatch):
    first = digest_of()
    assert first == digest_of() == digest_of(seed=2)
    others = {digest_of(layers=2), digest_of(pooling="mean"), digest_of(max_length=33), digest_of(opset=21)}
    call = EmbedHead.__call__
    monkeypatch.setattr(EmbedHead, "__call__", lambda self, states: 2 * call(self, states))
    others.add(digest_of())
    assert None not in others and len({first, *others}) == 6


def test_limits_of_an_axis_and_values_of_a_constant_have_a_part():
    module = torch.nn.Linear(2, 2)
    limits = [({0: torch.export.Dim("sequence", max=most)},) for most in (8, 8, 9)]
    same, again, other = (digest(module, (), {"dynamic_shapes": axes}) for axes in limits)
    assert same == again != other
    constants = [digest(module, (torch.full((1,), value),), {}) for value in (1.0, 1.0, 2.0)]
    assert constants[0] == constants[1] != constants[2]


def test_a_class_of_a_file_that_is_no_module_has_its_code_in_the_digest():
    source = "import torch\nclass Network(torch.nn.Linear):\n    def forward(self, x):\n        return x * {}"
    digests = []
    for factor in (2, 2, 3):
        names: dict[str, Any] = {"__name__": "nowhere"}
        exec(source.format(factor), names)
        digests.append(digest(names["Network"](2, 2), (), {}))
    assert digests[0] == digests[1] != digests[2] and None not in digests

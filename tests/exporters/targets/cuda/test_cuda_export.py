"""`gte-export --target cuda`: the bundle, what is claimed of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from gte_deploy.bundle.manifest import open_bundle  # noqa: E402
from gte_deploy.core.errors import InputError  # noqa: E402
from gte_deploy.exporters.cli import main  # noqa: E402
from gte_deploy.exporters.export import default_output, export  # noqa: E402
from gte_deploy.exporters.targets.cuda import graph as cuda_graph  # noqa: E402
from gte_deploy.exporters.verification import results  # noqa: E402
from gte_deploy.models import checkpoint  # noqa: E402


def test_bundle_says_what_it_is_and_what_was_not_run(tiny_embed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded, load = [], checkpoint.load_described
    monkeypatch.setattr(checkpoint, "load_described", lambda *args, **more: loaded.append(args) or load(*args, **more))
    # Half an hour of training is not in these weights: hidden states of random ones may be near zero, cosines coarse.
    result = export(tiny_embed, tmp_path / "bundle", target="cuda", precision="fp16", max_length=64)
    manifest = open_bundle(tmp_path / "bundle")
    assert manifest == result.manifest
    assert (manifest.target, manifest.precision, set(manifest.graphs)) == ("cuda", "fp16", {"onnxruntime"})
    graph = manifest.graphs["onnxruntime"]
    assert graph.fusions["packed_attention"] == 2 and graph.fusions["half_weights"] > 10
    assert {tensor.dtype for tensor in graph.outputs} == {"float32"}
    assert result.parity.passed and result.parity.engines[0].accuracy is not None
    on_cuda = cuda_graph.has_cuda()
    assert graph.computes == ("fp16",) and graph.emulated == (() if on_cuda else ("fp16",))
    assert result.parity.engines[0].title == f"onnxruntime fp16 on cuda{'' if on_cuda else ' (emulated)'}"
    assert all(case.parts for case in result.parity.engines[0].cases), "the emulation has the parts, too"
    assert [("CUDA kernels were not run" in line) for line in result.parity.caveats] == [True] * (not on_cuda)
    (check,) = result.parity.checks
    assert check.passed and check.compared["answers"] > 10
    assert ["PyTorch computed the answers" in line for line in check.skipped] == [True] * (not on_cuda)
    assert len(loaded) == 1  # PyTorch answers on the weights that the graph was traced from


def test_what_misses_the_bounds_is_not_written(tiny_embed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in that rotates by other tables: as a wrong graph would."""
    built = cuda_graph.cpu_emulation

    def turned(graph: Any) -> Any:
        stand_in = built(graph)
        tables = [value for value in stand_in.model.graph.initializers.values() if value.shape == [64, 4]]
        assert len(tables) == 2
        for value in tables:
            value.const_value = ir.tensor(value.const_value.numpy()[::-1].copy())
        return stand_in

    monkeypatch.setattr(cuda_graph, "cpu_emulation", turned)
    monkeypatch.setattr(cuda_graph, "has_cuda", lambda: False)
    with pytest.raises(results.BoundMissedError, match="differs from PyTorch FP32"):
        export(tiny_embed, tmp_path / "bundle", target="cuda", precision="fp32", max_length=64)
    assert not (tmp_path / "bundle").exists()


def test_names_and_choices(tiny_mlm: Path, tmp_path: Path):
    assert default_output("m", precision="fp16", format="cuda") == Path("m-cuda-fp16")
    for options, message in (
        ({"target": "cuda", "format": "trt"}, "target of format trt is 'cuda'; expected one of tensorrt"),
        ({"target": "cuda", "precision": "int8"}, "expected one of fp16, bf16, fp32"),
        ({"precision": "fp16"}, "precision of format onnx, target cpu is 'fp16'"),
        ({"padding": "keep"}, "that is for target cuda and tensorrt"),
        ({"target": "cuda", "precision": "bf16", "padding": "remove"}, "fp16 and fp32 only"),
    ):
        with pytest.raises(InputError, match=message):
            export(tiny_mlm, tmp_path / "bundle", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target sm86", "--target sm86 is for --format trt"),
        ("--padding keep", "--padding is for --target cuda and --format trt"),
        (
            "--target cuda --precision int8",
            "--precision int8 is for --target cpu or --target openvino or --format executorch or --format trt",
        ),
        ("--target cuda --format trt", "sm"),
    ],
)
def test_contradictions(options: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(options.split()) == 2
    assert message in capsys.readouterr().err

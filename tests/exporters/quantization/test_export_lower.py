"""The whole way: `gte-export --precision`, and the bundle that answers."""

import json

import numpy as np
import pytest

import gte_deploy
from gte_deploy.backends import choice
from gte_deploy.core.errors import ParityError
from gte_deploy.exporters import export as export_module
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.export import export
from gte_deploy.exporters.verification import accuracy
from hub import in_cache

TEXT = "the president of the united [MASK] of america."


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(export_module, "EVALUATION_TOKENS", 1500)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return export(None, tmp_path_factory.mktemp("int8") / "bundle", precision="int8", max_length=512)


def test_the_report_says_what_int8_costs(int8):
    report = json.loads((int8.path / "report.json").read_text())
    engines = report["parity"]["engines"]
    assert {engine["engine"] for engine in engines} == {"onnxruntime", "openvino"}
    for engine in engines:
        found, bounds = engine["accuracy"], engine["accuracy_bounds"]
        assert bounds == {"cosine_mean": 0.999, "top1_agreement": 0.97}
        assert found["token_cosine_mean"] >= 0.999 and found["sentence_cosine_mean"] >= 0.999
        # A sum in another order may round to another bfloat16.
        assert found["alone_cosine_mean"] == pytest.approx(1, abs=1e-4 if engine["compute"] == "bf16" else 1e-5)
        low, high = found["top1_interval"]
        assert low < found["top1_agreement"] < high and high >= 0.97 and found["masks"] > 400
        before, after = found["top1"][1], found["top1"][0]
        assert after > 0.25 and abs(after - before) < 0.02
    assert "bf16" in int8.manifest.graphs["openvino"].computes and "bf16" in [engine["compute"] for engine in engines]
    assert report["sensitivity"] == {}
    assert report["kept_groups"] == []
    page = (int8.path / "report.html").read_text()
    assert "same best word as PyTorch" in page and "<small>95 %: " in page and "int8_linears 29" in page
    assert "every group of layers in INT8, the graph keeps its bounds" in page and "onnxruntime int8" in page


@pytest.mark.parametrize("backend", ["auto", "onnx", "openvino"])
def test_it_runs_from_the_hubs_cache_as_from_its_own_folder(int8, tmp_path, backend, monkeypatch):
    # A CPU with INT8 instructions, on which "auto" is OpenVINO. In the cache, the files are links out of their folder.
    monkeypatch.setattr(choice, "cpu_flags", lambda: frozenset({"avx512_vnni", "avx512f", "avx2"}))
    texts = ["A short text.", "a longer text about the state of the union"]
    with gte_deploy.load(int8.path, backend=backend, num_threads=1) as model:
        expected, engine = model.encode(texts), model.backend
    with gte_deploy.load(in_cache(int8.path, tmp_path), backend=backend, num_threads=1) as model:
        np.testing.assert_allclose(model.encode(texts), expected, atol=1e-6)
        assert model.backend == engine == ("openvino" if backend == "auto" else backend)


def test_the_bundle_answers_like_fp32_and_is_small(int8):
    sizes = {name: entry.size for name, entry in int8.manifest.files.items()}
    assert int8.manifest.precision == "int8" and sizes["onnx/model.onnx_data"] < 23e6
    with gte_deploy.load(int8.path, backend="onnx") as model, gte_deploy.load() as reference:
        assert model.info()["backend"] == "onnx"
        assert model.fill_mask(TEXT)[0]["token_str"] == "states"
        texts = ["A short text.", "a much longer text about the state of the union " * 9, "Zebra"]
        found, expected = model.encode(texts), reference.encode(texts)
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.998
        np.testing.assert_allclose(found[0], model.encode(texts[0]), atol=1e-4)  # whatever else is in the batch


def test_a_missed_bound_leaves_no_bundle(trace_once, tmp_path, monkeypatch):
    monkeypatch.setitem(
        accuracy.ACCURACY_BOUNDS, "int4-weight", accuracy.AccuracyBounds(cosine_mean=0.999, top1_agreement=0.5)
    )
    with pytest.raises(
        ParityError, match=r"on text: token cosine 0\.99\d+ on average, at least 0\.999 wanted"
    ) as caught:
        export(None, tmp_path / "bundle", precision="int4-weight", max_length=64)
    assert "Take a finer precision: int8-weight or fp32." in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weight_only_on_the_command_line(trace_once, tmp_path, capsys):
    assert (
        main(["-o", str(tmp_path / "w8"), "--precision", "int8-weight", "--max-len", "64", "--json", "--progress"]) == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["precision"] == "int8-weight" and result["fusions"]["int8_linears"] == 29
    assert result["parity"]["not_proven"] == ["int8-weight has a graph only for ONNX Runtime."]
    assert "quantize to int8-weight" in err
    with gte_deploy.load(tmp_path / "w8") as model:
        assert model.fill_mask(TEXT)[0]["token_str"] == "states"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--calibration", "texts.txt"], "--calibration is for --precision int8"),
        (["--precision", "int4-weight", "--reduce-range"], "--reduce-range is for --precision int8"),
        (["--precision", "fp16"], "--precision fp16 is for --target cuda or --format trt; --target cpu is written in"),
    ],
)
def test_options_that_do_not_go_together(arguments, reason, capsys):
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_a_calibration_file_that_is_not_there(tmp_path, capsys):
    file = tmp_path / "missing.txt"
    arguments = ["-o", str(tmp_path / "bundle"), "--precision", "int8", "--max-len", "64", "--calibration", str(file)]
    assert main(arguments) == 2
    assert f"{file} cannot be read as text" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

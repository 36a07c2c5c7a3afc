"""The target "openvino": a bundle with OpenVINO's graph alone, from one file of code."""

import importlib.util
import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[openvino]'")

import gte_deploy  # noqa: E402
from factories import make_checkpoint  # noqa: E402
from gte_deploy.bundle.manifest import open_bundle  # noqa: E402
from gte_deploy.core.errors import BackendError, InputError, MissingDependencyError  # noqa: E402
from gte_deploy.core.exit_codes import OK, USAGE  # noqa: E402
from gte_deploy.exporters import export as export_module  # noqa: E402
from gte_deploy.exporters.cli import main  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions  # noqa: E402
from gte_deploy.exporters.triton.repository import export_repository  # noqa: E402
from gte_deploy.models import builtin_path  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "mlm", layers=1)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "b", target="openvino", max_length=64).path


def test_the_bundle_has_one_graph_and_the_runtime_takes_it(bundle, checkpoint):
    manifest = open_bundle(bundle)
    assert set(manifest.graphs) == {"openvino"} and "fp32" in manifest.graphs["openvino"].computes
    with gte_deploy.load(bundle) as model, gte_deploy.load(checkpoint, backend="torch") as reference:
        assert model.info()["backend"] == "openvino"
        assert "no graph for ONNX Runtime" in model.info()["backend_reason"]
        texts = ["one two [MASK] four", "[MASK]"]
        for found, wanted in zip(model.fill_mask(texts), reference.fill_mask(texts), strict=True):
            assert [answer["token_str"] for answer in found] == [answer["token_str"] for answer in wanted]


def test_the_report_says_what_was_compared(bundle):
    report = json.loads((bundle / "report.json").read_text())
    engines = {engine["engine"] for engine in report["parity"]["engines"]}
    assert engines == {"openvino"} and report["parity"]["passed"] is True
    (check,) = report["parity"]["checks"]
    assert check["passed"] and "PyTorch computed the answers" not in " ".join(check["skipped"])


def test_in_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "EVALUATION_TOKENS", 400)
    checkpoint = builtin_path()  # without VNNI, sums of products overflow in a model of random weights
    texts = tmp_path / "texts.txt"
    texts.write_text("one two three\nfour five six seven\n" * 40)
    options = {"precision": "int8", "calibration": texts, "max_length": 64, "bounds": "report"}
    path = export(checkpoint, tmp_path / "b", target="openvino", **options).path
    manifest = open_bundle(path)
    assert set(manifest.graphs) == {"openvino"} and manifest.graphs["openvino"].fusions["int8_linears"] > 0
    with gte_deploy.load(path) as model, gte_deploy.load(checkpoint, backend="torch") as reference:
        found, wanted = (side.encode(["one two three"]) for side in (model, reference))
    assert 0.98 < float(found[0] @ wanted[0] / np.linalg.norm(found) / np.linalg.norm(wanted)) < 0.9999999


def test_another_backend_is_refused_by_name(bundle):
    with pytest.raises(BackendError, match="no graph for ONNX Runtime: it was exported for openvino alone"):
        gte_deploy.load(bundle, backend="onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "int8-weight"},
            "precision of format onnx, target openvino is 'int8-weight'; expected one of fp32",
        ),
        ({"activations": "dynamic"}, "activations is 'dynamic'; that is for target cpu"),
        ({"calibration": "texts.txt"}, "calibration is for precision int8, and the precision is fp32"),
        ({"verbosity": 3}, "verbosity is 3; there is no such option"),
        ({"tensorrt": TensorRTOptions()}, "tensorrt is for format trt, and the target is openvino"),
    ],
)
def test_options_of_others_are_refused(options, message, checkpoint, tmp_path):
    with pytest.raises(InputError, match=message):
        export(checkpoint, tmp_path / "b", target="openvino", **options)
    assert list(tmp_path.iterdir()) == []


def test_triton_serves_no_such_graph(bundle, checkpoint, tmp_path, capsys):
    with pytest.raises(InputError, match="Triton serves graphs for ONNX Runtime, but target openvino has none"):
        export_repository(checkpoint, tmp_path / "r", target="openvino")
    assert main(["triton", str(bundle), str(tmp_path / "r")]) != OK
    assert "holds no graph for ONNX Runtime" in capsys.readouterr().err
    assert main(["triton", str(checkpoint), "--target", "openvino"]) == USAGE
    assert "--format triton takes --target cpu or cuda, not openvino" in capsys.readouterr().err


def test_without_openvino_nothing_is_exported(checkpoint, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(MissingDependencyError, match="openvino"):
        export(checkpoint, tmp_path / "b", target="openvino")
    assert list(tmp_path.iterdir()) == []

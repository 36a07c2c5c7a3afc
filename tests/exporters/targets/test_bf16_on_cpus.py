"""Bundles of --precision bf16 for CPUs: verified by an emulation if the CPU lacks bfloat16, and run if it has it."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[openvino]'")

import onnxruntime as ort  # noqa: E402

import gte_deploy  # noqa: E402
from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends import picks  # noqa: E402
from gte_deploy.backends.openvino import has_native_bf16  # noqa: E402
from gte_deploy.bundle.manifest import open_bundle, read_manifest  # noqa: E402
from gte_deploy.core.errors import BundleError, MissingDependencyError, ParityError  # noqa: E402
from gte_deploy.core.exit_codes import OK  # noqa: E402
from gte_deploy.exporters import export as export_module  # noqa: E402
from gte_deploy.exporters.cli import main  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.graph.build import graph_of  # noqa: E402
from gte_deploy.exporters.verification.emulation import bf16_emulation  # noqa: E402

FLOAT = ir.DataType.FLOAT
TEXTS = ["one two three four", "five", "six seven eight nine ten eleven"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "embed", task="embed", layers=1)


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(export_module, "EVALUATION_TOKENS", 400)


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: False)
    # Where this CPU computes in bfloat16, another test or another process may have measured it.
    for source in ("_measured", "_recorded"):
        monkeypatch.setattr(f"gte_deploy.backends.bf16_speed.{source}", lambda: None)


def cosine(a, b):
    return float(np.min(np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))


@pytest.fixture(scope="module")
def emulated(checkpoint, tmp_path_factory):
    """`emulated(target)`: the bundle of --precision bf16 from a machine without bfloat16. Read only."""
    made = {}

    def export_for(target):
        if target not in made:
            made[target] = tmp_path_factory.mktemp(target) / "b"
            arguments = ["-o", str(made[target]), "--precision", "bf16", "--target", target, "--max-len", "64"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export_module, "EVALUATION_TOKENS", 400)
                patch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: False)
                assert main([str(checkpoint), *arguments]) == OK
        return made[target]

    return export_for


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_a_cpu_without_bfloat16_verifies_an_emulation_and_runs_in_fp32(checkpoint, emulated, no_bf16, target):
    bundle = emulated(target)
    manifest = open_bundle(bundle)
    openvino = manifest.graphs["openvino"]
    assert (manifest.precision, openvino.computes, openvino.emulated) == ("bf16", ("fp32", "bf16"), ("bf16",))
    assert all(graph.computes == ("fp32",) for engine, graph in manifest.graphs.items() if engine != "openvino")
    report = json.loads((bundle / "report.json").read_text())
    (bf16,) = [engine for engine in report["parity"]["engines"] if engine["emulated"]]
    assert (bf16["engine"], bf16["compute"], bf16["passed"]) == ("openvino", "bf16", True)
    assert bf16["accuracy_bounds"]["cosine_mean"] == 0.999 and bf16["bounds"]["max_rel"] == 0.05
    assert 1e-4 < bf16["max_rel"] < 0.05, "rounding to eight bits shows"
    (caveat,) = report["parity"]["not_proven"]
    assert "openvino bf16 was emulated, because this CPU does not compute in bfloat16" in caveat
    assert "openvino bf16 (emulated)" in (bundle / "report.html").read_text()
    with gte_deploy.load(bundle) as model, gte_deploy.load(checkpoint, backend="torch") as reference:
        info = model.info()
        assert (info["backend"], info["precision"]) == ("onnx" if target == "cpu" else "openvino", "fp32")
        assert info["backend_reason"] == "this CPU does not compute in bf16, and fp32 is more exact"
        np.testing.assert_allclose(model.encode(TEXTS), reference.encode(TEXTS), atol=1e-5)


def test_real_bfloat16_is_compared_where_the_cpu_has_it(checkpoint, tmp_path, few_texts):
    if not has_native_bf16():
        pytest.skip("this CPU does not compute in bfloat16")
    result = export(checkpoint, tmp_path / "b", precision="bf16", max_length=64)
    openvino = result.manifest.graphs["openvino"]
    assert (openvino.computes, openvino.emulated, result.parity.caveats) == (("fp32", "bf16"), (), ())
    with (
        gte_deploy.load(result.path, precision="bf16") as model,
        gte_deploy.load(checkpoint, backend="torch") as reference,
    ):
        assert model.info()["precision"] == "bf16"
        assert cosine(model.encode(TEXTS), reference.encode(TEXTS)) > 0.999


def test_a_bundle_for_bfloat16_must_keep_the_bounds_of_bfloat16(checkpoint, tmp_path, few_texts, no_bf16, monkeypatch):
    from gte_deploy.exporters.verification import emulation

    def coarse(graph):
        """Round to three bits in place of eight: the lower bits of a weight are lost."""
        spoiled = bf16_emulation(graph)
        for value in spoiled.model.graph.initializers.values():
            if value.dtype == FLOAT and len(value.shape) == 2:
                exact = value.const_value.numpy()
                value.const_value = ir.tensor(np.ldexp(np.round(np.frexp(exact)[0] * 4) / 4, np.frexp(exact)[1]))
        return spoiled

    monkeypatch.setattr(emulation, "bf16_emulation", coarse)
    with pytest.raises(ParityError, match=r"openvino bf16 \(emulated\) differs from PyTorch"):
        export(checkpoint, tmp_path / "b", precision="bf16", max_length=64)
    assert not list(tmp_path.iterdir())


def test_without_openvino_nothing_computes_in_bfloat16(checkpoint, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find(name))
    for target in ("cpu", "openvino"):
        with pytest.raises(MissingDependencyError, match=r"\[openvino\]"):
            export(checkpoint, tmp_path / "b", precision="bf16", target=target)


def test_a_recorded_pick_of_the_bundle(emulated, tmp_path, no_bf16, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = emulated("cpu")
    checksum = read_manifest(path).to_json()["checksum"]
    picks.save(checksum, picks.Pick("openvino", "fp32", {}, "2026-01-02", picks.engine_versions()))
    with gte_deploy.load(path) as model:
        assert (model.backend, model.info()["precision"]) == ("openvino", "fp32")


def test_a_manifest_whose_emulated_precision_was_not_verified(emulated, tmp_path):
    manifest = read_manifest(emulated("cpu"))
    graph = dataclasses.replace(manifest.graphs["openvino"], computes=("fp32",), emulated=("bf16",))
    changed = dataclasses.replace(manifest, graphs={**manifest.graphs, "openvino": graph})
    (tmp_path / "manifest.json").write_text(json.dumps(changed.to_json()))
    with pytest.raises(BundleError, match=r"emulated is \['bf16'\]; expected some of the verified precisions fp32"):
        read_manifest(tmp_path)


def linear_layer(weight, bias):
    """A graph that computes y = x·weight + bias, and z = y + y."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["rows", len(weight)]))
    constants = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(FLOAT))
        for name, array in (("weight", weight), ("bias", bias))
    ]
    nodes = [ir.node("MatMul", [x, constants[0]])]
    nodes.append(ir.node("Add", [nodes[0].outputs[0], constants[1]]))
    nodes.append(ir.node("Add", [nodes[1].outputs[0], nodes[1].outputs[0]]))
    for node, name in zip(nodes, ("product", "y", "z"), strict=True):
        (value,) = node.outputs
        value.name, value.dtype, value.shape = name, FLOAT, ir.Shape(["rows", len(bias)])
    outputs = [node.outputs[0] for node in nodes[1:]]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="linear")
    return graph_of(ir.Model(graph, ir_version=10), {}, 20)


def test_the_emulation_rounds_where_pytorch_rounds_in_bfloat16():
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((7, 48), (48, 16), (16,)))
    graph = linear_layer(weight, bias)
    emulation = bf16_emulation(graph)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(emulation.model).SerializeToString(), options)
    rounded = torch.from_numpy(x).bfloat16().float().numpy()
    y, z = session.run(["y", "z"], {"x": rounded})
    half = [torch.from_numpy(array).bfloat16() for array in (x, weight, bias)]
    wanted = half[0] @ half[1] + half[2]
    # A sum in another order may fall on the other side of a rounding; almost all are the same to the bit.
    assert np.mean(y == wanted.float().numpy()) > 0.97 and np.mean(z == (wanted + wanted).float().numpy()) > 0.97
    np.testing.assert_allclose(y, wanted.float().numpy(), rtol=2**-6, atol=2**-6)
    assert not np.array_equal(y, rounded @ weight + bias), "FP32 gives other numbers"
    assert [value.name for value in graph.model.graph.initializers.values()] == ["weight", "bias"], "it is unchanged"

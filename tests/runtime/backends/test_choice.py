"""The rule behind backend="auto", on machines and bundles of every kind."""

import dataclasses
import importlib.util

import pytest

from gte_deploy.backends import choice as engine_choice
from gte_deploy.backends import picks
from gte_deploy.backends.choice import choose_engine, is_for_gpus
from gte_deploy.bundle.manifest import GraphEntry, Manifest, PlanEntry
from gte_deploy.core.errors import BackendError, MissingDependencyError
from gte_deploy.core.spec import ModelSpec, Profile, TensorSpec

FIND_SPEC = importlib.util.find_spec
SPEC = ModelSpec(task="embed", max_length=8, vocab_size=10, hidden_size=4, pad_token_id=0)
GRAPH = GraphEntry("onnx/model.onnx", 20, (), (), {})
IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
PLAN = PlanEntry("p", "tensorrt-rtx", "1.7", ("8.9",), (Profile((1, 1), (1, 8), (1, 8)),), (IDS,), (IDS,), {})
PACKED_PLAN = dataclasses.replace(PLAN, inputs=(TensorSpec("input_ids", "int64", ("tokens",)),))


def manifest(precision="fp32", engines=("onnxruntime", "openvino"), **more):
    return Manifest(SPEC, precision, dict.fromkeys(engines, GRAPH), {}, {}, {}, **more)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(installed, flags)`: the engines it has and its CPU's flags; no picks but those that a test records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(installed=("onnxruntime", "openvino"), flags="fpu avx2 avx512_vnni"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : Test\nflags\t\t: {flags}\nprocessor : 1\n")
        monkeypatch.setattr(engine_choice, "CPUINFO", tmp_path / "cpuinfo")
        missing = {"onnxruntime", "openvino"} - set(installed)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else FIND_SPEC(name))

    pytest.importorskip("openvino")
    make()
    return make


def record(backend, precision=None, bundle=None):
    checksum = (bundle or manifest()).to_json()["checksum"]
    picks.save(checksum, picks.Pick(backend, precision, {}, "2026-01-02", picks.engine_versions()))


def chosen(bundle, **options):
    choice = choose_engine(bundle, **options)
    assert choice.reason and choice.reason[-1] != "."
    return choice.backend, choice.precision


def test_fp32_and_weight_only_bundles_run_on_onnxruntime(machine):
    for precision in ("fp32", "int8-weight", "int4-weight"):
        assert chosen(manifest(precision)) == ("onnx", "fp32")


@pytest.mark.parametrize(
    ("flags", "backend", "says"),
    [
        ("avx2 avx512_vnni amx_int8", "openvino", "AVX512-VNNI"),
        ("avx2 avx_vnni", "openvino", "AVX-VNNI"),
        ("amx_int8", "openvino", "AMX"),
        ("avx2 avx512f", "onnx", "no int8 dot products"),
        ("", "onnx", "no int8 dot products"),
    ],
)
def test_int8_runs_on_openvino_where_the_cpu_multiplies_int8(machine, flags, backend, says):
    machine(flags=flags)
    choice = choose_engine(manifest("int8"))
    assert (choice.backend, choice.precision) == (backend, "fp32") and says in choice.reason


def test_a_machine_that_tells_nothing_of_its_cpu(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_choice, "CPUINFO", tmp_path / "none")
    assert chosen(manifest("int8")) == ("onnx", "fp32")


def test_what_is_not_installed_or_not_in_the_bundle_is_not_chosen(machine):
    assert chosen(manifest("int8", engines=("onnxruntime",))) == ("onnx", "fp32")
    machine(installed=("onnxruntime",))
    assert choose_engine(manifest("int8")).reason == "openvino is not installed"
    machine(installed=("openvino",))
    assert chosen(manifest()) == ("openvino", "fp32")
    machine(installed=())
    assert chosen(manifest()) == ("onnx", "fp32"), "whose error names the extra to install"


def test_a_gpu_is_onnxruntimes(machine):
    record("openvino", bundle=manifest("int8"))
    assert chosen(manifest("int8"), device="cuda:0") == ("onnx", "fp32")


def test_bfloat16_is_chosen_only_when_asked_for(machine):
    assert chosen(manifest(), precision="bf16") == ("openvino", "bf16")
    assert chosen(manifest(), precision="fp32") == ("onnx", "fp32")


def test_a_pick_comes_before_the_rule(machine):
    record("openvino")
    choice = choose_engine(manifest())
    assert (choice.backend, choice.precision) == ("openvino", "fp32") and "2026-01-02" in choice.reason
    assert chosen(manifest("int4-weight")) == ("onnx", "fp32"), "it is another bundle's"
    record("openvino", "bf16")
    assert chosen(manifest()) == ("openvino", "bf16")
    assert chosen(manifest(), precision="fp32") == ("onnx", "fp32"), "the caller asked for another precision"


@pytest.mark.parametrize(("backend", "precision"), [("torch", None), ("jax", None), ("openvino", "fp8")])
def test_a_pick_that_means_nothing_here_is_passed_over(machine, backend, precision):
    record(backend, precision)
    assert chosen(manifest()) == ("onnx", "fp32")


@pytest.fixture
def fits(monkeypatch):
    """`fits(error)`: whether the plan fits the machine, or why not."""

    def make(error=None):
        def check_plan(plan, device):
            assert plan in (PLAN, PACKED_PLAN) and device.startswith("cuda")
            if error is not None:
                raise error

        monkeypatch.setattr("gte_deploy.backends.tensorrt.plan.check_plan", check_plan)

    return make


def test_what_is_made_for_gpus():
    assert not is_for_gpus(manifest("int8"))
    for bundle in (
        manifest("fp16", (), plan=PLAN),
        manifest("fp16", ("tensorrt",)),
        manifest("fp16", ("onnxruntime",), target="cuda"),
    ):
        assert is_for_gpus(bundle)


def test_an_engine_that_fits_is_taken(machine, fits):
    fits()
    for engines in ((), ("tensorrt",)):
        choice = choose_engine(manifest("fp16", engines, plan=PLAN))
        assert (choice.backend, choice.device) == (
            "tensorrt",
            "cuda",
        ) and "fits this TensorRT and this GPU" in choice.reason
        assert choose_engine(manifest("fp16", engines, plan=PLAN), device="cuda:1").device == "cuda:1"


@pytest.mark.parametrize("error", [BackendError("no GPU"), MissingDependencyError("cuda.bindings", "rtx")])
def test_an_engine_that_does_not_fit_is_left_for_its_graph(machine, fits, error, monkeypatch):
    fits(error)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    choice = choose_engine(manifest("fp16", ("tensorrt",), plan=PLAN))
    assert (choice.backend, choice.device) == ("onnx", "cpu") and str(error) in choice.reason
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    # onnxruntime-gpu lists the provider on every machine.
    monkeypatch.setattr("gte_deploy.backends.tensorrt.cuda.gpu_capability", lambda: None)
    assert choose_engine(manifest("fp16", ("tensorrt",), plan=PLAN)).device == "cpu"
    monkeypatch.setattr("gte_deploy.backends.tensorrt.cuda.gpu_capability", lambda: "8.9")
    assert choose_engine(manifest("fp16", ("tensorrt",), plan=PLAN)).device == "cuda"
    assert choose_engine(manifest("fp16", ("tensorrt",), plan=PLAN), device="cuda:1").device == "cuda:1"
    alone = choose_engine(manifest("fp16", (), plan=PLAN))
    assert alone.backend == "tensorrt" and str(error) in alone.reason
    # ONNX Runtime has no operators for the graph of a padding-free one.
    packed = choose_engine(manifest("fp16", ("tensorrt",), plan=PACKED_PLAN))
    assert packed.backend == "tensorrt" and str(error) in packed.reason


def test_without_an_engine_the_graph_is_taken(machine):
    choice = choose_engine(manifest("fp16", ("onnxruntime",), target="cuda"))
    assert (choice.backend, choice.device) == ("onnx", "cuda")
    choice = choose_engine(manifest("fp16", ("tensorrt",)), device="cpu")
    assert (choice.backend, choice.device, choice.reason) == ("onnx", "cpu", "the bundle has no TensorRT engine")

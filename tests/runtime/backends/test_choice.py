"""The rule behind backend="auto", on machines and bundles of every kind."""

import dataclasses
import importlib.util
import re

import pytest

from gte_deploy.backends import bf16_speed, picks
from gte_deploy.backends.advice import faster_here
from gte_deploy.backends.choice import choose_engine, is_for_gpus, precision_of
from gte_deploy.bundle.manifest import GraphEntry, Manifest, PlanEntry
from gte_deploy.core import cpus
from gte_deploy.core.errors import BackendError, MissingDependencyError
from gte_deploy.core.spec import ModelSpec, Profile, TensorSpec

FIND_SPEC = importlib.util.find_spec
SPEC = ModelSpec(task="embed", max_length=8, vocab_size=10, hidden_size=4, pad_token_id=0)
GRAPH = GraphEntry("onnx/model.onnx", 20, (), (), {})
IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
PLAN = PlanEntry("p", "tensorrt-rtx", "1.7", ("8.9",), (Profile((1, 1), (1, 8), (1, 8)),), (IDS,), (IDS,), {})
PACKED_PLAN = dataclasses.replace(PLAN, inputs=(TensorSpec("input_ids", "int64", ("tokens",)),))


def manifest(precision="fp32", engines=("onnxruntime", "openvino"), computes=("fp32",), **more):
    graphs = dict.fromkeys(engines, GRAPH)
    if "openvino" in graphs:
        graphs["openvino"] = dataclasses.replace(GRAPH, computes=computes)
    return Manifest(SPEC, precision, graphs, {}, {}, {}, **more)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(installed, flags)`: the engines it has and its CPU's flags; no picks but those that a test records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(installed=("onnxruntime", "openvino"), flags="fpu avx2 avx512_vnni"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : Test\nflags\t\t: {flags}\nprocessor : 1\n")
        monkeypatch.setattr(cpus, "CPUINFO", tmp_path / "cpuinfo")
        missing = {"onnxruntime", "openvino"} - set(installed)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else FIND_SPEC(name))

    pytest.importorskip("openvino")
    make()
    return make


BF16_FLAGS = "avx2 avx512_vnni avx512_bf16"
BOTH = ("fp32", "bf16")


@pytest.fixture
def bf16_cpu(machine, monkeypatch):
    """`bf16_cpu(layers, attention)`: a CPU with bfloat16, and how many times as fast as fp32 it computes in it."""
    bf16_speed._measured.cache_clear()

    def make(layers, attention, flags=BF16_FLAGS, installed=("onnxruntime", "openvino")):
        class Timed:
            """A product that takes a second in fp32."""

            def __init__(self, x, y, precision, *, is_attention):
                self._seconds = 1 / (attention if is_attention else layers) if precision == "bf16" else 1.0

            def seconds(self):
                return self._seconds

        machine(installed, flags)
        monkeypatch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: "bf16" in flags)
        monkeypatch.setattr(bf16_speed, "Product", Timed)

    yield make
    bf16_speed._measured.cache_clear()


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


@pytest.mark.parametrize(
    ("precision", "computes", "name"),
    [
        ("fp32", "fp32", "fp32"),
        ("fp32", "bf16", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("int8", "fp32", "int8"),
        ("int8", "bf16", "int8+bf16"),
        ("int8-weight", "fp32", "int8-weight"),
    ],
)
def test_the_name_of_what_a_bundle_is_computed_in(precision, computes, name):
    assert precision_of(manifest(precision), computes) == name
    assert precision_of(manifest("bf16", target="cuda"), "fp32") == "bf16", "the types of its graph say it"


def test_a_machine_that_tells_nothing_of_its_cpu(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(cpus, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: False)
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


@pytest.mark.parametrize(
    ("precision", "computes", "layers", "attention", "chooses", "says"),
    [
        ("bf16", BOTH, 3.0, 0.5, ("openvino", "bf16"), "computes matrix products in bf16 3.0 times as fast as in fp32"),
        ("bf16", BOTH, 1.1, 3.0, ("onnx", "fp32"), "in bf16 1.1 times as fast as in fp32, and fp32 is more exact"),
        ("bf16", BOTH, 0.6, 3.0, ("onnx", "fp32"), "0.6 times"),
        ("bf16", ("fp32",), 3.0, 3.0, ("onnx", "fp32"), "bf16 missed its bounds at export"),
        ("int8", BOTH, 0.6, 2.0, ("openvino", "bf16"), "AVX512-VNNI.*computes attention in bf16 2.0 times"),
        ("int8", BOTH, 3.0, 0.9, ("openvino", "fp32"), "AVX512-VNNI.*computes attention in bf16 0.9 times"),
        ("int8", ("fp32",), 3.0, 3.0, ("openvino", "fp32"), "AVX512-VNNI"),
        ("fp32", BOTH, 9.0, 9.0, ("onnx", "fp32"), "fp32 runs on ONNX Runtime"),
        ("int8-weight", ("fp32",), 9.0, 9.0, ("onnx", "fp32"), "int8-weight runs on ONNX Runtime"),
    ],
)
def test_bfloat16_is_chosen_where_it_was_verified_and_is_faster(
    bf16_cpu, precision, computes, layers, attention, chooses, says
):
    bf16_cpu(layers, attention)
    bundle = manifest(precision, computes=computes)
    choice = choose_engine(bundle)
    assert (choice.backend, choice.precision) == chooses and re.search(says, choice.reason)
    assert chosen(bundle, precision="fp32")[1] == "fp32", "what was asked for comes first"
    on_openvino = choose_engine(bundle, backend="openvino")
    wanted = "bf16" if chooses[1] == "bf16" else "fp32"
    assert (on_openvino.backend, on_openvino.precision) == ("openvino", wanted)
    assert choose_engine(bundle, backend="onnx").precision == "fp32"


def test_a_bundle_for_bfloat16_runs_in_fp32_where_bfloat16_is_missing(bf16_cpu):
    bundle = manifest("bf16", computes=BOTH)
    bf16_cpu(3.0, 3.0, flags="avx2 avx512_vnni")
    choice = choose_engine(bundle)
    assert (choice.backend, choice.precision) == ("onnx", "fp32")
    assert choice.reason == "this CPU does not compute in bf16, and fp32 is more exact"
    bf16_cpu(3.0, 3.0, installed=("onnxruntime",))
    choice = choose_engine(bundle)
    assert (choice.backend, choice.precision) == ("onnx", "fp32")
    assert "openvino, which alone computes in bf16 on a CPU, is not installed" in choice.reason
    bf16_cpu(3.0, 3.0, flags="avx2")
    alone = manifest("bf16", ("openvino",), computes=BOTH)
    assert chosen(alone) == ("openvino", "fp32")
    record("onnx", "fp32", bundle)
    bf16_cpu(3.0, 3.0)
    assert chosen(bundle) == ("onnx", "fp32"), "the measurement of the bundle itself comes first"


@pytest.mark.parametrize(
    ("precision", "computes", "flags", "says"),
    [
        ("fp32", BOTH, "avx2", []),
        (
            "fp32",
            BOTH,
            "avx2 avx512_bf16",
            [r"products in bf16 3.0 times .* --precision bf16; or load\(…, precision='bf16'"],
        ),
        ("fp32", ("fp32",), "avx2 avx512_bf16", ["products in bf16 3.0 times .* --precision bf16[.]$"]),
        ("fp32", BOTH, BF16_FLAGS, ["AVX512-VNNI, so int8 is faster", "3.0 times"]),
        ("bf16", BOTH, BF16_FLAGS, ["AVX512-VNNI, so int8 is faster"]),
        ("int8", BOTH, BF16_FLAGS, []),
        ("int8", ("fp32",), BF16_FLAGS, ["attention in bf16 2.0 times .* again on this CPU"]),
    ],
)
def test_what_would_be_faster_here(bf16_cpu, precision, computes, flags, says):
    bf16_cpu(3.0, 2.0, flags=flags)
    bundle = manifest(precision, computes=computes)
    *found, last = faster_here(bundle)
    assert "gte-deploy bench BUNDLE --pick" in last
    assert len(found) == len(says) and all(map(re.search, says, found))
    record("onnx", "fp32", bundle)
    assert faster_here(bundle) == found, "a recorded pick needs no other measurement"


def test_what_would_be_faster_than_a_bundle_without_a_graph_for_openvino(bf16_cpu):
    bf16_cpu(3.0, 2.0, flags="avx2 avx512_bf16")
    (line,) = faster_here(manifest(engines=("onnxruntime",)))
    assert re.search(r"products in bf16 3.0 times .* --precision bf16[.]$", line)


def test_what_would_be_faster_without_openvino_or_on_a_gpu(bf16_cpu):
    bf16_cpu(3.0, 2.0, installed=("onnxruntime",))
    (line,) = faster_here(manifest("int8"))
    assert "[openvino]'" in line
    assert faster_here(manifest("fp16", ("onnxruntime",), target="cuda")) == []


def test_slow_bfloat16_is_no_advice_and_nothing_is_measured_unless_asked(bf16_cpu):
    bf16_cpu(3.0, 3.0, flags="avx512_bf16")
    assert not any("bf16 3.0" in line for line in faster_here(manifest(), measure=False))
    assert any("bf16 3.0" in line for line in faster_here(manifest()))
    assert any("bf16 3.0" in line for line in faster_here(manifest(), measure=False)), "it is recorded now"
    bf16_speed._measured.cache_clear()
    bf16_cpu(0.6, 0.6, flags="avx512_bf16 amx_bf16")
    assert not any("times as fast" in line for line in faster_here(manifest())), "other flags are another CPU"


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

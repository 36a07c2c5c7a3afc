"""gte_deploy.load: what fits which backend, and errors that say what to do."""

import builtins
import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap

import pytest

import gte_deploy
from gte_deploy import BackendError, BundleError, CheckpointError, InputError, MissingDependencyError
from gte_deploy.backends import picks
from gte_deploy.bundle.manifest import PlanEntry, read_manifest
from gte_deploy.core.spec import Profile, TensorSpec


@pytest.fixture(autouse=True)
def no_picks(monkeypatch, tmp_path):
    """No pick of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_auto_takes_what_fits_and_says_why(word_checkpoints, bundle_of, caplog):
    checkpoint = word_checkpoints["embed"]
    caplog.set_level("INFO", logger="gte_deploy.loading")
    for path, backend, reason in (
        (checkpoint, "torch", "torch runs checkpoints"),
        (str(checkpoint), "torch", "torch runs checkpoints"),
        (bundle_of(checkpoint), "onnx", "fp32 runs on ONNX Runtime unless"),
    ):
        with gte_deploy.load(path) as model:
            info = model.info()
            assert info["backend"] == model.backend == backend and info["precision"] == "fp32"
            assert reason in info["backend_reason"]
            assert f"runs on {backend} in fp32: {info['backend_reason']}" in caplog.messages[-1]


def test_a_pick_is_taken_and_what_is_asked_for_comes_first(word_checkpoints, bundle_of):
    pytest.importorskip("openvino")
    bundle = bundle_of(word_checkpoints["embed"])
    checksum = read_manifest(bundle).to_json()["checksum"]
    picks.save(checksum, picks.Pick("openvino", None, {}, "2026-01-02", picks.engine_versions()))
    with gte_deploy.load(bundle) as model:
        assert model.backend == "openvino" and "bench --pick" in model.info()["backend_reason"]
    with gte_deploy.load(bundle, backend="onnx") as model:
        assert model.backend == "onnx" and model.info()["backend_reason"] == "it was asked for"


def test_bfloat16_is_openvinos_alone(word_checkpoints, bundle_of):
    checkpoint = word_checkpoints["embed"]
    for path, backend, runs_on in (
        (checkpoint, "auto", "torch"),
        (checkpoint, "torch", "torch"),
        (bundle_of(checkpoint), "onnx", "onnx"),
    ):
        with pytest.raises(InputError, match=f"openvino backend .* would run on {runs_on}, which computes in fp32"):
            gte_deploy.load(path, backend=backend, precision="bf16")


def test_bfloat16_on_a_cpu_without_it_is_refused(word_checkpoints, bundle_of, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr("gte_deploy.backends.openvino.has_native_bf16", lambda: False)
    for backend in ("auto", "openvino"):
        with pytest.raises(BackendError, match=r"this CPU \(.+\) does not compute in bfloat16.*precision='fp32'"):
            gte_deploy.load(bundle_of(word_checkpoints["embed"]), backend=backend, precision="bf16")


def test_what_was_not_proven_is_warned_of(word_checkpoints, bundle_of, tmp_path, monkeypatch, caplog):
    shutil.copytree(bundle_of(word_checkpoints["embed"]), tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    graphs = {engine: dataclasses.replace(graph, computes=()) for engine, graph in manifest.graphs.items()}
    (tmp_path / "b/manifest.json").write_text(json.dumps(dataclasses.replace(manifest, graphs=graphs).to_json()))
    gte_deploy.load(tmp_path / "b", backend="onnx").close()
    assert "was not shown to stay within its bounds in fp32" in caplog.text
    caplog.clear()
    gte_deploy.load(bundle_of(word_checkpoints["embed"]), backend="onnx").close()
    assert caplog.text == ""


def test_a_bundle_without_a_graph_for_openvino(word_checkpoints, bundle_of, tmp_path):
    shutil.copytree(bundle_of(word_checkpoints["embed"]), tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    graphs = {"onnxruntime": manifest.graphs["onnxruntime"]}
    (tmp_path / "b/manifest.json").write_text(json.dumps(dataclasses.replace(manifest, graphs=graphs).to_json()))
    with pytest.raises(BackendError, match="no graph for OpenVINO.*backend='onnx'"):
        gte_deploy.load(tmp_path / "b", backend="openvino")
    with gte_deploy.load(tmp_path / "b") as model:
        assert model.info()["backend_reason"] == "the bundle has no graph for OpenVINO"


def test_the_wrong_backend_says_what_to_do(word_checkpoints, bundle_of):
    checkpoint = word_checkpoints["embed"]
    for backend in ("onnx", "openvino", "tensorrt"):
        with pytest.raises(BackendError, match="not a bundle.*gte-export"):
            gte_deploy.load(checkpoint, backend=backend)
    with pytest.raises(BackendError, match="is a bundle.*backend='onnx'"):
        gte_deploy.load(bundle_of(checkpoint), backend="torch")
    with pytest.raises(BackendError, match="no TensorRT engine"):
        gte_deploy.load(bundle_of(checkpoint), backend="tensorrt")
    with pytest.raises(InputError, match="compile=True is for checkpoints"):
        gte_deploy.load(bundle_of(checkpoint), compile=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "backend is .jax.; expected one of auto, onnx"),
        ({"precision": "fp16"}, "precision is .fp16.; expected one of auto, fp32, bf16"),
        ({"device": "tpu"}, "device must be"),
        ({"num_threads": 0}, "num_threads"),
        ({"num_threads": 10**6}, "num_threads"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_batch_tokens": 2**40}, "max_batch_tokens"),
    ],
)
def test_arguments_out_of_range(word_checkpoints, options, message):
    with pytest.raises(InputError, match=message):
        gte_deploy.load(word_checkpoints["embed"], **options)


def test_cuda_that_is_not_there(word_checkpoints):
    import torch

    index = torch.cuda.device_count()
    with pytest.raises(BackendError, match=f"PyTorch sees {index} CUDA devices"):
        gte_deploy.load(word_checkpoints["embed"], device=f"cuda:{index}")


IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
PROFILES = (Profile((1, 1), (8, 32), (16, 64)), Profile((1, 65), (2, 128), (2, 128)))


@pytest.fixture
def gpu_bundle(word_checkpoints, bundle_of, tmp_path):
    """`gpu_bundle(graphs, **more)`: a bundle that says that it is made for a GPU; its graph is one for the CPU."""

    def make(graphs=("tensorrt",), *, with_plan=False, **more):
        folder = tmp_path / "gpu"
        shutil.copytree(bundle_of(word_checkpoints["fill-mask"]), folder)
        manifest = read_manifest(folder)
        if with_plan:
            more["plan"] = PlanEntry(
                "config.json", "tensorrt-rtx", "1.0.0.1", ("8.9",), PROFILES, (IDS,), (IDS,), {"fused_attention": 2}
            )
        changes = {"graphs": dict.fromkeys(graphs, manifest.graphs["onnxruntime"]), "precision": "fp16", **more}
        (folder / "manifest.json").write_text(json.dumps(dataclasses.replace(manifest, **changes).to_json()))
        return folder

    return make


def test_a_graph_for_cuda_is_refused_on_the_cpu(gpu_bundle):
    folder = gpu_bundle(["onnxruntime"], target="cuda")
    for backend in ("auto", "onnx"):
        with pytest.raises(BackendError, match="exported for CUDA.*device='cuda'.*without --target cuda"):
            gte_deploy.load(folder, backend=backend, device="cpu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendError, match="device 'cuda' needs CUDAExecutionProvider"):
            gte_deploy.load(folder)


def test_an_engine_without_its_graph_is_tensorrts_alone(gpu_bundle):
    pytest.importorskip("tensorrt_rtx")
    folder = gpu_bundle([], with_plan=True)
    for backend in ("onnx", "openvino"):
        with pytest.raises(
            BackendError, match=f"no ONNX graph, which the {backend} backend needs.*'tensorrt' on a GPU"
        ):
            gte_deploy.load(folder, backend=backend)
    for backend in ("auto", "tensorrt"):
        with pytest.raises(
            BackendError, match=r"built with TensorRT-RTX 1\.0\.0\.1 and runs only with that version; version"
        ):
            gte_deploy.load(folder, backend=backend)


def test_an_engine_that_does_not_fit_is_passed_over_for_its_graph(gpu_bundle, caplog):
    folder = gpu_bundle(with_plan=True)
    with gte_deploy.load(folder, device="cpu") as model:
        info = model.info()
        assert (info["backend"], info["device"], info["precision"]) == ("onnx", "cpu", "fp16")
        assert "TensorRT does not run this bundle here: a TensorRT engine runs on a GPU" in info["backend_reason"]
        assert model.encode("the king").shape == (32,)
    assert "a CPU runs its fp16 graph slowly" in caplog.text
    with pytest.raises(BackendError, match="no graph for OpenVINO"):
        gte_deploy.load(folder, backend="openvino", device="cpu")
    for precision in ("fp32", "bf16"):
        with pytest.raises(InputError, match=f"computes in fp16.* and not in '{precision}'"):
            gte_deploy.load(folder, precision=precision)


@pytest.mark.parametrize("with_plan", [True, False])
def test_tensorrts_graph_goes_through_onnxruntimes_tensorrt_on_a_gpu(gpu_bundle, monkeypatch, tmp_path, with_plan):
    opened = {}

    class Backend:
        name, device, precision = "onnx", "cuda", "fp16"

        def __init__(self, graph, spec, **options):
            opened.update(options)

    monkeypatch.setattr("gte_deploy.loading.OnnxBackend", Backend)
    gte_deploy.load(gpu_bundle(with_plan=with_plan), backend="onnx", device="cuda:1")
    assert (opened["device"], opened["precision"]) == ("cuda:1", "fp16")
    through = opened["tensorrt"]
    rows, tuned = (2, (2, 128)) if with_plan else (256, (256, 128))
    assert through.profile == Profile((1, 1), tuned, (rows, 128)) and through.max_masks == 512
    assert through.cache.parent == tmp_path / "cache/gte-deploy/tensorrt" and through.cache.stat().st_mode & 0o077 == 0
    assert not through.token_types
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    gte_deploy.load(tmp_path / "gpu", backend="onnx", device="cuda:1")
    assert opened["tensorrt"].cache is None
    shutil.rmtree(tmp_path / "gpu")
    spec = dataclasses.replace(read_manifest(gpu_bundle()).spec, token_types=True, type_vocab_size=2)
    shutil.rmtree(tmp_path / "gpu")
    gte_deploy.load(gpu_bundle(spec=spec), backend="onnx", device="cuda:1")
    assert opened["tensorrt"].token_types


def test_a_bundle_with_a_real_engine(word_checkpoints, bundle_of):
    """As the exporter writes it, as far as it goes without a GPU: the engine is refused, and its graph answers."""
    pytest.importorskip("tensorrt_rtx")
    import torch

    from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; tests/contract covers it there")
    checkpoint = word_checkpoints["fill-mask"]
    bundle = bundle_of(checkpoint, format="trt", tensorrt=TensorRTOptions(runtime="rtx", keep_onnx=True))
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here"):
        gte_deploy.load(bundle, backend="tensorrt")
    with gte_deploy.load(bundle) as model, gte_deploy.load(checkpoint) as reference:
        info = model.info()
        assert (info["backend"], info["device"], info["precision"]) == ("onnx", "cpu", "fp16")
        assert "TensorRT does not run this bundle here: no NVIDIA GPU" in info["backend_reason"]
        one, two = (loaded.fill_mask("the [MASK] is old", top_k=1)[0]["token"] for loaded in (model, reference))
        assert one == two


def test_a_bundle_for_the_cpu_may_run_on_a_gpu(word_checkpoints, bundle_of):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA; tests/contract covers it there")
    with pytest.raises(BackendError, match="needs CUDAExecutionProvider of onnxruntime-gpu"):
        gte_deploy.load(bundle_of(word_checkpoints["embed"]), device="cuda")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder"):
        gte_deploy.load(tmp_path / "none")
    with pytest.raises(CheckpointError):
        gte_deploy.load(tmp_path)


def test_a_bundle_is_verified_before_any_loader_sees_it(word_checkpoints, bundle_of, tmp_path, monkeypatch):
    shutil.copytree(bundle_of(word_checkpoints["embed"]), tmp_path / "b")
    file = tmp_path / "b" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"king", b"ring"))

    def opened(*args, **kwargs):
        raise AssertionError("a loader was called")

    monkeypatch.setattr("gte_deploy.backends.onnxruntime.OnnxBackend.__init__", opened)
    monkeypatch.setattr("gte_deploy.loading.load_tokenizer", opened)
    with pytest.raises(BundleError, match=r"tokenizer.json has sha256"):
        gte_deploy.load(tmp_path / "b")


def test_torch_that_is_not_installed(word_checkpoints, monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"\[torch\]"):
        gte_deploy.load(word_checkpoints["embed"])


def test_torch_threads_are_lowered_to_the_cpus_and_otherwise_left(word_checkpoints, monkeypatch):
    import torch

    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for cpus, asked, expected in ((8, None, []), (2, None, [2]), (2, 3, [3]), (8, 4, [])):
        monkeypatch.setattr("gte_deploy.backends.torch.available_cpus", lambda cpus=cpus: cpus)
        calls.clear()
        gte_deploy.load(word_checkpoints["embed"], num_threads=asked).close()
        assert calls == expected


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_light():
    done = run(
        """
        import gte_deploy
        import sys
        engines = {"torch", "onnxruntime", "openvino", "tensorrt"}
        heavy = (engines | {"transformers", "numpy", "tokenizers"}) & set(sys.modules)
        assert not heavy, heavy
        assert gte_deploy.__version__ and gte_deploy.core.errors.InputError is gte_deploy.InputError
        assert callable(gte_deploy.load) and gte_deploy.Model.__name__ == "Model"
        assert not {"torch", "transformers", "onnxruntime", "openvino"} & set(sys.modules)
        try:
            gte_deploy.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        else:
            raise AssertionError("an attribute that is not there")
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_whole_onnx_inference_needs_neither_torch_nor_transformers(word_checkpoints, bundle_of):
    done = run(
        """
        import importlib.abc
        import sys

        BLOCKED = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "sentence_transformers"}

        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in BLOCKED:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        import gte_deploy

        fill_mask, embed, classify = sys.argv[1:]
        with gte_deploy.load(fill_mask) as model:
            assert model.fill_mask("the [MASK] of france", targets="city")[0]["token_str"] == "city"
            assert model.encode(["a", "the king"], show_progress_bar=True).shape == (2, 32)
        with gte_deploy.load(embed) as model:
            assert model.encode_query("a", normalize_embeddings=True).shape == (32,)
            assert len(model.encode(["a", "b"], output_value=None)) == 2
            assert model.tokenize("a")["input_ids"].shape == (1, 3)
            try:
                model.encode("a", convert_to_tensor=True)
            except gte_deploy.MissingDependencyError as error:
                assert "[torch]" in str(error)
            else:
                raise AssertionError("a tensor without torch")
        with gte_deploy.load(classify) as model:
            assert len(model.rank("a", ["b", "c"])) == 2
        with gte_deploy.load() as model:
            (best,) = model.fill_mask("The president of the united [MASK] of America.", top_k=1)
            assert best["token_str"] == "states"
        try:
            gte_deploy.load("gte-en-mlm-tiny", backend="torch")
        except gte_deploy.MissingDependencyError as error:
            assert "[torch]" in str(error)
        else:
            raise AssertionError("a checkpoint without torch")
        assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
        """,
        *(bundle_of(word_checkpoints[task]) for task in ("fill-mask", "embed", "classify")),
    )
    assert done.returncode == 0, done.stderr

"""What the ONNX backend refuses, and how it looks into a graph without the onnx package."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gte_deploy
from gte_deploy.backends.base import Batch
from gte_deploy.backends.onnxruntime import OnnxBackend, ThroughTensorRT, _load_cuda_libraries, _providers
from gte_deploy.bundle.inspection import check_graphs, inspect_onnx
from gte_deploy.bundle.manifest import FileEntry, GraphEntry, GraphPart, Manifest, read_manifest
from gte_deploy.core.errors import BackendError, BundleError, InputError, MissingDependencyError, NonFiniteError
from gte_deploy.core.files import sha256_file
from gte_deploy.core.install import install_command
from gte_deploy.core.spec import ModelSpec, Profile

SPEC = ModelSpec(task="embed", max_length=8, vocab_size=10, hidden_size=4, pad_token_id=0)


def graph_model(*, nodes=(), initializers=(), functions=(), extra_input=None):
    """last_hidden_state = table[input_ids], with whatever else is asked for beside it."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "s"])
    more = [helper.make_tensor_value_info(extra_input, TensorProto.INT64, ["b", "s"])] if extra_input else []
    hidden = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "s", 4])
    table = numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(10, 4), "table")
    gather = helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])
    graph = helper.make_graph([gather, *nodes], "g", [ids, mask, *more], [hidden], [table, *initializers])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("evil", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def saved(tmp_path, model, **options):
    path = tmp_path / "onnx" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, **options)
    return path


def manifest_of(*files):
    entries = {name: FileEntry(1, "0") for name in ("onnx/model.onnx", *files)}
    graph = GraphEntry("onnx/model.onnx", 20, (), (), {})
    return Manifest(SPEC, "fp32", {"onnxruntime": graph}, entries, {}, {})


def with_part(manifest):
    """The manifest of a bundle whose graph also has the part onnx/model_answer.onnx."""
    graph = dataclasses.replace(manifest.graphs["onnxruntime"], parts=(GraphPart("onnx/model_answer.onnx", (), ()),))
    return dataclasses.replace(manifest, graphs={"onnxruntime": graph})


def batch_of(ids):
    ids = np.asarray(ids, dtype=np.int64)
    return Batch(ids, np.ones_like(ids))


def test_inspection_sees_every_node_and_file(tmp_path):
    inner = helper.make_graph([helper.make_node("Inner", [], ["x"], domain="evil")], "then", [], [])
    nodes = [
        helper.make_node("Relu", ["last_hidden_state"], ["r"]),
        helper.make_node("FusedMatMul", ["r", "r"], ["m"], domain="com.microsoft"),
        helper.make_node("If", ["c"], ["i"], then_branch=inner, else_branch=inner),
    ]
    function = helper.make_function("local", "F", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [])
    weights = [numpy_helper.from_array(np.ones(2000, np.float32), f"w{i}") for i in range(2)]
    model = graph_model(nodes=nodes, initializers=weights, functions=[function])
    path = saved(tmp_path, model, save_as_external_data=True, location="model.onnx.data")
    contents = inspect_onnx(path)
    assert contents.operators == {
        ("", "Gather"),
        ("", "Relu"),
        ("com.microsoft", "FusedMatMul"),
        ("", "If"),
        ("evil", "Inner"),
        ("", "Neg"),
    }
    assert contents.external_files == {"model.onnx.data"}


def test_inspection_agrees_with_onnx_on_a_real_bundle(bundle_of, word_checkpoints):
    path = bundle_of(word_checkpoints["fill-mask"]) / "onnx" / "model.onnx"
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert inspect_onnx(path).operators == {(node.domain, node.op_type) for node in nodes}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x3a\xff\x01", b"not a model", b"\x3b", b"\x3d\x00"])
def test_inspection_of_something_else(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="not an ONNX model"):
        inspect_onnx(tmp_path / "x.onnx")


def test_inspection_bounds_its_depth(tmp_path):
    def field(number, content):
        size, prefix = len(content), bytearray([number << 3 | 2])
        while size > 0x7F:
            prefix.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([*prefix, size]) + content

    graph = b""
    for _ in range(500):  # a graph in an attribute of a node of a graph …
        graph = field(1, field(5, field(6, graph)))
    (tmp_path / "x.onnx").write_bytes(field(7, graph))
    with pytest.raises(BundleError, match="deeper"):
        inspect_onnx(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (helper.make_node("DequantizeLinear", ["a"], ["x"], domain="trt"), "trt::DequantizeLinear"),
        (helper.make_node("EPContext", [], ["x"], domain="com.microsoft", ep_cache_context=b"code"), "EPContext"),
        (helper.make_node("Anything", [], ["x"], domain="evil"), "evil::Anything"),
    ],
)
def test_foreign_code_is_refused_by_name(tmp_path, node, name):
    saved(tmp_path, graph_model(nodes=[node]))
    with pytest.raises(BundleError, match=name):
        check_graphs(tmp_path, manifest_of())


def test_the_graph_of_an_engine_that_is_not_to_run_is_looked_at_too(tmp_path):
    saved(tmp_path, graph_model(nodes=[helper.make_node("Anything", [], ["x"], domain="evil")]))
    (tmp_path / "onnx/model.onnx").rename(tmp_path / "onnx/model_openvino.onnx")
    saved(tmp_path, graph_model())
    check_graphs(tmp_path, manifest_of())
    graphs = {**manifest_of().graphs, "openvino": GraphEntry("onnx/model_openvino.onnx", 20, (), (), {})}
    with pytest.raises(BundleError, match="model_openvino.onnx has a node evil::Anything"):
        check_graphs(tmp_path, dataclasses.replace(manifest_of(), graphs=graphs))


def test_the_part_of_a_graph_is_looked_at_too(tmp_path):
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    for model, says in (
        (graph_model(nodes=[helper.make_node("Anything", [], ["x"], domain="evil")]), "has a node evil::Anything"),
        (graph_model(initializers=[weight]), "reads '../secret', which the manifest does not name"),
    ):
        saved(tmp_path, model).rename(tmp_path / "onnx/model_answer.onnx")
        saved(tmp_path, graph_model())
        check_graphs(tmp_path, manifest_of())
        with pytest.raises(BundleError, match=f"model_answer.onnx {says}"):
            check_graphs(tmp_path, with_part(manifest_of()))


@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "other.data"])
def test_files_outside_the_manifest_are_refused(tmp_path, location):
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    saved(tmp_path, graph_model(initializers=[weight]))
    with pytest.raises(BundleError, match="manifest does not name"):
        check_graphs(tmp_path, manifest_of("onnx/model.onnx.data"))
    if location == "other.data":
        check_graphs(tmp_path, manifest_of("onnx/other.data"))


def test_a_plain_graph_passes_and_runs(tmp_path):
    path = saved(tmp_path, graph_model())
    check_graphs(tmp_path, manifest_of())
    backend = OnnxBackend(path, SPEC, num_threads=1)
    assert backend.outputs == ("last_hidden_state",)
    hidden = backend.run(batch_of([[1, 2]]), ["last_hidden_state"])["last_hidden_state"]
    assert hidden.tolist() == [[[4, 5, 6, 7], [8, 9, 10, 11]]]


def test_an_input_that_nobody_provides(tmp_path):
    with pytest.raises(BackendError, match="token_type_ids"):
        OnnxBackend(saved(tmp_path, graph_model(extra_input="token_type_ids")), SPEC)


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"x" * 100)
    with pytest.raises(BackendError, match="cannot open"):
        OnnxBackend(tmp_path / "x.onnx", SPEC)
    with pytest.raises(BackendError, match="cannot open"):
        OnnxBackend(tmp_path / "none.onnx", SPEC)


def test_an_error_while_running_is_typed(tmp_path):
    # The graph has fewer rows than the spec says: ONNX Runtime itself refuses id 11.
    spec = dataclasses.replace(SPEC, vocab_size=20)
    backend = OnnxBackend(saved(tmp_path, graph_model()), spec, num_threads=1)
    with pytest.raises(BackendError, match=r"failed on a batch of \(1, 1\)"):
        backend.run(batch_of([[11]]), ["last_hidden_state"])


def test_cuda_is_not_replaced_by_the_cpu(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA; tests/contract covers it there")
    with pytest.raises(BackendError, match=r"\[gpu\]"):
        OnnxBackend(saved(tmp_path, graph_model()), SPEC, device="cuda")


TENSORRT = ThroughTensorRT(Profile((1, 1), (2, 4), (2, 8)), None)


def test_cuda_and_tensorrt_get_their_options(monkeypatch, tmp_path):
    import onnxruntime

    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    cuda = {"device_id": 1, "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    assert _providers(onnxruntime, "cuda:1") == [("CUDAExecutionProvider", cuda), ("CPUExecutionProvider", {})]
    options = {
        "device_id": 1,
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:2x4,attention_mask:2x4",
        "trt_profile_max_shapes": "input_ids:2x8,attention_mask:2x8",
    }
    plain = _providers(onnxruntime, "cuda:1", TENSORRT)
    assert plain == [("TensorrtExecutionProvider", options), *_providers(onnxruntime, "cuda:1")]
    ((_, found), *_) = _providers(onnxruntime, "cuda:1", dataclasses.replace(TENSORRT, token_types=True))
    assert found["trt_profile_max_shapes"] == "input_ids:2x8,attention_mask:2x8,token_type_ids:2x8"
    kept = dataclasses.replace(TENSORRT, cache=tmp_path, max_masks=4)
    ((_, found), *_) = _providers(onnxruntime, "cuda:1", kept)
    assert found["trt_profile_min_shapes"].endswith(",mask_positions:1x2")
    assert found["trt_profile_opt_shapes"].endswith(",mask_positions:4x2")
    assert found["trt_profile_max_shapes"].endswith(",mask_positions:4x2")
    assert {name: value for name, value in found.items() if "cache" in name} == {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(tmp_path),
    }
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every[1:])
    with pytest.raises(BackendError, match="needs TensorrtExecutionProvider of onnxruntime-gpu"):
        _providers(onnxruntime, "cuda", TENSORRT)


@pytest.fixture
def fake_gpu_package(monkeypatch, tmp_path):
    """`fake_gpu_package(source, version)`: an onnxruntime-gpu without a driver, whose `preload_dlls` is `source`."""
    import onnxruntime

    def opened(source, version="13.0"):
        fake = types.ModuleType("onnxruntime")
        vars(fake).update(vars(onnxruntime))
        for name in ("preload_dlls", "print"):
            vars(fake).pop(name, None)
        fake.cuda_version = version
        fake.calls = []
        fake.get_available_providers = lambda: GPU_PROVIDERS
        # Without its libraries, a provider is left out, and ONNX Runtime takes the next.
        on_cpu = [("CPUExecutionProvider", {})]
        fake.InferenceSession = lambda path, options, providers: (
            fake.calls.append("session") or onnxruntime.InferenceSession(path, options, providers=on_cpu)
        )
        exec(source, vars(fake))
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        return fake

    return opened


GPU_PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
PRELOAD = """
def preload_dlls():
    calls.append("preload")
    print("Failed to load libcublas.so.13:", OSError("no such file"))
"""


def test_cuda_libraries_of_pip_are_loaded_once_before_the_first_session(fake_gpu_package, tmp_path, capfd, caplog):
    fake = fake_gpu_package(PRELOAD)
    caplog.set_level("DEBUG", "gte_deploy")
    for _ in range(2):
        with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
            OnnxBackend(saved(tmp_path, graph_model()), SPEC, device="cuda")
    assert fake.calls == ["preload", "session", "session"]
    assert capfd.readouterr() == ("", "")
    assert "Failed to load libcublas.so.13: no such file" in caplog.text
    assert not hasattr(fake, "print"), "the function's own print is back"


@pytest.mark.parametrize("source", ["", "def preload_dlls():\n    raise RuntimeError('no such directory')"])
def test_preloading_is_not_required(fake_gpu_package, tmp_path, source):
    fake_gpu_package(source)
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        OnnxBackend(saved(tmp_path, graph_model()), SPEC, device="cuda")


def test_the_cpu_loads_no_cuda_libraries(fake_gpu_package, tmp_path):
    fake = fake_gpu_package(PRELOAD)
    OnnxBackend(saved(tmp_path, graph_model()), SPEC, num_threads=1).close()
    assert fake.calls == ["session"]


def test_the_installed_onnxruntime_preloads_silently(capfd):
    import onnxruntime

    _load_cuda_libraries.cache_clear()
    _load_cuda_libraries(onnxruntime)
    assert capfd.readouterr() == ("", "")
    assert "print" not in vars(onnxruntime)


@pytest.mark.parametrize(
    "version, tensorrt, says",
    [
        ("13.0", None, "CUDA 13.0 could not be loaded. Install an NVIDIA driver 580 or newer, and "
         f"{install_command('gpu')}, or pass device='cpu'"),
        ("12.8", None, "CUDA 12.8 could not be loaded. Install an NVIDIA driver 525 or newer"),
        ("14.1", None, "Install an NVIDIA driver for it"),
        ("13.0", TENSORRT, "TensorRT 10 and CUDA 13.0 could not be loaded. Install an NVIDIA driver 580 or newer, and "
         f"{install_command('gpu')} 'tensorrt-cu13==10.*'"),
    ],
)  # fmt: skip
def test_missing_libraries_are_named_with_their_packages(fake_gpu_package, tmp_path, version, tensorrt, says):
    fake_gpu_package(PRELOAD, version)
    with pytest.raises(BackendError, match=re.escape(says)):
        OnnxBackend(saved(tmp_path, graph_model()), SPEC, device="cuda", tensorrt=tensorrt)


def test_tensorrt_loads_the_libraries_of_its_package(fake_gpu_package, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(importlib, "import_module", record_imports(loaded))
    fake_gpu_package(PRELOAD)
    for tensorrt in (None, TENSORRT):
        with pytest.raises(BackendError, match="could not be loaded"):
            OnnxBackend(saved(tmp_path, graph_model()), SPEC, device="cuda", tensorrt=tensorrt)
        assert ("tensorrt_libs" in loaded) == (tensorrt is not None)


def record_imports(loaded):
    found = importlib.import_module

    def import_module(name):
        loaded.append(name)
        return types.ModuleType(name) if name == "tensorrt_libs" else found(name)

    return import_module


def test_through_tensorrt_a_batch_is_run_in_parts_of_the_profiles_shape(tmp_path):
    """The provider itself needs a GPU; what is run on it, and what becomes of it, is the same on the CPU."""
    path = saved(tmp_path, graph_model())
    plain, backend = OnnxBackend(path, SPEC, num_threads=1), OnnxBackend(path, SPEC, num_threads=1, tensorrt=TENSORRT)
    shapes = []
    run = backend._run
    backend._run = lambda session, feed, outputs: (
        shapes.append({name: array.shape for name, array in feed.items()}) or run(session, feed, outputs)
    )
    batch = batch_of(np.arange(15).reshape(5, 3) % 10)
    expected = plain.run(batch, ["last_hidden_state"])["last_hidden_state"]
    np.testing.assert_array_equal(backend.run(batch, ["last_hidden_state"])["last_hidden_state"], expected)
    assert shapes == [{"input_ids": (rows, 8), "attention_mask": (rows, 8)} for rows in (2, 2, 1)]


def test_through_tensorrt_types_go_with_their_tokens(tmp_path):
    model = graph_model(extra_input="token_type_ids")  # table[ids + types]
    model.graph.node[0].input[1] = "typed_ids"
    model.graph.node.insert(0, helper.make_node("Add", ["input_ids", "token_type_ids"], ["typed_ids"]))
    spec = dataclasses.replace(SPEC, token_types=True, type_vocab_size=2)
    backend = OnnxBackend(saved(tmp_path, model), spec, num_threads=1, tensorrt=TENSORRT)
    ids, types = np.arange(15).reshape(5, 3) % 9, np.arange(15).reshape(5, 3) % 2
    found = backend.run(Batch(ids, np.ones_like(ids), None, types), ["last_hidden_state"])["last_hidden_state"]
    np.testing.assert_array_equal(found[..., 0], 4 * (ids + types))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "CPU", "", 0])
def test_device_names(tmp_path, device):
    with pytest.raises(InputError, match="device must be"):
        OnnxBackend(saved(tmp_path, graph_model()), SPEC, device=device)


def test_threads_default_to_the_cpus_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("gte_deploy.backends.onnxruntime.available_cpus", lambda: 3)
    path = saved(tmp_path, graph_model())
    assert OnnxBackend(path, SPEC).num_threads == 3
    assert OnnxBackend(path, SPEC, num_threads=2).num_threads == 2
    backend = OnnxBackend(path, SPEC)
    options = backend._graphs.for_outputs(backend.outputs).session.get_session_options()
    assert options.intra_op_num_threads == 3


@pytest.mark.parametrize("device, extra", [("cpu", "cpu"), ("cuda:1", "gpu")])
def test_without_onnxruntime_the_extra_is_named(tmp_path, monkeypatch, device, extra):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=rf"\[{extra}\]"):
        OnnxBackend(saved(tmp_path, graph_model()), SPEC, device=device)


def rewritten(bundle, target, change):
    """A copy of a bundle with another graph, and a manifest that is true to it."""
    shutil.copytree(bundle, target)
    manifest = read_manifest(target)
    graph = dataclasses.replace(manifest.graphs["onnxruntime"], parts=(), all_logits=None)
    path = target / graph.path
    model = onnx.load(path)
    change(model)
    for file in (target / "onnx").iterdir():
        file.unlink()
    onnx.save(model, path)
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("onnx/")}
    files[graph.path] = FileEntry(path.stat().st_size, sha256_file(path))
    changed = dataclasses.replace(manifest, files=files, graphs={"onnxruntime": graph})
    (target / "manifest.json").write_text(json.dumps(changed.to_json()))
    return target


def test_nan_never_leaves(bundle_of, word_checkpoints, tmp_path):
    """One poisoned word: the inputs that hold it are named, and the others still work."""

    def poison(word):
        def change(model):
            for tensor in model.graph.initializer:
                if list(tensor.dims) == [128, 32]:
                    values = numpy_helper.to_array(tensor).copy()
                    values[word] = np.nan
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                    return
            raise AssertionError("no word embedding in the graph")

        return change

    with gte_deploy.load(rewritten(bundle_of(word_checkpoints["embed"]), tmp_path / "b", poison(33))) as model:
        word = model._tokenizer.decode([33])
        good = model.encode(["the king", "a"])
        with pytest.raises(NonFiniteError, match=r"for the inputs 1, 3; "):
            model.encode(["the king", word, "a", f"the {word} a of in"], batch_size=4, max_batch_tokens=10_000)
        with pytest.raises(NonFiniteError, match="for the inputs 0"):
            model.encode(word, output_value="token_embeddings")
        np.testing.assert_array_equal(model.encode(["the king", "a"]), good)


def test_a_bundle_with_a_compiled_engine_inside_is_refused_before_it_is_opened(bundle_of, word_checkpoints, tmp_path):
    def change(model):
        model.graph.node.append(helper.make_node("EPContext", [], ["x"], domain="com.microsoft"))

    folder = rewritten(bundle_of(word_checkpoints["embed"]), tmp_path / "b", change)
    with pytest.raises(BundleError, match="EPContext"):
        gte_deploy.load(folder)

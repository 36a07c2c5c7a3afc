"""Engines from elsewhere: what fits the bundle's graph becomes its engine, and all else is refused with the reason.

The engines are doubles that answer what an inspector and a runtime ask; no engine is run.
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import types

import pytest
from huggingface_hub import ModelCard

for name in ("torch", "transformers", "onnx", "onnxruntime"):
    pytest.importorskip(name)

import gte_deploy  # noqa: E402
from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends.tensorrt import cuda as cuda_module  # noqa: E402
from gte_deploy.bundle.manifest import open_bundle, read_manifest  # noqa: E402
from gte_deploy.bundle.signature import SIGNATURE_NAME  # noqa: E402
from gte_deploy.core import exit_codes  # noqa: E402
from gte_deploy.core.errors import (  # noqa: E402
    BackendError,
    BundleError,
    ExportError,
    InputError,
    MissingDependencyError,
)
from gte_deploy.exporters import adoption  # noqa: E402
from gte_deploy.exporters.adoption import adopt, read_header  # noqa: E402
from gte_deploy.exporters.cli import main  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.layouts import layout_of  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.profiles import parse_profile  # noqa: E402
from gte_deploy.exporters.triton.repository import export_repository  # noqa: E402
from tensorrt_doubles import HostRuntime  # noqa: E402

PLAN = "tensorrt/model.plan"
VERSION = "10.16.2.10"
PROFILES = ("1x1:4x16:8x32", "1x33:1x48:2x64")
TYPES = {"int64": "INT64", "int32": "INT32", "float32": "FLOAT", "float16": "HALF"}


def plan_bytes(tag=b"ftrt", version=(10, 16, 2, 10), body=b"kernels"):
    return tag + bytes(20) + bytes(version) + body


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Task -> a bundle with a graph for TensorRT and no engine."""
    folder = tmp_path_factory.mktemp("graphs")
    bundles = {}
    for task in ("embed", "fill-mask"):
        checkpoint = make_checkpoint(folder / task, task=task, hidden_size=64, heads=2, intermediate=128, layers=2)
        options = {"format": "trt", "onnx_only": True, "max_length": 64, "task": task}
        bundles[task] = export(checkpoint, folder / f"{task}-bundle", **options).path
    answers = {**options, "task": "embed", "pooling": "cls", "outputs": "answer"}
    bundles["answers"] = export(folder / "embed", folder / "answers-bundle", **answers).path
    return bundles


@pytest.fixture
def bundle(made, tmp_path):
    """`bundle(task)`: a copy of the bundle, in which the user built an engine."""

    def copy(task="embed"):
        folder = tmp_path / "bundle"
        shutil.copytree(made[task], folder)
        (folder / "model.plan").write_bytes(plan_bytes())
        return folder

    return copy


class Engine:
    """Answers for an engine of the graph; `tensors`, `profiles` and `lines` may be changed before it is opened."""

    def __init__(self, graph, profiles=PROFILES):
        self.inputs = {tensor.name for tensor in graph.inputs}
        self.tensors = {
            tensor.name: (tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
            for tensor in (*graph.inputs, *graph.outputs)
        }
        layout = layout_of(graph.inputs)
        self.profiles = [layout.shapes(parse_profile(profile)) for profile in profiles]
        self.lines = [
            "Layers:",
            "Name: Reformatting CopyNode for Input Tensor 0, LayerType: Reformat, Inputs: [], Outputs: []",
            *(
                f"Name: _gemm_mha_v2_myl{profile}_{layer}, LayerType: kgen, Inputs: [ {{ Name: q{tag}, Dimensions: "
                "[-1,-1,32], Format/Datatype: Half }], Outputs: [], TacticName: _gemm_mha_v2_0x11, StreamId: 0, "
                "Metadata: "
                for profile, tag in ((0, ""), (1, " [profile 1]"))
                for layer in range(2)
            ),
        ]

    num_io_tensors = property(lambda self: len(self.tensors))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name=TYPES.get(self.tensors[name][0], "INT4"))

    def get_tensor_shape(self, name):
        return list(self.tensors[name][1])

    def get_tensor_profile_shape(self, name, index):
        return [list(shape) for shape in self.profiles[index][name]]

    def create_engine_inspector(self):
        return types.SimpleNamespace(get_engine_information=lambda form: "\n".join(self.lines))


@pytest.fixture
def machine(monkeypatch):
    """TensorRT 10.16.2.10 with a GPU of sm87; `machine.engine` is what a plan becomes."""
    module = types.ModuleType("tensorrt")
    module.__version__ = VERSION
    module.engine, module.seen = None, []

    class ILogger:
        Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2, INFO=3, VERBOSE=4)

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            module.seen.append(data)
            module.opened_on = module.cuda.device()
            if module.engine is None:
                self.logger.log(1, "the plan is for another GPU")
            return module.engine

    module.ILogger, module.Runtime = ILogger, Runtime
    module.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
    module.LayerInformationFormat = types.SimpleNamespace(ONELINE="one line")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    module.cuda = HostRuntime()
    monkeypatch.setattr(cuda_module, "import_runtime", lambda extra: module.cuda)
    monkeypatch.setattr(cuda_module, "gpu_capability", lambda index: "8.7")
    return module


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", ["embed", "fill-mask"])
def test_a_plan_becomes_the_engine_of_its_bundle(task, bundle, machine):
    folder = bundle(task)
    before, graph = contents(folder), read_manifest(folder).graphs["tensorrt"]
    machine.engine = Engine(graph)
    told = []
    result = adopt(folder / "model.plan", folder, progress=told.append)
    manifest = open_bundle(folder)
    assert result.plan == manifest.plan and result.size == len(plan_bytes())
    assert (manifest.plan.path, manifest.plan.variant, manifest.plan.version) == (PLAN, "tensorrt", VERSION)
    assert manifest.plan.compute_capabilities == ("8.7",) and manifest.plan.timing_cache is None
    assert manifest.plan.profiles == tuple(map(parse_profile, PROFILES))
    assert (manifest.plan.inputs, manifest.plan.outputs) == (graph.inputs, graph.outputs)
    assert manifest.plan.layers == {"fused_attention": 2}
    assert (folder / PLAN).read_bytes() == plan_bytes() and machine.seen == [plan_bytes()]
    assert not any("sign" in line for line in told)
    (caveat,) = manifest.plan.caveats
    assert "built elsewhere" in caveat and caveat in told and "TensorRT 10.16.2.10" in " ".join(told)
    # Nothing else changes, and the manifest tells nothing else.
    after = contents(folder)
    changed = {str(name) for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed == {PLAN, "manifest.json", "README.md"}
    old = json.loads(before[next(name for name in before if str(name) == "manifest.json")])
    new = json.loads((folder / "manifest.json").read_text())
    assert {name for name in new if new[name] != old[name]} == {"plan", "files", "checksum"}


@pytest.mark.parametrize("task", ["embed", "fill-mask"])
def test_the_card_of_an_adopted_engine_tells_the_truth(task, bundle, machine):
    folder = bundle(task)
    before = ModelCard.load(folder / "README.md")
    assert "No engine was built." in before.text and "a TensorRT engine" not in before.text
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    plan = adopt(folder / "model.plan", folder).plan
    card = ModelCard.load(folder / "README.md")
    assert "for tensorrt and a TensorRT engine." in card.text and "No engine was built." not in card.text
    assert plan.caveats[0] in card.text and all(line in card.text for line in plan.describe())
    assert card.data.to_dict() == before.data.to_dict()
    # The numbers are still those of the export.
    agreement = before.text[before.text.index("## Agreement") : before.text.index("## Limits")]
    assert agreement in card.text and "| tensorrt" in agreement
    assert before.text[before.text.index("## Source") :] in card.text
    assert "'.[trt]'" in card.text
    open_bundle(folder)
    adopt(folder / "model.plan", folder, force=True)
    assert ModelCard.load(folder / "README.md").content == card.content


def test_signatures_of_the_manifest_without_the_engine_are_removed(bundle, machine):
    folder, told = bundle(), []
    (folder / SIGNATURE_NAME).write_bytes(bytes(64))
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    adopt(folder / "model.plan", folder, progress=told.append)
    assert not (folder / SIGNATURE_NAME).exists() and any("sign the bundle again" in line for line in told)


def test_a_bundle_without_a_card_gets_none(bundle, machine):
    folder = bundle()
    manifest = read_manifest(folder)
    (folder / "README.md").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "README.md"}
    (folder / "manifest.json").write_text(json.dumps(dataclasses.replace(manifest, files=files).to_json()))
    machine.engine = Engine(manifest.graphs["tensorrt"])
    adopt(folder / "model.plan", folder)
    assert open_bundle(folder).plan is not None and not (folder / "README.md").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_kill_leaves_a_valid_bundle(steps, force, bundle, machine, monkeypatch):
    folder = bundle()
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    if force:
        adopt(folder / "model.plan", folder)
        (folder / "model.plan").write_bytes(plan_bytes(body=b"other kernels"))
    done = []

    def dies(write):
        def write_or_die(*arguments):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(arguments)
            write(*arguments)

        return write_or_die

    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(adoption, name, dies(getattr(adoption, name)))
    with pytest.raises(KeyboardInterrupt):
        adopt(folder / "model.plan", folder, force=force)
    monkeypatch.undo()
    left = open_bundle(folder)
    assert (left.plan is None) is not (force and steps == 0)


def test_a_plan_is_opened_on_the_chosen_gpu(bundle, machine):
    folder = bundle()
    machine.engine, machine.cuda.count = Engine(read_manifest(folder).graphs["tensorrt"]), 2
    adopt(folder / "model.plan", folder, device="cuda:1")
    assert (machine.opened_on, machine.cuda.device()) == (1, 0)


def test_the_runtime_and_triton_take_an_adopted_engine(bundle, machine, tmp_path):
    folder = bundle()
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    adopt(folder / "model.plan", folder)
    with gte_deploy.load(folder, backend="tensorrt", device="cuda") as model:
        assert model.backend == "tensorrt" and model.info()["precision"] == "fp16"
        assert model.info()["outputs"] == ["last_hidden_state", "sentence_embedding"]
    arguments = ["--format", "triton", "--engine", str(folder), "--output", str(tmp_path / "repository"), "--quiet"]
    assert main(arguments) == 0
    assert (tmp_path / "repository" / "gte_plan" / "1" / "model.plan").read_bytes() == plan_bytes()
    config = (tmp_path / "repository" / "gte_plan" / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"' in config and "profile" in config


def test_an_engine_of_fill_mask_serves_too(bundle, machine, tmp_path):
    folder = bundle("fill-mask")
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    adopt(folder / "model.plan", folder)
    with gte_deploy.load(folder, backend="tensorrt", device="cuda") as model:
        assert model.spec.task == "fill-mask"
    export_repository(engine=folder, output=tmp_path / "repository")


def test_an_engine_of_answers(bundle, machine, tmp_path):
    """Its bundle, the runtime and a repository have embeddings, and everything else is refused by name."""
    folder = bundle("answers")
    graph = read_manifest(folder).graphs["tensorrt"]
    assert [tensor.name for tensor in graph.outputs] == ["sentence_embedding"]
    machine.engine = Engine(graph)
    result = adopt(folder / "model.plan", folder)
    assert result.plan.outputs == graph.outputs and result.plan.layers == {"fused_attention": 2}
    with gte_deploy.load(folder, backend="tensorrt", device="cuda") as model:
        assert model.info()["outputs"] == ["sentence_embedding"]
        for options in ({"output_value": "token_embeddings"}, {"output_value": None}, {"pooling": "mean"}):
            with pytest.raises(BackendError, match="'last_hidden_state'.* Export it with --outputs all"):
                model.encode("w5 w6", **options)
    found = export_repository(engine=folder, output=tmp_path / "repository")
    assert set(found.ensembles) == {"gte_embed", "gte_embed_fast", "gte_embed_ids"}


def test_an_engine_of_all_outputs_does_not_fit_a_graph_of_answers(bundle, machine):
    folder = bundle("answers")
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    machine.engine.tensors["last_hidden_state"] = ("float32", (-1, -1, 64))
    with pytest.raises(ExportError, match="it has the outputs last_hidden_state, sentence_embedding, and the graph"):
        adopt(folder / "model.plan", folder)


def test_an_engine_is_replaced_only_on_request(bundle, machine):
    folder = bundle()
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    adopt(folder / "model.plan", folder)
    other = plan_bytes(body=b"faster kernels")
    (folder / "model.plan").write_bytes(other)
    with pytest.raises(ExportError, match=r"holds an engine already.*--force"):
        adopt(folder / "model.plan", folder)
    assert open_bundle(folder) and (folder / PLAN).read_bytes() == plan_bytes()
    # As a kill between the plan and the manifest leaves it.
    (folder / PLAN).write_bytes(other)
    with pytest.raises(BundleError):
        open_bundle(folder)
    adopt(folder / "model.plan", folder, force=True)
    assert open_bundle(folder).files[PLAN].size == len(other)


@pytest.mark.parametrize(
    "dtype, fits",
    [("int32", True), ("float32", False), ("int4", False)],
)
def test_inputs_of_other_types(dtype, fits, bundle, machine):
    folder = bundle()
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    machine.engine.tensors["input_ids"] = (dtype, (-1, -1))
    if fits:
        assert adopt(folder / "model.plan", folder).plan.inputs[0].dtype == dtype
    else:
        with pytest.raises(ExportError, match=r"input_ids is .*, and in the graph int64"):
            adopt(folder / "model.plan", folder)


def without(engine, name):
    del engine.tensors[name]


def reshaped(engine, name, shape):
    engine.tensors[name] = (engine.tensors[name][0], shape)


def profiled(engine, *profiles):
    engine.profiles = [layout_of([]).shapes(parse_profile(profile)) for profile in profiles]


def masked(engine, most):
    for profile in engine.profiles:
        profile["mask_positions"][2] = (most, 2)


def mismatched(engine):
    engine.profiles[1]["attention_mask"][2] = (8, 64)


def unfused(engine):
    engine.lines = [
        line.replace("_gemm_mha_v2", "__myl_SlicMaxrSubExpSumDivMul") if "profile 1" in line else line
        for line in engine.lines
    ]


def overflowing(engine):
    x8, w8 = (f"{{ Name: {n}, Dimensions: [64,64], Format/Datatype: Int8 }}" for n in ("x", "w"))
    alpha = "{ Name: __mye3q_proj/MatMul_alpha, Dimensions: [1], Format/Datatype: Float }"
    y = "{ Name: y, Dimensions: [64,64], Format/Datatype: Half }"
    engine.lines += [
        f"Name: q_proj/MatMul_myl0_7, LayerType: gemm, Inputs: [ {x8}, {w8}, {alpha}], Outputs: [ {y}], TacticName: x",
        f"Name: __myl_MulAdd_myl0_8, LayerType: kgen, Inputs: [ {y}], Outputs: [ {y}], TacticName: x",
    ]


@pytest.mark.parametrize(
    "task, change, says",
    [
        ("embed", lambda engine: without(engine, "attention_mask"), r"has the inputs input_ids, and the graph has att"),
        ("embed", lambda engine: without(engine, "sentence_embedding"), r"has the outputs last_hidden_state, and the"),
        ("embed", lambda engine: reshaped(engine, "sentence_embedding", (-1, 32)), r"shape \(-1, 32\).* \(-1, 64\)"),
        ("embed", lambda engine: reshaped(engine, "input_ids", (1, 1)), r"input_ids has the shape \(1, 1\)"),
        ("embed", lambda engine: profiled(engine, "1x1:1x16:4x32"), r"ends at 32 tokens, and inputs may have 64"),
        ("embed", lambda engine: profiled(engine, "1x1:1x16:4x128"), r"goes to 128 tokens, and the longest .* 64"),
        ("embed", profiled, r"has no profile"),
        ("embed", mismatched, r"profile 1 .*attention_mask has the shapes .*trtexec line"),
        ("fill-mask", lambda engine: masked(engine, 4), r"mask_positions has the shapes"),
        ("embed", unfused, r"would be slow: 0 fused attention layers.*trtexec line"),
        ("embed", overflowing, r"1 8-bit GEMMs store unscaled sums as FP16.*q_proj"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(task, change, says, bundle, machine):
    folder = bundle(task)
    before = contents(folder)
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    change(machine.engine)
    with pytest.raises(ExportError, match=says):
        adopt(folder / "model.plan", folder)
    assert contents(folder) == before


def test_more_masks_than_needed_are_welcome(bundle, machine):
    folder = bundle("fill-mask")
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    masked(machine.engine, 4096)
    assert adopt(folder / "model.plan", folder).plan.profiles


def test_a_listing_of_names_alone_is_a_caveat(bundle, machine):
    folder = bundle()
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    machine.engine.lines = ["Layers:", "{ForeignNode[gte/Gather...pool/Mul]}", "", "Bindings:", "input_ids"]
    plan = adopt(folder / "model.plan", folder).plan
    assert len(plan.caveats) == 2 and "by name alone" in plan.caveats[1] and not plan.layers


def test_a_plan_that_tensorrt_refuses(bundle, machine):
    folder = bundle()
    with pytest.raises(ExportError, match=r"TensorRT 10\.16\.2\.10 refuses .*: the plan is for another GPU"):
        adopt(folder / "model.plan", folder)
    assert read_manifest(folder).plan is None and not (folder / PLAN).exists()


@pytest.mark.parametrize("data", [b"", b"ftrt", b"\x08\x07 an ONNX graph", b"vtrx" + bytes(30)])
def test_what_is_no_plan(data, bundle, machine):
    folder = bundle()
    (folder / "model.plan").write_bytes(data)
    with pytest.raises(InputError, match=r"is not a plan of TensorRT or TensorRT-RTX .*--saveEngine"):
        adopt(folder / "model.plan", folder)
    assert machine.seen == []


def test_a_header_gives_variant_and_version():
    header = read_header(plan_bytes(), "a")
    assert (header.variant, header.version) == ("tensorrt", VERSION)
    assert read_header(plan_bytes(b"vtrt", (1, 7, 1, 116)), "a").version == "1.7.1.116"
    assert read_header(b"ftrt" + b"\x01" * 30, "a").version is None


def test_a_plan_of_another_version_is_not_opened(bundle, machine):
    folder = bundle()
    (folder / "model.plan").write_bytes(plan_bytes(version=(10, 3, 0, 30)))
    with pytest.raises(ExportError, match=r"built with TensorRT 10\.3\.0\.30, and version 10\.16\.2\.10 is installed"):
        adopt(folder / "model.plan", folder)
    assert machine.seen == []


def test_a_tensorrt_that_is_not_installed(bundle, monkeypatch):
    folder = bundle()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"\[trt\].*10\.16\.2\.10.*--system-site-packages"):
        adopt(folder / "model.plan", folder)


def test_bundles_that_cannot_have_an_engine(bundle, machine, tmp_path):
    folder = bundle()
    (folder / "onnx" / "model_tensorrt.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="model_tensorrt"):
        adopt(folder / "model.plan", folder)
    with pytest.raises(BundleError, match="not a bundle"):
        adopt(folder / "model.plan", tmp_path / "nowhere")
    manifest = read_manifest(folder)
    cpu = dataclasses.replace(manifest, graphs={"onnxruntime": manifest.graphs["tensorrt"]})
    (folder / "manifest.json").write_text(json.dumps(cpu.to_json()))
    with pytest.raises(ExportError, match=r"holds no graph for TensorRT.*--onnx-only"):
        adopt(folder / "model.plan", folder)


def test_devices(bundle, machine):
    folder = bundle()
    for device, error, says in (
        ("cpu", InputError, "is opened on a GPU"),
        ("cuda:1", BackendError, "CUDA sees 1 GPUs"),
    ):
        with pytest.raises(error, match=says):
            adopt(folder / "model.plan", folder, device=device)
    with pytest.raises(InputError, match="cannot be read"):
        adopt(folder / "elsewhere.plan", folder)


def test_the_command(bundle, machine, capsys):
    folder = bundle()
    machine.engine = Engine(read_manifest(folder).graphs["tensorrt"])
    assert main(["adopt", str(folder / "model.plan"), str(folder), "--progress"]) == 0
    out, told = capsys.readouterr()
    assert "engine: tensorrt 10.16.2.10 for sm87: 2 fused attention" in out and "built elsewhere" in out
    assert f"engine {PLAN} (0.0 MB)" in out and "gte-export: check the bundle" in told
    assert main(["adopt", str(folder / "model.plan"), str(folder)]) == exit_codes.EXISTS
    assert "--force" in capsys.readouterr().err
    assert main(["adopt", str(folder / "model.plan"), str(folder), "--force", "--quiet", "--json"]) == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["plan"]["version"] == VERSION and not told


def test_the_export_says_how_to_go_on(made):
    report = json.loads((made["embed"] / "report.json").read_text())
    (caveat,) = report["parity"]["not_proven"]
    assert "trtexec --onnx=onnx/model_tensorrt.onnx" in caveat and "gte-export adopt model.plan ." in caveat


def test_it_needs_neither_torch_nor_onnx(bundle, tmp_path):
    """As on a Jetson with JetPack's TensorRT: here it goes as far as the missing TensorRT."""
    folder = bundle()
    blocked = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "matplotlib", "tensorrt")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from gte_deploy.exporters.cli import main\n"
        "sys.exit(main(['adopt', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", code, str(folder / "model.plan"), str(folder), "--progress"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3 and "'tensorrt' is not installed" in ended.stderr, ended.stderr
    assert "check the bundle" in ended.stderr


def test_the_installed_tensorrt_rtx_needs_a_gpu(bundle):
    trt = pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.runtime")
    if cuda_module.gpu_capability() is not None:
        pytest.skip("this machine has a GPU")
    folder = bundle()
    version = tuple(map(int, trt.__version__.split(".")))
    (folder / "model.plan").write_bytes(plan_bytes(b"vtrt", version))
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here"):
        adopt(folder / "model.plan", folder)
    # The same bytes without the check of the GPU: TensorRT-RTX says what it lacks.
    manifest = read_manifest(folder)
    cuda = types.SimpleNamespace(use=contextlib.nullcontext, capability=lambda: "8.9")
    with pytest.raises(ExportError, match=r"TensorRT-RTX .* refuses the plan: \S"):
        adoption.describe_plan(
            plan_bytes(b"vtrt", version),
            manifest,
            name="the plan",
            variant="tensorrt-rtx",
            trt=trt,
            cuda=cuda,
            num_layers=2,
        )
    for name in ("get_tensor_mode", "get_tensor_profile_shape", "create_engine_inspector", "num_optimization_profiles"):
        assert hasattr(trt.ICudaEngine, name), name
    assert trt.TensorIOMode.INPUT is not None and trt.LayerInformationFormat.ONELINE is not None


def test_a_plan_of_tensorrt_rtx_has_the_known_header(bundle, tmp_path):
    """The layout of the first bytes, from an engine that TensorRT-RTX builds here."""
    trt = pytest.importorskip("tensorrt_rtx")
    built = export(
        make_checkpoint(tmp_path / "small", hidden_size=64, heads=2, intermediate=128, layers=1),
        tmp_path / "engine",
        format="trt",
        runtime="rtx",
        max_length=16,
        compute_capabilities=("8.9",),
        profiles=(parse_profile("1x1:1x8:1x16"),),
    )
    header = read_header((built.path / PLAN).read_bytes(), "the plan")
    assert (header.variant, header.version) == ("tensorrt-rtx", trt.__version__)

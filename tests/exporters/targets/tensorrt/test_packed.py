"""The padding-free graph: what it is made of, that it computes what PyTorch does, and who refuses it."""

import dataclasses
import types

import numpy as np
import onnx_ir as ir
import pytest

import gte_deploy
from factories import make_checkpoint
from gte_deploy.backends.base import Batch
from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.core.errors import BackendError, BundleError, ExportError, InputError
from gte_deploy.core.spec import ModelSpec, Profile, TensorSpec
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.export import export
from gte_deploy.exporters.graph.build import build_graphs, save_graph
from gte_deploy.exporters.graph.editing import Builder, replace
from gte_deploy.exporters.targets.tensorrt import engine as tensorrt_engine
from gte_deploy.exporters.targets.tensorrt.emulation import PaddingFreeOnnx
from gte_deploy.exporters.targets.tensorrt.engine import build_plan
from gte_deploy.exporters.targets.tensorrt.graph import COMPUTE_DTYPES, tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.layouts import PADDING_FREE, trtexec_line
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.profiles import check_packed_profiles, packed_profiles, parse_profile
from gte_deploy.exporters.targets.tensorrt.runtimes import (
    MessageLog,
    Runtime,
    choose_runtime,
)
from gte_deploy.exporters.triton.repository import _write_plan
from gte_deploy.exporters.verification.bounds import TOLERANCES
from gte_deploy.exporters.verification.differences import compare
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.families import fusion_sites

FP32, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
# Texts of one token, short and long ones, in runs of up to four.
LENGTHS = (1, 700, 5, 64, 2, 9, 300)
PROFILES = (Profile((1, 1), (2, 32), (3, 64)), Profile((1, 1), (2, 512), (4, 1024)))


@pytest.fixture(scope="module")
def packed(plain, plan, sites):
    """`packed(precision)`: the shipped model's padding-free graph."""
    made = {}

    def graph(precision):
        if precision not in made:
            quantized = plan(precision) if precision in ("int8", "fp8") else None
            made[precision] = tensorrt_graph(
                plain["openvino"], precision, sites=sites, scheme=quantized, layout=PADDING_FREE
            )
        return made[precision]

    return graph


def ragged(vocab_size, lengths=LENGTHS, *, masks=True):
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, np.random.default_rng(0).integers(5, vocab_size, mask.shape), 0)
    places = [(row, token) for row in (6, 0, 1, 4) for token in range(0, lengths[row], 40)]
    return Batch(ids, mask, np.array(places) if masks else None)


def differences(graph, model, spec, batch):
    """Output -> how the packed graph differs from PyTorch on the padded batch, at the real tokens."""
    outputs = [tensor.name for tensor in graph.outputs]
    heads = model.config.num_attention_heads
    reference = TorchReference(model, task=spec.task, pooling=spec.pooling, logits=spec.logits)
    candidate = PaddingFreeOnnx(graph, spec, profiles=PROFILES, num_heads=heads)
    expected, found = reference.run(batch, outputs), candidate.run(batch, outputs)
    candidate.close()
    real = batch.attention_mask == 1
    by_token = [name for name in outputs if expected[name].ndim == 3]
    assert not any(found[name][~real].any() for name in by_token), "padding is 0"
    for values in (expected, found):
        values.update({name: values[name][real] for name in by_token})
    labels = {"logits"} if spec.task in ("classify", "token-classify") else set()
    return {name: compare(expected[name], found[name], labels=name in labels) for name in outputs}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_it_computes_what_pytorch_does(packed, model, spec, precision):
    for name, found in differences(packed(precision), model, spec, ragged(20_000)).items():
        assert found.within(TOLERANCES[precision]), (name, found)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("embed", {"pooling": "mean"}),
        ("classify", {}),
        pytest.param("embed", {"pooling": "cls"}, marks=pytest.mark.slow),
        pytest.param("fill-mask", {"logits": "all"}, marks=pytest.mark.slow),
        pytest.param("token-classify", {}, marks=pytest.mark.slow),
    ],
)
def test_every_head_finds_its_tokens(tmp_path, task, more):
    sizes = {"hidden_size": 32, "heads": 2, "layers": 1, "max_positions": 1024, "type_vocab_size": 2}
    model = load_model(make_checkpoint(tmp_path / "model", task=task, **sizes), task=task)
    plain = build_graphs(model, task=task, max_length=1024, **more)["openvino"]
    graph = tensorrt_graph(plain, "fp16", sites=fusion_sites(model), layout=PADDING_FREE)
    spec = ModelSpec(task, 1024, model.config.vocab_size, 32, 0, **more)
    for name, found in differences(graph, model, spec, ragged(model.config.vocab_size, masks=False)).items():
        assert found.within(TOLERANCES["fp16"]), (name, found)


def test_a_far_position_turns_as_in_pytorch(packed, model, spec):
    """Behind another text, the positions of a text begin at 0 again."""
    batch = ragged(20_000, (600, 1800, 1, 2, 3, 4, 40))
    profiles = (Profile((1, 1), (8, 4096), (8, 4096)),)
    candidate = PaddingFreeOnnx(packed("fp16"), spec, profiles=profiles, num_heads=model.config.num_attention_heads)
    reference = TorchReference(model, task="fill-mask", pooling="mean", logits="masked")
    found = candidate.run(batch, ["last_hidden_state"])["last_hidden_state"][1, -500:]
    expected = reference.run(Batch(batch.input_ids[1:2], batch.attention_mask[1:2], np.zeros((1, 2), int)), [])
    assert compare(expected["last_hidden_state"][0, -500:], found).cosine_min > 0.9999


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_its_inputs_operators_and_types(packed, graphs, num_layers, precision):
    graph = packed(precision)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in graph.inputs} == {
        "input_ids": ("int64", ("tokens",)),
        "position_ids": ("int64", ("tokens",)),
        "query_lengths": ("int32", ("batch_and_one",)),
        "kv_lengths": ("int32", ("batch_and_one",)),
        "mask_positions": ("int64", ("num_masks",)),
    }
    assert [tensor.shape[0] for tensor in graph.outputs] == ["num_masks", "tokens"]
    padded = {name: count for name, count in graphs(precision).fusions.items() if name != "qkv"}
    assert graph.fusions == {"packed_attention": num_layers, **padded}
    nodes = list(graph.model.graph)
    assert not {"Softmax", "GatherND", "Cos", "Sin"} & {node.op_type for node in nodes}
    attentions = [node for node in nodes if node.domain]
    for node in attentions:
        assert (node.domain, node.op_type) == ("trt", "TRT_Attention")
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {
            "query_form": "packed_nhd",
            "kv_form": "packed_nhd",
            "causal_kind": "none",
            "TRT_decomposable": 0,
        }
        assert node.inputs[3] is None and [value.name for value in node.inputs[4:]] == ["query_lengths", "kv_lengths"]
        assert {value.dtype for value in (*node.inputs[:3], node.outputs[0])} == {COMPUTE_DTYPES[precision]}
    assert len(attentions) == num_layers
    # Rotation and the scale of queries are in FP32, from the tables on.
    assert all(node.outputs[0].dtype == FP32 for node in nodes if node.op_type == "Neg")
    tables = [node for node in nodes if node.op_type == "Gather" and node.inputs[1].name == "position_ids"]
    assert len(tables) == 2 and all(node.outputs[0].dtype == FP32 for node in tables)
    scales = [use.node for use in graph.model.graph.initializers["query_scale"].uses()]
    assert len(scales) == num_layers and all(node.outputs[0].dtype == FP32 for node in scales)


def test_another_architecture_is_an_error(plain, sites, num_layers):
    wanted = {**sites, "packed_attention": num_layers + 1}
    with pytest.raises(ExportError, match="packed_attention"):
        tensorrt_graph(plain["openvino"], "fp16", sites=wanted, layout=PADDING_FREE)


# What TensorRT says of it.


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    return choose_runtime("rtx")


@pytest.fixture
def build(rtx, num_layers, tmp_path):
    def build_it(graph):
        save_graph(graph, tmp_path / "packed.onnx")
        arguments = {"num_layers": num_layers, "compute_capabilities": ("8.9",), "profiles": packed_profiles(8192)}
        return build_plan(tmp_path / "packed.onnx", tmp_path, rtx, TensorRTOptions(), graph=graph, **arguments)

    return build_it


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_rtx_reads_it_and_lacks_the_kernel_alone(build, packed, precision):
    """Its parser, shapes, types and profiles are those of TensorRT: the graph fails in the compiler, and only there."""
    with pytest.raises(ExportError, match="cannot build the engine: .*packed.*no fused kernel is available"):
        build(packed(precision))


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp16", marks=pytest.mark.slow)])
def test_everything_but_the_kernel_becomes_an_engine(build, packed, num_layers, monkeypatch, precision):
    """With something else in its place, TensorRT-RTX builds the rest, for profiles of texts and tokens."""
    monkeypatch.setattr(tensorrt_engine, "_count_attentions", lambda trt, network: num_layers)
    model = packed(precision).model.clone()
    for node in [node for node in model.graph if node.op_type == "TRT_Attention"]:
        query, key, value = node.inputs[:3]
        made = Builder(model.graph, node, f"{node.name}/other")
        kind = {"dtype": query.dtype}
        both = made.op("Mul", query, key, **kind)
        sums = [made.op("ReduceSum", lengths, name=f"{lengths.name}_sum", dtype=INT32) for lengths in node.inputs[4:]]
        casts = [made.op("Cast", total, name=f"{total.name}_wide", to=query.dtype, **kind) for total in sums]
        replace(node.outputs[0], made.op("Sum", both, value, *casts, **kind))
        model.graph.remove(node, safe=True)
    plan = build(dataclasses.replace(packed(precision), model=model))
    assert plan.padding_free and plan.profiles == packed_profiles(8192)
    assert "texts x tokens of all, min:opt:max" in plan.describe()[-1]
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in (*plan.inputs, *plan.outputs)}
    assert shapes["query_lengths"] == shapes["kv_lengths"] == ("int32", ("batch_and_one",))
    assert shapes["input_ids"] == shapes["position_ids"] == ("int64", ("tokens",))
    assert shapes["last_hidden_state"] == ("float32", ("tokens", 256))
    assert plan.layers["fused_attention"] == num_layers
    assert plan.layers.get(f"{precision}_gemm", 0) >= 4 * num_layers * (precision == "int8")


def test_attentions_are_counted_in_the_network(rtx, packed, num_layers, tmp_path):
    trt = rtx.module
    save_graph(packed("fp16"), tmp_path / "packed.onnx")
    log = MessageLog(trt)
    network = trt.Builder(log.logger).create_network(tensorrt_engine._network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    assert parser.parse_from_file(str(tmp_path / "packed.onnx"))
    assert tensorrt_engine._count_attentions(trt, network) == num_layers


# Who refuses it, and what it is told.


@pytest.mark.parametrize(
    ("variant", "version", "says"),
    [
        ("tensorrt-rtx", "11.2.0.1", r"11\.1 or later.*TensorRT-RTX 11\.2\.0\.1 has no kernel.*no GPU.*--onnx-only"),
        ("tensorrt", "11.0.0.114", r"11\.1 or later.*this is TensorRT 11\.0\.0\.114.*--padding remove.*--onnx-only"),
        ("tensorrt", "10.16.1", r"this is TensorRT 10\.16\.1"),
    ],
)
def test_a_tensorrt_without_the_kernel_is_refused(variant, version, says):
    with pytest.raises(ExportError, match=says):
        PADDING_FREE.check_runtime(
            Runtime(variant, "no GPU was found here", types.SimpleNamespace(__version__=version))
        )


@pytest.mark.parametrize("version", ["11.1.0.106", "11.3", "12.0.1"])
def test_a_tensorrt_with_the_kernel_is_not(version):
    PADDING_FREE.check_runtime(Runtime("tensorrt", "", types.SimpleNamespace(__version__=version)))


def test_the_export_refuses_before_a_model_is_loaded(rtx, tmp_path):
    with pytest.raises(ExportError, match="TensorRT-RTX .* has no kernel for it; .* because it was requested"):
        export(output=tmp_path / "b", format="trt", padding="remove", tensorrt=TensorRTOptions(runtime="rtx"))
    with pytest.raises(InputError, match="padding is 'none'; expected one of auto, keep, remove"):
        export(output=tmp_path / "b", format="trt", padding="none")
    assert not (tmp_path / "b").exists()


def test_profiles_are_of_texts_and_of_all_their_tokens():
    assert [str(profile) for profile in packed_profiles(8192)] == [
        "1x1:2x256:256x512",
        "1x1:16x2048:256x4096",
        "1x1:128x16384:256x32768",
    ]
    assert [profile.opt[0] for profile in packed_profiles(8192, [20, 16, 900])] == [12, 102, 256]
    assert packed_profiles(100_000)[-1].max == (256, 100_000)
    check_packed_profiles(packed_profiles(100_000), 100_000)
    for text, says in (
        ("1x1:8x256:16x512", "ends at 512 tokens.*one text may have 1,024.*--max-len 512"),
        ("1x8:8x256:16x2048", "begin|from 1x1 on"),
        ("1x1:8x4:16x2048", "texts x tokens of all"),
    ):
        with pytest.raises(InputError, match=says):
            check_packed_profiles([parse_profile(text)], 1024)
    with pytest.raises(InputError, match="0 profiles"):
        check_packed_profiles([], 256)


def test_the_trtexec_line_has_its_shapes():
    names = ("input_ids", "position_ids", "query_lengths", "kv_lengths", "mask_positions")
    inputs = [TensorSpec(name, "int64", ("tokens",)) for name in names]
    line = trtexec_line("model.onnx", packed_profiles(512)[:1], inputs)
    assert line == (
        "trtexec --onnx=model.onnx --saveEngine=model.plan --noTF32 --profilingVerbosity=detailed "
        "--minShapes=input_ids:1,position_ids:1,query_lengths:2,kv_lengths:2,mask_positions:1 "
        "--optShapes=input_ids:256,position_ids:256,query_lengths:3,kv_lengths:3,mask_positions:2 "
        "--maxShapes=input_ids:512,position_ids:512,query_lengths:257,kv_lengths:257,mask_positions:512"
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """What --onnx-only writes of a small embedding model, and what the command said."""
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = make_checkpoint(folder / "model", task="embed", heads=2, layers=1, max_positions=64)
    arguments = ["--format", "trt", "--padding", "remove", "--onnx-only", "--json"]
    assert main([str(checkpoint), str(folder / "bundle"), *arguments]) == 0
    return folder / "bundle"


def test_the_bundle_of_onnx_only(bundle):
    manifest = open_bundle(bundle)
    assert manifest.plan is None and manifest.graphs["tensorrt"].fusions["packed_attention"] == 1
    assert [tensor.shape for tensor in manifest.graphs["tensorrt"].outputs] == [("tokens", 32), ("batch", 32)]
    report = (bundle / "report.json").read_text()
    assert "query_lengths:257" in report and "ONNX Runtime does not have TRT_Attention" in report


def test_onnx_runtime_is_not_asked_to_run_it(bundle):
    for options in ({}, {"backend": "onnx"}, {"backend": "onnx", "device": "cuda"}):
        with pytest.raises(BackendError, match=r"padding-free graph, which TensorRT 11\.1.*without --padding remove"):
            gte_deploy.load(bundle, **options)


def test_triton_is_not_given_such_a_plan(tmp_path):
    inputs = tuple(types.SimpleNamespace(name=name, shape=("tokens",)) for name in ("input_ids", "position_ids"))
    plan = gte_deploy.bundle.manifest.PlanEntry("p", "tensorrt", "11.1.0.1", ("8.9",), PROFILES, inputs, inputs, {})
    with pytest.raises(BundleError, match="padding-free engine, but the repository's models send padded batches"):
        _write_plan(tmp_path, types.SimpleNamespace(plan=plan), tmp_path)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_engine_itself(model, spec, tmp_path, precision):
    """Built and run by ordinary TensorRT on its GPU, against PyTorch on the CPU."""
    pytest.importorskip("tensorrt", reason="ordinary TensorRT is not installed")
    runtime = choose_runtime("tensorrt")
    try:
        PADDING_FREE.check_runtime(runtime)
    except ExportError as error:
        pytest.skip(str(error))
    options = TensorRTOptions(runtime="tensorrt")
    export(output=tmp_path / "bundle", format="trt", precision=precision, padding="remove", tensorrt=options)
    batch, outputs = ragged(20_000), ["last_hidden_state", "logits"]
    with gte_deploy.load(resolve_checkpoint(None), backend="torch", device="cpu") as reference:
        expected = reference._backend.run(batch, outputs)
    with gte_deploy.load(tmp_path / "bundle") as engine:
        assert engine.backend == "tensorrt"
        for _ in range(3):  # as it comes, captured, and replayed
            found = engine._backend.run(batch, outputs)
    real = batch.attention_mask == 1
    for values in (expected, found):
        values["last_hidden_state"] = values["last_hidden_state"][real]
    for name in outputs:
        assert compare(expected[name], found[name]).within(TOLERANCES[precision]), name

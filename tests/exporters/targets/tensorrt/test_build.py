"""Real engines, built by TensorRT-RTX on a machine without a GPU."""

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt

from factories import make_checkpoint
from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.graph.build import graph_of, save_graph
from gte_deploy.exporters.targets.tensorrt import engine as tensorrt_engine
from gte_deploy.exporters.targets.tensorrt import runtimes
from gte_deploy.exporters.targets.tensorrt.engine import PLAN_PATH, _memory_advice, build_plan
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.profiles import default_profiles, parse_profile
from gte_deploy.exporters.targets.tensorrt.runtimes import choose_runtime, resolve_capabilities
from tensorrt_engines import eight_bit_gemms, scales_in_dequantization

OPTIONS = TensorRTOptions()
PROFILES = default_profiles(8192)
GEMMS = {"fp16": 0, "bf16": 0, "int8": 4, "fp8": 4}


@pytest.fixture(scope="module")
def runtime():
    return choose_runtime("rtx")


@pytest.fixture
def build(runtime, num_layers, tmp_path):
    """`build(graph, file, precision)`: the plan's entry."""

    def build_it(graph, file, precision, profiles=PROFILES, options=OPTIONS, capabilities=None):
        capabilities = resolve_capabilities(runtime, capabilities, precision)
        arguments = {
            "graph": graph,
            "num_layers": num_layers,
            "compute_capabilities": capabilities,
            "profiles": profiles,
        }
        return build_plan(file, tmp_path, runtime, options, **arguments)

    return build_it


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_an_engine_in_every_precision_to_8192_tokens(build, graphs, saved, num_layers, tmp_path, runtime, precision):
    plan = build(graphs(precision), saved(precision), precision)
    assert (plan.variant, plan.version) == ("tensorrt-rtx", runtime.version)
    assert plan.compute_capabilities == (("8.9", "12.0") if precision == "fp8" else ("8.6", "8.9", "12.0"))
    assert plan.profiles == PROFILES and plan.timing_cache is None
    assert plan.layers["fused_attention"] == num_layers and not plan.caveats
    assert plan.layers.get(f"{precision}_gemm", 0) >= GEMMS[precision] * num_layers
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in (*plan.inputs, *plan.outputs)}
    hidden = ("batch", "sequence", 256)
    assert shapes["input_ids"] == shapes["attention_mask"] == ("int64", ("batch", "sequence"))
    assert shapes["mask_positions"] == ("int64", ("num_masks", 2))
    assert shapes["last_hidden_state"] == ("float32", hidden)
    size = (tmp_path / PLAN_PATH).stat().st_size
    weights = sum(v.const_value.nbytes for v in graphs(precision).model.graph.initializers.values())
    assert 0.9 * weights < size < 1.5 * weights + (4 << 20)


@pytest.fixture
def listing(runtime):
    """`listing(file)`: the engine for one GPU, and the builder's list of its layers."""

    def build_for(file):
        lines = []

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, level, message):
                lines.extend(message.splitlines())

        logger = Logger()
        builder = trt.Builder(logger)
        network = builder.create_network()
        assert trt.OnnxParser(network, logger).parse_from_file(str(file))
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profile = builder.create_optimization_profile()
        shapes = PADDED.shapes(parse_profile("1x1:8x128:8x512"))
        for name in (network.get_input(index).name for index in range(network.num_inputs)):
            profile.set_shape(name, *shapes[name])
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        return bytes(builder.build_serialized_network(network, config)), lines

    return build_for


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_engine_scales_its_8_bit_sums_before_it_stores_them(listing, graphs, saved, num_layers, precision):
    """The GEMM has a factor for the sums, and the scales behind it are the graph's own, not divided by the factor."""
    plan, lines = listing(saved(precision))
    gemms = eight_bit_gemms(lines)
    # queries with keys and values, output, up with gate, down
    assert [(gemm.output, gemm.is_scaled) for gemm in gemms] == [("Half", True)] * 4 * num_layers
    assert sum("_gemm_mha_v2" in line.partition(",")[0] for line in lines) == num_layers
    values = graphs(precision).model.graph.initializers.items()
    scales = [value.const_value.numpy() for name, value in values if name.endswith(f"weight.{precision}.scale")]
    assert len(scales) == graphs(precision).fusions[f"{precision}_linears"]
    assert all(vector.dtype == np.float32 for vector in scales)
    assert all(vector.tobytes() in plan for vector in scales)


def test_scales_in_dequantization_give_unscaled_sums(listing, graphs, tmp_path):
    """TensorRT-RTX multiplies FP16 sums by the scales after it stored them: the reason for the form of the graph."""
    save_graph(scales_in_dequantization(graphs("int8")), tmp_path / "unscaled.onnx")
    _, lines = listing(tmp_path / "unscaled.onnx")
    found = {(gemm.output, gemm.is_scaled) for gemm in eight_bit_gemms(lines)}
    assert found == {("Half", False)}, "if this fails, see docs/decisions/eight-bit-sums.md"


def test_attention_that_is_not_fused_fails_the_export(build, graphs, tmp_path, num_layers):
    """Q/DQ around the weights of attention is what costs the kernel."""
    model = graphs("fp16").model.clone()
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        ((mixed, index),) = softmax.outputs[0].uses()
        mixed.replace_input_with(index, _quantized(model.graph, softmax, mixed))
    graph = dataclasses.replace(graphs("fp16"), model=model)
    save_graph(graph, tmp_path / "unfused.onnx")
    with pytest.raises(ExportError, match=f"fused attention.*{num_layers}"):
        build(graph, tmp_path / "unfused.onnx", "fp16", PROFILES[:1])
    assert not (tmp_path / PLAN_PATH).exists()


def _quantized(graph, softmax, before):
    from gte_deploy.exporters.graph.editing import Builder, constant

    build = Builder(graph, before, softmax.name)
    scale = constant(graph, "probability_scale", np.array(1 / 127, np.float16))
    zero = constant(graph, "probability_zero", np.array(0, np.int8))
    narrow = build.op("QuantizeLinear", softmax.outputs[0], scale, zero, name="q", dtype=ir.DataType.INT8)
    return build.op("DequantizeLinear", narrow, scale, zero, name="dq", dtype=ir.DataType.FLOAT16)


def test_an_fp16_request_that_yields_fp32_fails(build, graphs, plain, tmp_path):
    save_graph(plain["openvino"], tmp_path / "fp32.onnx")
    with pytest.raises(ExportError, match="FP32, but the graph has it in 16 bits"):
        build(graphs("fp16"), tmp_path / "fp32.onnx", "fp16", PROFILES[:1])


def test_a_graph_that_tensorrt_cannot_read_is_an_error_with_its_reason(build, graphs, plain, tmp_path):
    save_graph(plain["onnxruntime"], tmp_path / "fused.onnx")
    with pytest.raises(ExportError, match="TensorRT-RTX .* cannot read the graph"):
        build(graphs("fp16"), tmp_path / "fused.onnx", "fp16", PROFILES[:1])


def test_a_build_without_enough_memory_says_what_to_do(build, graphs, saved, tmp_path):
    """The kernels for a large profile need their memory, which TensorRT-RTX has if nothing limits it."""
    profiles = [parse_profile("1x1:8x128:32x8192")]
    limited = TensorRTOptions(workspace=64 << 20)
    with pytest.raises(ExportError, match="need [0-9]+ MiB .* --workspace allows 64 MiB: .*smaller maximum than 1x1:8"):
        build(graphs("fp16"), saved("fp16"), "fp16", profiles, options=limited)
    assert build(graphs("fp16"), saved("fp16"), "fp16", profiles).layers["fused_attention"] == 4


def test_without_a_limit_the_memory_of_the_gpu_is_named():
    reason = "Error Code 2: OutOfMemory (Requested size was 91875456 bytes.)"
    advice = _memory_advice(reason, OPTIONS, [parse_profile("1x1:1x8:1x64"), parse_profile("1x1:1x8:2x64")])
    assert "88 MiB" in advice and "this GPU has less" in advice and "2x64" in advice
    assert _memory_advice("no kernel", OPTIONS, PROFILES) == ""


def test_what_the_listing_does_not_show_is_a_caveat(build, graphs, saved, monkeypatch, num_layers):
    """As a version of TensorRT with other names for its kernels would be reported."""
    lines = tensorrt_engine._layer_lines

    def renamed(*arguments):
        return [line.replace("_gemm_mha_v2", "__myl_Etc") for line in lines(*arguments)]

    monkeypatch.setattr(tensorrt_engine, "_layer_lines", renamed)
    plan = build(graphs("fp16"), saved("fp16"), "fp16", PROFILES[:1])
    assert "fused_attention" not in plan.layers
    (caveat,) = plan.caveats
    assert f"0 fused attention layers where the graph has {num_layers}" in caveat


def test_a_timing_cache_is_for_ordinary_tensorrt(build, graphs, saved, tmp_path):
    with pytest.raises(InputError, match="timing"):
        build(graphs("fp16"), saved("fp16"), "fp16", options=TensorRTOptions(timing_cache=tmp_path / "cache"))


def quantized_product(file, scale_type):
    """A product of INT8 numbers with a scale for each output; `scale_type` is that of the scales and of the result."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT}[scale_type]
    constants = {
        "axis": np.array([2]),
        "row": np.ones(64, scale_type),
        "scale": np.array(0.01, scale_type),
        "zero": np.array(0, np.int8),
        "weight": np.ones((64, 64), np.int8),
        "weight_scale": np.linspace(0.001, 0.002, 64).astype(scale_type),
        "weight_zero": np.zeros(64, np.int8),
        "bias": np.ones(64, scale_type),
    }
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=kind),
        helper.make_node("Unsqueeze", ["ids", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "row"], ["x"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=1),
        helper.make_node("MatMul", ["xq", "w"], ["y"], name="proj/MatMul"),
        helper.make_node("Add", ["y", "bias"], ["z"]),
        helper.make_node("Cast", ["z"], ["last_hidden_state"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", 64])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(onnx.shape_inference.infer_shapes(model), file)
    return graph_of(ir.load(file), {"int8_linears": 1}, 20)


@pytest.mark.parametrize("scale_type", ["float16", "float32"])
def test_unscaled_8_bit_sums_in_fp16_fail_the_export(runtime, scale_type, tmp_path):
    """With FP16 scales TensorRT-RTX stores the sums of products as FP16 and scales them in the next kernel."""
    import numpy as np

    graph = quantized_product(tmp_path / "product.onnx", getattr(np, scale_type))
    arguments = {"graph": graph, "num_layers": 0, "compute_capabilities": ("8.9",), "profiles": PROFILES[:1]}
    if scale_type == "float16":
        with pytest.raises(ExportError, match=r"wrong answers: 1 8-bit GEMMs store unscaled sums as FP16.*proj/MatMul"):
            build_plan(tmp_path / "product.onnx", tmp_path, runtime, OPTIONS, **arguments)
        assert not (tmp_path / PLAN_PATH).exists()
    else:
        plan = build_plan(tmp_path / "product.onnx", tmp_path, runtime, OPTIONS, **arguments)
        assert plan.layers["int8_gemm"] == 1


@pytest.fixture
def small(tmp_path):
    return make_checkpoint(tmp_path / "small", hidden_size=64, heads=2, intermediate=128)


def test_the_command_writes_a_bundle_that_describes_its_engine(trace_once, small, tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["--max-len", "64", "--profile", "1x1:4x16:8x64", "--target", "sm89", "--keep-onnx"]
    assert main([str(small), str(out), "--format", "trt", *arguments, "--progress"]) == 0
    text, progress = capsys.readouterr()
    assert "build with TensorRT-RTX" in progress and "no GPU" in progress
    assert "tensorrt fp16 (emulated): parity passed" in text and "2 fused attention" in text and "sm89" in text
    manifest = open_bundle(out)
    assert manifest.precision == "fp16" and manifest.plan.path in manifest.files
    assert manifest.plan.profiles == (parse_profile("1x1:4x16:8x64"),)
    graph = manifest.graphs["tensorrt"]
    assert (graph.path, graph.computes, graph.emulated) == ("onnx/model_tensorrt.onnx", ("fp16",), ("fp16",))
    report = json.loads((out / "report.json").read_text())
    assert report["plan"]["layers"]["fused_attention"] == 2
    assert "fused attention" in (out / "report.html").read_text()


def test_without_keep_onnx_the_bundle_holds_the_engine_alone(small, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert main([str(small), str(out), "--format", "trt", "--max-len", "32", "--task", "embed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["version"] == trt.__version__
    manifest = open_bundle(out)
    assert not manifest.graphs and not (out / "onnx").exists()
    assert [tensor.name for tensor in manifest.plan.outputs] == ["last_hidden_state", "sentence_embedding"]


def test_onnx_only_needs_no_tensorrt_and_prints_the_line(trace_once, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtimes, "import_tensorrt", lambda variant: None)
    out = tmp_path / "bundle"
    assert main([str(small), str(out), "--format", "trt", "--max-len", "64"]) == 3
    assert "[rtx]" in capsys.readouterr().err and not out.exists()
    assert main([str(small), str(out), "--format", "trt", "--max-len", "64", "--onnx-only"]) == 0
    assert "trtexec --onnx=onnx/model_tensorrt.onnx" in capsys.readouterr().out
    manifest = open_bundle(out)
    assert manifest.plan is None and list(manifest.graphs) == ["tensorrt"]

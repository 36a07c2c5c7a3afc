"""The emulation of engines: overflow of every 16-bit and 8-bit graph, and the arithmetic of 8-bit GEMMs."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from factories import make_checkpoint
from gte_deploy.core.errors import ParityError
from gte_deploy.core.spec import Profile
from gte_deploy.exporters.export import export
from gte_deploy.exporters.graph.build import build_graphs, graph_of
from gte_deploy.exporters.graph.editing import Builder, array, initializer, operand
from gte_deploy.exporters.graph.linear_layers import is_quantized
from gte_deploy.exporters.quantization.calibration import running
from gte_deploy.exporters.targets.cuda.graph import cuda_graph
from gte_deploy.exporters.targets.tensorrt import precision as precision_module
from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx, PaddingFreeOnnx, engine_arithmetic
from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED, PADDING_FREE
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.verification.differences import compare
from gte_deploy.exporters.verification.emulation import cpu_emulation
from gte_deploy.exporters.verification.reference import TorchReference
from tensorrt_engines import scales_in_dequantization

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

HIDDEN = ["last_hidden_state"]
PROFILES = (Profile((1, 1), (2, 128), (4, 256)),)


@pytest.fixture(scope="module")
def large(model):
    """The shipped model with products of the first gated unit near 223,000; it computes the same in FP32."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        mlp = changed.gte.layers[0].mlp
        mlp.up_proj.weight *= 4096
        mlp.down_proj.weight /= 4096
    return changed


@pytest.fixture(scope="module")
def plain_large(large):
    return build_graphs(large, task="fill-mask", max_length=8192)


@pytest.fixture(scope="module")
def scheme_of(plain_large, calibrate):
    return calibrate(plain_large)


@contextlib.contextmanager
def emulated(graph, spec, num_heads, layout):
    """The emulation with which an export compares."""
    candidate = layout.emulation(graph, spec, profiles=PROFILES, num_heads=num_heads)
    assert isinstance(candidate, PaddedOnnx if layout is PADDED else PaddingFreeOnnx)
    with contextlib.closing(candidate):
        yield candidate


@pytest.mark.parametrize("layout", [PADDED, PADDING_FREE], ids=["padded", "padding-free"])
@pytest.mark.parametrize(("precision", "cosine"), [("fp16", None), ("bf16", 0.9999), ("int8", 0.99), ("fp8", 0.98)])
def test_values_beyond_fp16(plain_large, large, spec, sites, scheme_of, make_batch, layout, precision, cosine):
    """FP16 overflows, BF16 has the range, and 8-bit GEMMs read the products of the gated unit in FP32."""
    scheme = scheme_of(precision) if precision in ("int8", "fp8") else None
    graph = tensorrt_graph(plain_large["openvino"], precision, sites=sites, scheme=scheme, layout=layout)
    check_overflow(lambda: emulated(graph, spec, large.config.num_attention_heads, layout), large, make_batch, cosine)


@pytest.mark.parametrize(
    ("precision", "removes_padding", "cosine"), [("fp16", False, None), ("fp16", True, None), ("bf16", False, 0.9999)]
)
def test_values_beyond_fp16_on_cuda(plain_large, large, spec, sites, make_batch, precision, removes_padding, cosine):
    graph = cuda_graph(plain_large["openvino"], sites=sites, precision=precision, removes_padding=removes_padding)
    check_overflow(lambda: running(cpu_emulation(graph), spec), large, make_batch, cosine)


def check_overflow(opened, model, make_batch, cosine):
    """Compare with PyTorch; `cosine` None stands for results that are not finite."""
    batch = make_batch(3, 60)
    with opened() as candidate:
        found = candidate.run(batch, HIDDEN)["last_hidden_state"][batch.attention_mask == 1]
    if cosine is None:
        assert not np.isfinite(found).all()
        return
    reference = TorchReference(model, task="fill-mask", pooling="mean", logits="masked").run(batch, HIDDEN)
    assert compare(reference["last_hidden_state"][batch.attention_mask == 1], found).cosine_mean > cosine


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_unscaled_sums_in_fp16_overflow(graphs, spec, make_batch, precision):
    """With its scales in DequantizeLinear, the shipped model's own sums are beyond FP16 in such an engine."""
    unscaled = scales_in_dequantization(graphs(precision))
    batch, real = make_batch(3, 130), make_batch(3, 130).attention_mask == 1
    found = {}
    for name, graph in (("scaled", graphs(precision)), ("unscaled", unscaled)):
        with running(engine_arithmetic(graph), spec) as backend:
            found[name] = backend.run(batch, HIDDEN)["last_hidden_state"][real]
    with running(cpu_emulation(unscaled), spec) as backend:  # the same numbers, but for the type of the sums
        scaled_before_stored = backend.run(batch, HIDDEN)["last_hidden_state"][real]
    assert not np.isfinite(found["unscaled"]).any()
    assert compare(found["scaled"], scaled_before_stored).cosine_mean > 0.999


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_no_sum_can_overflow(graphs, precision):
    """Whatever the text: every input at its largest magnitude, with the sign of its weight."""
    products = [node for node in graphs(precision).model.graph if is_quantized(node)]
    largest = {"int8": 128, "fp8": 448}[precision]
    for product in products:
        x, weight = (operand(product, i).producer() for i in (0, 1))
        scales = [array(operand(node, 1)).astype(np.float32) for node in (x, weight)]
        assert product.outputs[0].dtype == ir.DataType.FLOAT16 and all(scale.size == 1 for scale in scales)
        sums = largest * np.abs(array(operand(weight, 0)).astype(np.float32)).sum(axis=0)
        stored = sums.max() * scales[0] * scales[1]
        assert 100 < stored <= 65504, product.name
    assert products


def two_gemms(scales):
    """Two INT8 GEMMs of one input x [1, 8], with sums of 8 · 127 · 127, to be joined; their weights have `scales`."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1, 8]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="joined")
    end = ir.node("Identity", [x])
    graph.append(end)
    build = Builder(graph, end, "layer")
    unit, small = (initializer(graph, f"s{n}", ir.tensor(np.array(n, np.float16))) for n in (1, 2.0**-4))
    zero = initializer(graph, "zero", ir.tensor(np.array(0, np.int8)))
    quantized = build.op("QuantizeLinear", x, unit, zero, dtype=ir.DataType.INT8)
    shared = build.op("DequantizeLinear", quantized, small, zero, dtype=ir.DataType.FLOAT16)
    for number, scale in enumerate(scales):
        inner = build.inside(f"layer.{number}")
        values = initializer(graph, f"w{number}", ir.tensor(np.full((8, 1), 127, np.int8)))
        own = initializer(graph, f"own{number}", ir.tensor(np.array(scale, np.float16)))
        weight = inner.op("DequantizeLinear", values, own, dtype=ir.DataType.FLOAT16)
        product = inner.op("MatMul", shared, weight, name="MatMul", dtype=ir.DataType.FLOAT16)
        result = inner.op("Cast", product, name="y", to=ir.DataType.FLOAT)
        result.shape = ir.Shape([1, 1])
        graph.outputs.append(result)
    return graph_of(ir.Model(graph, ir_version=10), {}, 20)


@pytest.mark.parametrize(
    ("scales", "expected"), [((1, 1), [8064, 8064]), ((2,), [16128]), ((1, 2), [np.inf, np.inf])], ids=str
)
def test_joined_gemms_with_scales_of_their_own_store_unscaled_sums(scales, expected):
    """TensorRT joins GEMMs of one input; one factor for their sums is left only if their scales are equal."""
    model = engine_arithmetic(two_gemms(scales)).model
    model.graph.inputs[0].dtype = ir.DataType.FLOAT
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    found = session.run(None, {"x": np.full((1, 8), 127, np.float32)})
    assert [float(value.item()) for value in found] == expected


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_export_that_would_overflow_names_fp16_and_the_remedy(tmp_path, precision):
    """Attention computes in FP16 in both."""
    folder = make_checkpoint(tmp_path / "model", task="embed", layers=1, max_positions=32)
    enlarge_values(folder)
    options = TensorRTOptions(onnx_only=True)
    with pytest.raises(ParityError, match="(?s)not finite.*FP16 ends at 65,504, .*larger values. Take bf16"):
        export(folder, tmp_path / "fp16", format="trt", precision=precision, tensorrt=options)
    assert not (tmp_path / "fp16").exists()
    assert export(folder, tmp_path / "bf16", format="trt", precision="bf16", tensorrt=options).parity.passed


def test_the_sweep_over_the_layers_runs_the_emulation(tmp_path, monkeypatch):
    seen = []

    def sweep(measured, groups, quantize, *args):
        seen.append(quantize(frozenset()))
        raise InterruptedError

    monkeypatch.setattr(precision_module, "sweep", sweep)
    folder = make_checkpoint(tmp_path / "model", task="embed", layers=1, max_positions=32)
    with pytest.raises(InterruptedError):
        export(folder, tmp_path / "out", format="trt", precision="int8", tensorrt=TensorRTOptions(onnx_only=True))
    (graph,) = seen
    in_fp16 = [node for node in graph.model.graph if node.outputs[0].dtype == ir.DataType.FLOAT16]
    users = {use.node.op_type for node in in_fp16 for use in node.outputs[0].uses()}
    assert len(in_fp16) > 10 and {node.op_type for node in in_fp16} == users == {"Cast"}, "roundings alone"


def enlarge_values(folder):
    """Make the values of the only layer as large as FP16 weights allow, and its output projection as much smaller."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    packed, bias, output = (
        next(name for name in weights if kind in name) for kind in ("qkv_proj.weight", "qkv_proj.bias", "o_proj.weight")
    )
    factor = 6e4 / float(weights[packed].abs().max())
    for name in (packed, bias):
        weights[name][2 * len(weights[name]) // 3 :] *= factor
    weights[output] /= factor
    save_file(weights, file, metadata={"format": "pt"})

"""FP8 attention, for ordinary TensorRT: who may ask for it, its graph, and its numbers in the emulation."""

import dataclasses
import json
import types

import numpy as np
import onnx_ir as ir
import pytest

from factories import make_checkpoint
from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.export import export
from gte_deploy.exporters.options import make_request
from gte_deploy.exporters.quantization.calibration import running
from gte_deploy.exporters.targets.tensorrt import target
from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx
from gte_deploy.exporters.targets.tensorrt.fp8_attention import measure_attention_amax
from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.runtimes import Runtime
from gte_deploy.exporters.verification.bounds import TOLERANCES
from gte_deploy.exporters.verification.differences import compare
from gte_deploy.exporters.verification.emulated_onnx import head_by_head
from gte_deploy.exporters.verification.emulation import cpu_emulation
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.exporters.verification.texts import builtin_texts, text_batches
from gte_deploy.models import resolve_checkpoint
from gte_deploy.text.tokenization import load_tokenizer

FP8, FP16 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT16
OUTPUTS = ("last_hidden_state", "logits")


@pytest.fixture(scope="module")
def batches(spec):
    tokenizer = load_tokenizer(resolve_checkpoint(None))
    return [batch for batch, _ in text_batches(builtin_texts("calibration")[:30], tokenizer, spec, max_tokens=600)]


@pytest.fixture(scope="module")
def amax(plain, spec, batches, sites):
    return measure_attention_amax(plain["openvino"], spec, batches, sites=sites)


@pytest.fixture(scope="module")
def graph(plain, plan, sites, amax):
    scheme = dataclasses.replace(plan("fp8"), attention=amax)
    return tensorrt_graph(plain["openvino"], "fp8", sites=sites, scheme=scheme)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp16"}, "fp8_attention is for precision fp8, and the precision is fp16"),
        ({"precision": "int8"}, "fp8_attention is for precision fp8, and the precision is int8"),
        ({"precision": "fp8", "padding": "remove"}, "fp8_attention is for engines with padding"),
        ({"precision": "fp8", "runtime": "rtx"}, "fp8_attention is for ordinary TensorRT.*the runtime is rtx"),
    ],
)
def test_who_may_not_ask_for_it(options, says):
    with pytest.raises(InputError, match=says):
        make_request(format="trt", fp8_attention=True, **options)


def test_tensorrt_rtx_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    module = types.SimpleNamespace(__version__="1.7")
    monkeypatch.setattr(target, "choose_runtime", lambda asked: Runtime("tensorrt-rtx", "no GPU was found", module))
    monkeypatch.setattr("gte_deploy.models.checkpoint.load_described", None)
    with pytest.raises(ExportError, match="because no GPU was found: .*unfused.*--onnx-only"):
        export(output=tmp_path / "b", format="trt", precision="fp8", fp8_attention=True)
    assert not (tmp_path / "b").exists()


def test_every_product_of_attention_reads_fp8(graph, num_layers):
    assert graph.fusions["fp8_attention"] == num_layers
    for softmax in [node for node in graph.model.graph if node.op_type == "Softmax"]:
        scores = softmax.inputs[0].producer().inputs[0].producer()
        quantized = softmax.outputs[0].consumers()[0]
        weighted = quantized.outputs[0].consumers()[0].outputs[0].consumers()[0]
        assert scores.op_type == weighted.op_type == "MatMul"
        for value in (*scores.inputs, *weighted.inputs):
            dequantize = value.producer()
            assert dequantize.op_type == "DequantizeLinear" and value.dtype == FP16
            narrow, scale, zero = dequantize.inputs
            assert narrow.dtype == zero.dtype == FP8 and scale.dtype == FP16 and narrow.producer().inputs[1] is scale
        assert float(quantized.inputs[1].const_value.numpy()) == pytest.approx(1 / 448, rel=1e-3)


def test_scales_represent_the_largest_values(graph, plain, spec, batches, sites, amax):
    """The amax of values, which no scale and no rotation changes, is that of their linear layer."""
    model = plain["openvino"].model.clone()
    layer = "gte.layers.1.self_attn"
    value = next(node for node in model.graph if node.name == f"{layer}.v_proj/Add").outputs[0]
    model.graph.outputs.append(value)
    with running(dataclasses.replace(plain["openvino"], model=model), spec) as backend:
        largest = max(float(np.abs(backend.run(batch, [value.name])[value.name]).max()) for batch in batches)
    assert amax[layer].value == pytest.approx(largest, rel=1e-4)
    for name in ("query", "key", "value"):
        scale = float(graph.model.graph.initializers[f"{layer}/fp8_{name}.scale"].const_value.numpy())
        assert 1 <= 448 * scale / getattr(amax[layer], name) < 1.002


def test_the_emulation_is_within_the_bounds_of_fp8(graph, graphs, model, spec, make_batch):
    reference = TorchReference(model, task="fill-mask", pooling="mean", logits="masked")
    batch = make_batch(3, 130)
    expected = reference.run(batch, OUTPUTS)
    found = []
    for candidate in (graph, graphs("fp8")):
        emulation = PaddedOnnx(candidate, spec, num_heads=model.config.num_attention_heads)
        found.append(emulation.run(batch, OUTPUTS))
        emulation.close()
    real = batch.attention_mask == 1
    for name in OUTPUTS:
        chosen = real if name == "last_hidden_state" else slice(None)
        assert compare(expected[name][chosen], found[0][name][chosen]).within(TOLERANCES["fp8"]), name
        assert not np.array_equal(found[0][name][chosen], found[1][name][chosen]), "attention in FP16 is another graph"


def test_head_by_head_is_the_same(graph, spec, make_batch):
    """To the bit: `cpu_emulation` leaves no rounding to ONNX Runtime."""
    graph, batch = cpu_emulation(graph), make_batch(2, 40)
    with running(graph, spec) as whole, running(head_by_head(graph), spec) as heads:
        expected, found = whole.run(batch, OUTPUTS), heads.run(batch, OUTPUTS)
    for name in OUTPUTS:
        assert compare(expected[name], found[name]).max_rel == 0, name


def test_the_command_writes_the_graph_and_says_that_no_engine_was_built(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "small", hidden_size=64, heads=2, intermediate=128)
    arguments = ["--format", "trt", "--precision", "fp8", "--fp8-attention", "--onnx-only", "--bounds", "report"]
    assert main([str(checkpoint), str(tmp_path / "b"), *arguments, "--max-len", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fusions"]["fp8_attention"] == 2
    assert "no engine with FP8 attention has been built" in (tmp_path / "b" / "report.json").read_text()

"""The graph that is compiled: its types, its operators, and that its numbers are the model's."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.build import save_graph
from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx, head_by_head
from gte_deploy.exporters.targets.tensorrt.graph import COMPUTE_DTYPES, QdqScheme, tensorrt_graph
from gte_deploy.exporters.verification.differences import compare
from gte_deploy.exporters.verification.emulation import cpu_emulation
from gte_deploy.exporters.verification.reference import TorchReference

OUTPUTS = ("last_hidden_state", "logits")
FP32 = ir.DataType.FLOAT


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_every_tensor_has_the_type_that_the_table_says(graphs, precision, num_layers):
    graph = graphs(precision).model.graph
    wide = COMPUTE_DTYPES[precision]
    types = {kind: Counter() for kind in ("MatMul", "Gemm", "Softmax", "LayerNormalization", "Gelu", "Gather")}
    for node in graph:
        assert node.domain == "", "standard operators alone"
        if node.op_type in types:
            types[node.op_type][node.outputs[0].dtype] += 1
            floats = [v.dtype for v in node.inputs if v is not None and v.dtype in (FP32, wide)]
            assert len(set(floats)) == 1 and floats[0] == node.outputs[0].dtype, node.name
    for kind in ("MatMul", "Gemm", "Softmax", "Gather"):
        assert set(types[kind]) <= {wide}, kind
    assert types["Softmax"][wide] == num_layers
    for kind in ("LayerNormalization", "Gelu"):
        assert set(types[kind]) == {FP32}, kind
    assert [(value.name, value.dtype) for value in graph.outputs] == [(name, FP32) for name in OUTPUTS]


def test_a_layer_has_four_gemms(graphs, model, num_layers):
    """Queries, keys and values are one; up and gate are one."""
    assert graphs("fp16").fusions == {"qkv": num_layers, "up_gate": num_layers}
    hidden, wide = model.config.hidden_size, model.config.intermediate_size
    matrices = [
        node.inputs[1].const_value.shape.numpy()
        for node in graphs("fp16").model.graph
        if node.op_type == "MatMul" and node.inputs[1].is_initializer() and "layers." in node.name
    ]
    assert matrices == [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * wide), (wide, hidden)] * num_layers


def test_the_rotation_is_pytorchs_own_and_in_fp32(graphs, plain, num_layers):
    """Slices of the FP32 tables, and nothing that could compute an angle."""
    graph = graphs("fp16").model.graph
    assert not {"Cos", "Sin"} & {node.op_type for node in graph}
    tables = [v for v in graph.initializers.values() if tuple(v.shape.numpy()) == (8192, 32)]
    assert len(tables) == 2 and all(table.dtype == FP32 for table in tables)
    ours = {table.const_value.numpy().tobytes() for table in tables}
    theirs = plain["openvino"].model.graph.initializers.values()
    assert ours == {v.const_value.numpy().tobytes() for v in theirs if tuple(v.shape.numpy()) == (8192, 32)}
    assert all(node.outputs[0].dtype == FP32 for node in graph if node.op_type == "Neg")
    assert sum(node.op_type == "Neg" for node in graph) == num_layers, "queries and keys turn together"


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantization_stands_around_gemms_and_nowhere_near_attention(graphs, precision, num_layers):
    graph = graphs(precision)
    linears = [node for node in graph.model.graph if node.op_type == "MatMul" and node.inputs[1].producer() is not None]
    quantized = [node for node in linears if node.inputs[1].producer().op_type == "DequantizeLinear"]
    # queries with keys and values, output, up with gate, down
    assert len(quantized) == 4 * num_layers == graph.fusions[f"{precision}_linears"]
    for node in graph.model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].const_value.numpy().min() > 0
            assert len(node.inputs) < 3 or not np.any(node.inputs[2].const_value.numpy().astype(np.float32))
    for node in graph.model.graph:
        if node.op_type == "Softmax":
            (use,) = node.outputs[0].uses()
            assert use.node.op_type == "MatMul"


def test_a_plan_can_keep_layers_in_fp16(plain, sites, num_layers):
    plan = QdqScheme("int8", {"none": 1.0})
    names = {name.removesuffix(".T") for name in plain["openvino"].model.graph.initializers}
    graph = tensorrt_graph(plain["openvino"], "int8", sites=sites, scheme=plan.excluding(names))
    assert graph.fusions["int8_linears"] == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.model.graph}


def test_another_architecture_is_an_error(plain, sites, num_layers):
    with pytest.raises(ExportError, match="up_gate"):
        tensorrt_graph(plain["openvino"], "fp16", sites={**sites, "up_gate": num_layers + 1})


@pytest.mark.parametrize("precision, cosine", [("fp16", 0.99999), ("bf16", 0.9999), ("int8", 0.99), ("fp8", 0.98)])
def test_it_computes_what_pytorch_does(graphs, saved, model, spec, make_batch, precision, cosine):
    compiled = PaddedOnnx(graphs(precision), spec, file=saved(precision), num_heads=model.config.num_attention_heads)
    reference = TorchReference(model, task="fill-mask", pooling="mean", logits="masked")
    try:
        for rows, length in ((1, 1), (3, 130), (1, 2048)):
            batch = make_batch(rows, length)
            expected, found = reference.run(batch, OUTPUTS), compiled.run(batch, OUTPUTS)
            real = batch.attention_mask.astype(bool)
            hidden = [values["last_hidden_state"][real] for values in (expected, found)]
            assert compare(*hidden).cosine_mean > cosine, (rows, length)
            assert compare(expected["logits"], found["logits"]).cosine_mean > cosine, (rows, length)
    finally:
        compiled.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_head_by_head_is_the_same(plain, graphs, spec, make_batch, tmp_path, precision):
    """To the bit where nothing but the graph rounds; with FP16 ONNX Runtime leaves out some of its own roundings."""
    graph = {"fp32": lambda: plain["openvino"], "bf16": lambda: cpu_emulation(graphs("bf16"))}.get(
        precision, lambda: graphs(precision)
    )()
    save_graph(graph, tmp_path / "whole.onnx")
    save_graph(head_by_head(graph), tmp_path / "heads.onnx")
    whole, heads = OnnxBackend(tmp_path / "whole.onnx", spec), OnnxBackend(tmp_path / "heads.onnx", spec)
    for rows, length in ((1, 1), (2, 77)):
        batch = make_batch(rows, length)
        expected, found = whole.run(batch, OUTPUTS), heads.run(batch, OUTPUTS)
        for name in OUTPUTS:
            difference = compare(expected[name], found[name])
            assert difference.max_rel <= (2e-3 if precision == "fp16" else 0), name


def test_the_stand_in_for_bf16_computes_what_the_graph_does(graphs, saved, spec, make_batch, tmp_path):
    """Made of the FP16 graph, which ONNX Runtime can run as it is, it gives the same numbers."""
    save_graph(cpu_emulation(graphs("fp16")), tmp_path / "stand_in.onnx")
    exact, stand_in = OnnxBackend(saved("fp16"), spec), OnnxBackend(tmp_path / "stand_in.onnx", spec)
    batch = make_batch(2, 50)
    for name in OUTPUTS:
        difference = compare(exact.run(batch, OUTPUTS)[name], stand_in.run(batch, OUTPUTS)[name])
        assert difference.max_rel < 4e-3, name  # of each channel's own size: some steps of FP16, 4.9e-4 each


def test_far_positions_turn_as_pytorch_turns_them(graphs, saved, model, spec, make_batch):
    """3,000 tokens in FP16: with angles in FP16 the last of them would be turned anywhere."""
    compiled = PaddedOnnx(graphs("fp16"), spec, file=saved("fp16"), num_heads=model.config.num_attention_heads)
    reference = TorchReference(model, task="fill-mask", pooling="mean", logits="masked")
    batch = make_batch(1, 3000)
    expected = reference.run(batch, OUTPUTS)["last_hidden_state"][0, -500:]
    found = compiled.run(batch, OUTPUTS)["last_hidden_state"][0, -500:]
    compiled.close()
    assert compare(expected, found).cosine_min > 0.9999

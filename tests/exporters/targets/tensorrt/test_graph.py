"""The graph that is compiled: its types, its operators, and that its numbers are the model's."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.build import save_graph
from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx, engine_arithmetic
from gte_deploy.exporters.targets.tensorrt.graph import COMPUTE_DTYPES, QdqScheme, tensorrt_graph
from gte_deploy.exporters.verification.differences import compare
from gte_deploy.exporters.verification.emulated_onnx import head_by_head
from gte_deploy.exporters.verification.reference import TorchReference

OUTPUTS = ("logits", "last_hidden_state")
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
    compiled = PaddedOnnx(graphs(precision), spec, num_heads=model.config.num_attention_heads)
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_head_by_head_is_the_same(plain, graphs, spec, make_batch, tmp_path, precision):
    """To the bit: nothing rounds but the graph."""
    graph = plain["openvino"] if precision == "fp32" else engine_arithmetic(graphs(precision))
    save_graph(graph, tmp_path / "whole.onnx")
    save_graph(head_by_head(graph), tmp_path / "heads.onnx")
    whole, heads = OnnxBackend(tmp_path / "whole.onnx", spec), OnnxBackend(tmp_path / "heads.onnx", spec)
    for rows, length in ((1, 1), (2, 77)):
        batch = make_batch(rows, length)
        expected, found = whole.run(batch, OUTPUTS), heads.run(batch, OUTPUTS)
        for name in OUTPUTS:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 4e-3), ("int8", 0.1)])
def test_the_emulation_computes_what_the_graph_does(graphs, saved, spec, make_batch, tmp_path, precision, bound):
    """ONNX Runtime can run these graphs as they are, with fewer roundings: the numbers are nearly the same."""
    save_graph(engine_arithmetic(graphs(precision)), tmp_path / "emulation.onnx")
    exact, emulation = OnnxBackend(saved(precision), spec), OnnxBackend(tmp_path / "emulation.onnx", spec)
    batch = make_batch(2, 50)
    for name in OUTPUTS:
        difference = compare(exact.run(batch, OUTPUTS)[name], emulation.run(batch, OUTPUTS)[name])
        # Of each channel's own size. A step of FP16 is 4.9e-4; in INT8 it decides about some roundings to 8 bits.
        assert difference.max_rel < bound, name


def test_far_positions_turn_as_pytorch_turns_them(graphs, saved, model, spec, make_batch):
    """3,000 tokens in FP16: with angles in FP16 the last of them would be turned anywhere."""
    compiled = PaddedOnnx(graphs("fp16"), spec, num_heads=model.config.num_attention_heads)
    reference = TorchReference(model, task="fill-mask", pooling="mean", logits="masked")
    batch = make_batch(1, 3000)
    expected = reference.run(batch, OUTPUTS)["last_hidden_state"][0, -500:]
    found = compiled.run(batch, OUTPUTS)["last_hidden_state"][0, -500:]
    compiled.close()
    assert compare(expected, found).cosine_min > 0.9999

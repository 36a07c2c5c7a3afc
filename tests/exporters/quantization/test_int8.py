import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gte_deploy.backends.choice import int8_unit
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.quantization.int8 import activation_scale, int8_scheme, quantize_columns, quantize_int8

FORMS = [("onnxruntime", "dynamic"), ("onnxruntime", "static"), ("openvino", "static")]


@pytest.fixture
def plan(fp32, ranges):
    # Without VNNI, sums of products overflow 16 bits unless weights have 7 bits.
    return int8_scheme(fp32["onnxruntime"].model, ranges, reduce_range=int8_unit() is None)


@pytest.fixture
def quantized(graph, plan):
    def make(engine, activations, **changes):
        model = graph(engine)
        counts = quantize_int8(model, changes.pop("scheme", plan), engine=engine, activations=activations)
        return model, counts

    return make


def kinds(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("engine", "activations"), FORMS)
def test_answers_stay_close(quantized, fp32, run, cosines, batches, engine, activations):
    model, counts = quantized(engine, activations)
    assert counts == {"int8_linears": 2 * 7 + 1, "fp32_linears": 1, "int8_embeddings": 1}
    for batch in batches:
        real = batch.attention_mask.astype(bool)
        (hidden, logits), (found, found_logits) = run(fp32[engine].model, batch), run(model, batch)
        # 32 channels average out little; the bounds of real models are held to in test_export.py. 7 bits are coarser.
        least, least_of_logits = (0.99, 0.98) if int8_unit() else (0.98, 0.95)
        assert cosines(hidden[real], found[real]).mean() > least
        assert cosines(logits, found_logits).mean() > least_of_logits


@pytest.mark.parametrize(("engine", "activations"), FORMS)
def test_every_large_weight_is_int8_on_disk(quantized, engine, activations):
    model, _ = quantized(engine, activations)
    floats = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value.dtype == ir.DataType.FLOAT and len(value.const_value.shape) == 2
    }
    # The rotation tables, the embeddings' scales, and the head's transform, which sees the masked rows alone.
    assert sorted(name for name, tensor in floats.items() if min(tensor.shape.numpy()) > 1) == [
        "gte.rotary_emb.cos",
        "gte.rotary_emb.sin",
        "lm_head.dense.weight",
    ]


def test_integer_products_are_the_engines_own(quantized):
    model, _ = quantized("onnxruntime", "dynamic")
    assert kinds(model).count("MatMulIntegerToFloat") == 15
    assert kinds(model).count("DynamicQuantizeLinear") == 2 * 4 + 1  # q, k, v share one; gate and up share one
    model, _ = quantized("onnxruntime", "static")
    assert kinds(model).count("QuantizeLinear") == 2 * 4 + 1 and "DynamicQuantizeLinear" not in kinds(model)
    model, _ = quantized("openvino", "static")
    assert not any(node.domain for node in model.graph)
    assert kinds(model).count("DequantizeLinear") == 2 * 4 + 1 + 15


def test_both_engines_have_the_same_weights(quantized):
    def weights(model):
        tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
        return {name: tensor.tobytes() for name, tensor in tensors if tensor.dtype == ir.DataType.INT8}

    first, second = (weights(quantized(*form)[0]) for form in (FORMS[0], FORMS[2]))
    assert len(first) == 16 and first == second


def test_smoothing_changes_nothing_but_the_rounding(graph, plan, fp32, run, batches):
    """With every layer in FP32 the smoothed graph is the model."""
    model = graph()
    everything = plan.excluding(linear.name for linear in find_linear_layers(model))
    counts = quantize_int8(model, everything, engine="onnxruntime", activations="static")
    assert counts["int8_linears"] == counts["int8_embeddings"] == 0
    weight = "gte.layers.0.mlp.down_proj.weight.T"
    before, after = (m.graph.initializers[weight].const_value.numpy() for m in (fp32["onnxruntime"].model, model))
    np.testing.assert_allclose(after, before * plan.smoothing[weight.removesuffix(".T")][:, None], rtol=1e-6)
    assert np.abs(after - before).max() > 0.01
    for batch in batches:
        for expected, found in zip(run(fp32["onnxruntime"].model, batch), run(model, batch), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_smoothing_evens_out_the_largest_channels(ranges, plan):
    for name, scales in plan.smoothing.items():
        assert name.endswith("mlp.down_proj.weight")
        peak = np.maximum(np.abs(ranges[name].low), np.abs(ranges[name].high))
        assert (peak / scales).max() / np.median(peak / scales) < peak.max() / np.median(peak)
        assert np.exp(np.log(scales).mean()) == pytest.approx(1, rel=1e-4)


def test_layers_that_stay_high(quantized, plan, fp32, run, batches):
    high = {"gte.layers.0.mlp.down_proj.weight", "lm_head.decoder.weight"}
    model, counts = quantized("onnxruntime", "static", scheme=plan.excluding(high))
    # The decoder is the word embeddings: where one stays, the other does.
    assert counts == {"int8_linears": 13, "fp32_linears": 3, "int8_embeddings": 0}
    assert {linear.name for linear in find_linear_layers(model)} == high | {"lm_head.dense.weight"}


def test_static_rows_do_not_depend_on_their_batch(quantized, run, batches):
    model, _ = quantized("onnxruntime", "static")
    batch = batches[1]
    together, _ = run(model, batch)
    alone, _ = run(model, type(batch)(batch.input_ids[:1], batch.attention_mask[:1], batch.mask_positions[:1]))
    np.testing.assert_allclose(together[0], alone[0], rtol=0, atol=2e-4)


def test_reduced_range_for_cpus_without_vnni(graph, fp32, ranges):
    model = graph()
    plan = int8_scheme(model, ranges, reduce_range=True)
    quantize_int8(model, plan, engine="onnxruntime", activations="static")
    tensors = [
        value.const_value.numpy().astype(int)
        for name, value in model.graph.initializers.items()
        if value.const_value.dtype == ir.DataType.INT8 and "rows" not in name
    ]
    assert len(tensors) == 15 and {np.abs(tensor).max() for tensor in tensors} == {63}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_columns_are_rounded_to_half_a_step(inputs, outputs, seed):
    matrix = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    matrix[:, 0] = 0
    quantized, scale = quantize_columns(matrix)
    assert quantized.dtype == np.int8 and scale.dtype == np.float32
    assert (np.abs(quantized * scale - matrix) <= scale * 0.5001).all()
    assert (np.abs(quantized.astype(int)).max(axis=0)[1:] == 127).all()


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_zero_is_exact_and_the_range_is_covered(a, b):
    low, high = min(a, b), max(a, b)
    scale, zero = activation_scale(low, high)
    assert scale > 0 and zero.dtype == np.uint8
    reach = (np.array([0, 255]) - np.float64(zero)) * np.float64(scale)
    assert reach[0] <= low + scale and reach[1] >= high - scale

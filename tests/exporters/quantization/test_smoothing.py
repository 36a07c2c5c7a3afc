"""Smoothing of a model with outlier channels: two gammas of every LayerNorm × 20."""

import dataclasses
import functools

import numpy as np
import pytest

from gte_deploy.backends.choice import int8_unit
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.quantization.calibration import measure_ranges, sample_rows
from gte_deploy.exporters.quantization.int8 import int8_scheme, quantize_int8
from gte_deploy.exporters.quantization.smoothing import OUTLIER_RATIO, outlier_ratio, smooth

ENGINES = ["onnxruntime", "openvino"]
LAYER = "gte.layers.1"
QKV = [f"{LAYER}.self_attn.{kind}_proj.weight" for kind in "qkv"]
UP_GATE = [f"{LAYER}.mlp.{kind}_proj.weight" for kind in ("up", "gate")]


@pytest.fixture(scope="module")
def spec():
    return ModelSpec(task="fill-mask", max_length=8192, vocab_size=256, hidden_size=32, pad_token_id=0)


@pytest.fixture(scope="module")
def outlier_ranges(outlier_fp32, spec, batches):
    return measure_ranges(outlier_fp32["onnxruntime"], spec, batches)


@pytest.fixture(scope="module")
def sample(outlier_fp32, spec, batches):
    return functools.partial(sample_rows, outlier_fp32["onnxruntime"], spec, batches)


@pytest.fixture(scope="module")
def scheme(outlier_fp32, outlier_ranges, sample):
    # Without VNNI, sums of products overflow 16 bits unless weights have 7 bits.
    coarse = int8_unit() is None
    return int8_scheme(outlier_fp32["onnxruntime"].model, outlier_ranges, sample=sample, reduce_range=coarse)


def test_only_inputs_with_outliers_need_a_multiplication(scheme, outlier_ranges, fp32, ranges):
    assert {*QKV, *UP_GATE, "lm_head.decoder.weight"} <= scheme.multiplied
    assert all(outlier_ratio(outlier_ranges[name]) > OUTLIER_RATIO for name in scheme.multiplied)
    for group in (QKV, UP_GATE):
        first, *others = (scheme.smoothing[name] for name in group)
        assert all(other is first for other in others), "layers with the same input share its multiplication"

    def refused(names):
        raise AssertionError("a model without outlier channels needs no samples")

    plain = int8_scheme(fp32["onnxruntime"].model, ranges, sample=refused)
    assert not plain.multiplied and all(name.endswith("down_proj.weight") for name in plain.smoothing)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_smoothed_graph_is_the_same_function(outlier_fp32, scheme, run, batches, engine):
    model = outlier_fp32[engine].model.clone()
    smooth(model, scheme.smoothing)
    multiplications = [node for node in model.graph if node.name.endswith("/smoothed")]
    assert len(multiplications) == len({id(scheme.smoothing[name]) for name in scheme.multiplied})
    for batch in batches:
        for expected, found in zip(run(outlier_fp32[engine].model, batch), run(model, batch), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_tied_vocabulary_is_smoothed_in_a_copy(outlier_fp32, scheme):
    """The word embeddings are the same matrix, and must not change."""
    model = outlier_fp32["onnxruntime"].model.clone()

    def table(graph):
        return next(node.inputs[0].const_value.numpy() for node in graph if node.op_type == "Gather")

    before = table(model.graph).copy()
    smooth(model, scheme.smoothing)
    np.testing.assert_array_equal(table(model.graph), before)
    decoder = next(layer for layer in find_linear_layers(model) if layer.name == "lm_head.decoder.weight")
    np.testing.assert_allclose(decoder.matrix(), before.T * scheme.smoothing[decoder.name][:, None], rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_smoothing_makes_int8_closer(outlier_fp32, scheme, run, cosines, batches, engine):
    def loss(scheme):
        model = outlier_fp32[engine].model.clone()
        quantize_int8(model, scheme, engine=engine, activations="static")
        found = [(run(outlier_fp32[engine].model, batch)[1], run(model, batch)[1]) for batch in batches]
        return 1 - np.concatenate([cosines(*pair) for pair in found]).mean()

    folded = {name: s for name, s in scheme.smoothing.items() if name not in scheme.multiplied}
    assert loss(scheme) < loss(dataclasses.replace(scheme, smoothing=folded)) / 3


def test_layers_that_stay_high_need_no_multiplication(outlier_fp32, scheme):
    model = outlier_fp32["onnxruntime"].model.clone()
    high = scheme.excluding({*QKV, "lm_head.decoder.weight"})
    assert high.multiplied - set(high.smoothing) == {*QKV, "lm_head.decoder.weight"}
    quantize_int8(model, high, engine="onnxruntime", activations="static")
    kept = {layer.name: layer for layer in find_linear_layers(model)}
    assert {*QKV, "lm_head.decoder.weight"} <= set(kept)
    assert not any("/smoothed" in str(kept[name].x.name) for name in QKV)


def test_the_exponent_is_the_best_one_for_the_sampled_rows(outlier_fp32, outlier_ranges, sample, scheme):
    fixed = int8_scheme(outlier_fp32["onnxruntime"].model, outlier_ranges)
    assert fixed.multiplied == scheme.multiplied
    rows = sample([QKV[0]])[QKV[0]]
    assert rows.shape[1] == 32 and 100 <= len(rows) <= 600
    layer = next(each for each in find_linear_layers(outlier_fp32["onnxruntime"].model) if each.name == QKV[0])
    found = outlier_ranges[QKV[0]]

    def error(s):
        low, high = (found.low / s).min(), (found.high / s).max()
        step = (max(high, 0) - min(low, 0)) / 255
        columns = layer.matrix() * s[:, None]
        size = np.abs(columns).max(axis=0) / 127
        return np.square(
            np.rint(rows / s / step) * step @ (np.rint(columns / size) * size) - rows @ layer.matrix()
        ).sum()

    assert error(scheme.smoothing[QKV[0]]) <= 1.05 * error(fixed.smoothing[QKV[0]])

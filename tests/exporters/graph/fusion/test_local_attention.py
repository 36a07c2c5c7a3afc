"""Local attention in blocks, on the traced GTE model with a local mask in each of its layers."""

import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph import fusion
from gte_deploy.exporters.graph.editing import Builder, by_name, constant, integers
from gte_deploy.exporters.graph.fusion.local_attention import LOCAL_ATTENTION

WINDOW, HIDDEN = 5, -10_000.0
SITES = {"rope": 4, "local_attention": 2, "skip_layer_norm": 4}
LENGTHS = (1, 2, 5, 6, 10, 11, 20, 21, 22, 30, 31, 64, 257)


def _distances(build: Builder, *, step: int = 1) -> ir.Value:
    int64 = {"dtype": ir.DataType.INT64}
    ids = by_name(build.graph.inputs, "input_ids")
    length = build.op("Squeeze", build.op("Shape", ids, start=1, name="size", **int64), name="length", **int64)
    zero, one = (constant(build.graph, f"scalar_{n}", np.array(n, np.int64)) for n in (0, step))
    places = build.op("Range", zero, length, one, name="places", **int64)
    rows, columns = (
        build.op("Unsqueeze", places, integers(build.graph, axis), name=f"axis_{axis}", **int64) for axis in (1, 0)
    )
    return build.op("Abs", build.op("Sub", rows, columns, name="differences", **int64), name="distances", **int64)


def make_local(model: ir.Model) -> ir.Model:
    """Hide from every token those that are more than WINDOW places away, as the trace of ModernBERT does."""
    (bias,) = {node.inputs[0].producer().inputs[1] for node in model.graph if node.op_type == "Softmax"}
    first = next(node for node in model.graph if bias in node.inputs)
    build = Builder(model.graph, first, "local")
    scalars = {
        name: constant(model.graph, name, value)
        for name, value in {"window": np.array(WINDOW, np.int64), "hidden": np.array(HIDDEN, np.float32)}.items()
    }
    is_far = build.op("Greater", _distances(build), scalars["window"], dtype=ir.DataType.BOOL)
    far = build.op("Mul", build.op("Cast", is_far, to=ir.DataType.FLOAT), scalars["hidden"])
    local = build.op("Add", bias, far, shape=("batch", 1, "sequence", "sequence"))
    for node in [node for node in model.graph if bias in node.inputs and node is not local.producer()]:
        node.replace_input_with(list(node.inputs).index(bias), local)
    return model


@pytest.fixture
def local(plain) -> ir.Model:
    return make_local(plain)


@pytest.fixture
def in_blocks(local) -> ir.Model:
    model = local.clone()
    fired = fusion.fuse_graph(model, sites={"local_attention": 2}, passes=(LOCAL_ATTENTION,))
    assert fired == {"local_attention": 2}
    return model


@pytest.mark.parametrize("tokens", LENGTHS)
def test_computes_what_the_trace_computes(local, in_blocks, feeds, run, tokens):
    """Texts of one block, of full blocks and of a last block that is short; padding may fill whole blocks."""
    inputs = feeds(1 if tokens == 1 else 3, tokens)
    inputs["attention_mask"][-1, 1:] = 0
    real = inputs["attention_mask"].astype(bool)
    expected, found = (run(model, inputs) for model in (local, in_blocks))
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-4)
    assert np.isfinite(found[0]).all()


def test_a_token_changes_nothing_outside_the_window_of_each_layer(in_blocks, feeds, run):
    inputs = feeds(1, 100)
    changed = {**inputs, "input_ids": inputs["input_ids"].copy()}
    changed["input_ids"][0, 50] = (changed["input_ids"][0, 50] + 1) % 256
    difference = np.abs(run(in_blocks, inputs)[0] - run(in_blocks, changed)[0])[0].max(-1)
    (places,) = np.nonzero(difference)
    assert (places.min(), places.max()) == (50 - 2 * WINDOW, 50 + 2 * WINDOW)


def test_scores_are_those_of_blocks(in_blocks, feeds, run, find):
    """60 tokens with a window of 5: five blocks of 12 queries, with 22 keys each."""
    softmax = find(in_blocks, "Softmax")
    in_blocks.graph.outputs.append(softmax.outputs[0])
    assert run(in_blocks, feeds(2, 60))[2].shape == (2, 4, 5, 12, 22)
    assert run(in_blocks, feeds(2, 20))[2].shape == (2, 4, 1, 20, 20)


def test_layers_share_the_mask_of_the_blocks(in_blocks):
    masked = [node.inputs[0].producer().inputs[1] for node in in_blocks.graph if node.op_type == "Softmax"]
    assert len(masked) == 2 and len(set(masked)) == 1


def test_fits_among_the_passes_for_a_cpu(local, feeds, run):
    inputs = feeds(3, 70)
    real = inputs["attention_mask"].astype(bool)
    expected = run(local, inputs)
    fused = fusion.fuse_graph(local, sites=SITES)
    assert fused == SITES
    found = run(local, inputs)
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=0, atol=5e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=2e-4)


def test_openvino_computes_it(local, in_blocks, feeds, run):
    openvino = pytest.importorskip("openvino")
    inputs = feeds(3, 70)
    real = inputs["attention_mask"].astype(bool)
    model = openvino.Core().read_model(ir.to_proto(in_blocks).SerializeToString())
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(model, "CPU", config)(inputs)["last_hidden_state"]
    np.testing.assert_allclose(found[real], run(local, inputs)[0][real], rtol=0, atol=5e-5)


def test_a_mask_of_keys_alone_is_no_site(plain):
    with pytest.raises(ExportError, match="is made by Unsqueeze, not Add"):
        fusion.fuse_graph(plain, sites={"local_attention": 2}, passes=(LOCAL_ATTENTION,))


def _other_places(model: ir.Model, find) -> None:
    bias = find(model, "Range").outputs[0]
    second = find(model, "Abs").inputs[0].producer().inputs[1].producer()
    build = Builder(model.graph, second, "other")
    second.replace_input_with(0, build.op("Identity", bias, dtype=ir.DataType.INT64))


def _far_steps(model: ir.Model, find) -> None:
    find(model, "Range").replace_input_with(2, constant(model.graph, "two", np.array(2, np.int64)))


def _mask_of_queries(model: ir.Model, find) -> None:
    find(model, "Greater").outputs[0].consumers()[0].outputs[0].consumers()[0].outputs[0].consumers()[0].inputs[
        0
    ].shape = ir.Shape(("batch", 1, "sequence", "sequence"))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (_other_places, "not between places of the same text"),
        (_far_steps, "are not 1 apart"),
        (_mask_of_queries, r"neither term .* \[batch, 1, 1, sequence\]"),
    ],
)
def test_refuses_other_masks(local, find, alter, reason):
    alter(local, find)
    with pytest.raises(ExportError, match=reason):
        fusion.fuse_graph(local, sites={"local_attention": 2}, passes=(LOCAL_ATTENTION,))

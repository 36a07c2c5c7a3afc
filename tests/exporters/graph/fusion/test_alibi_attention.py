"""Attention with biased scores, on the traced GTE model with ALiBi in each of its layers."""

import subprocess
import sys
import textwrap

import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph import fusion
from gte_deploy.exporters.graph.editing import Builder, by_name, constant, integers, read_values
from gte_deploy.exporters.graph.fusion.alibi_attention import ALIBI_ATTENTION, ALIBI_ATTENTION_ON_CPU, CHUNK

SLOPES = np.array([0.7, 0.25, 0.3, 2.0**-8], np.float32)
PASSES = {"chunks": (fusion.ROPE, ALIBI_ATTENTION_ON_CPU), "one kernel": (ALIBI_ATTENTION,)}
SITES = {"rope": 4, "alibi_attention": 2}


def bias_scores(model: ir.Model) -> ir.Model:
    """Lower every score by the distance of its tokens times the slope of its head, as the trace of JinaBERT does."""
    graph, int64 = model.graph, {"dtype": ir.DataType.INT64}
    (padding,) = {node.inputs[0].producer().inputs[1] for node in graph if node.op_type == "Softmax"}
    users = [node for node in graph if padding in node.inputs]
    build = Builder(graph, users[0], "biases")
    length = build.op("Squeeze", build.op("Shape", by_name(graph.inputs, "input_ids"), start=1, **int64), **int64)
    zero, one = (constant(graph, f"scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
    places = build.op("Range", zero, length, one, **int64)
    rows, columns = (build.op("Unsqueeze", places, integers(graph, axis), name=f"{axis}", **int64) for axis in (1, 0))
    nearness = build.op("Neg", build.op("Abs", build.op("Sub", columns, rows, **int64), **int64), **int64)
    slopes = constant(graph, "slopes", SLOPES[:, None, None])
    term = build.op("Mul", slopes, build.op("Cast", nearness, to=ir.DataType.FLOAT))
    shape = ("batch", len(SLOPES), "sequence", "sequence")
    term = build.op("Unsqueeze", term, integers(graph, 0), name="term", shape=(1, *shape[1:]))
    total = build.op("Add", term, padding, shape=shape)
    for node in users:
        node.replace_input_with(list(node.inputs).index(padding), total)
    return model


@pytest.fixture
def biased(plain) -> ir.Model:
    return bias_scores(plain)


@pytest.fixture(params=list(PASSES))
def fused(request, biased) -> ir.Model:
    model = biased.clone()
    assert fusion.fuse_graph(model, sites=SITES, passes=PASSES[request.param])["alibi_attention"] == 2
    return model


@pytest.mark.parametrize("tokens", [1, 2, 40, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 4 * CHUNK])
def test_computes_what_the_trace_computes(biased, fused, feeds, run, tokens):
    inputs = feeds(1 if tokens == 1 else 3, tokens)
    inputs["attention_mask"][-1, 1:] = 0
    real = inputs["attention_mask"].astype(bool)
    expected, found = (run(model, inputs) for model in (biased, fused))
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=0, atol=5e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=2e-4)
    assert np.isfinite(found[0]).all()


def test_the_biases_are_those_of_the_heads(biased, feeds, run, monkeypatch):
    """The comparison above would not see a bias that is left out, if it changed nothing."""
    inputs = feeds(1, 40)
    steep = ir.from_proto(ir.to_proto(biased))
    steep.graph.initializers["slopes"].const_value = ir.tensor(SLOPES[::-1, None, None].copy())
    assert np.abs(run(biased, inputs)[0] - run(steep, inputs)[0]).max() > 1e-2


def test_no_value_has_an_axis_of_heads_and_two_of_tokens(fused, feeds, run):
    """Scores and what is computed from them aside; nothing but them is as large as all biases."""
    inputs = feeds(1, 300)
    values = [value for node in fused.graph for value in node.outputs if node.op_type in ("Mul", "Add", "Sub", "Neg")]
    on_scores = [value for value in values if "self" in str(value.name) or "layers" in str(value.name)]
    others = [value for value in values if value not in on_scores]
    fused.graph.outputs.extend(value for value in others if not value.is_graph_output())
    assert others
    assert max(value.size for value in run(fused, inputs)[2:]) <= 300 * 300


def test_openvino_computes_its_form(biased, feeds, run):
    openvino = pytest.importorskip("openvino")
    inputs = feeds(3, 200)
    real = inputs["attention_mask"].astype(bool)
    fused = biased.clone()
    fusion.fuse_graph(fused, sites=SITES, passes=PASSES["one kernel"])
    model = openvino.Core().read_model(ir.to_proto(fused).SerializeToString())
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(model, "CPU", config)(inputs)["last_hidden_state"]
    np.testing.assert_allclose(found[real], run(biased, inputs)[0][real], rtol=0, atol=5e-5)


def test_what_a_body_reads_outside_counts_as_read(biased, find):
    fusion.fuse_graph(biased, sites=SITES, passes=PASSES["chunks"])
    scan = find(biased, "Scan")
    assert len(scan.inputs) == 1
    names = {str(value.name).rpartition("/")[2] for value in read_values(scan)}
    assert {"columns", "minus_slopes"} < names and len(names) >= 6, names


def test_other_masks_are_no_site(plain):
    for passes in PASSES.values():
        with pytest.raises(ExportError, match="is made by Unsqueeze, not Add"):
            fusion.fuse_graph(plain.clone(), sites=SITES, passes=passes)


@pytest.mark.parametrize(
    ("slopes", "reason"),
    [
        (SLOPES.reshape(4, 1, 1) * 0, "a slope is not above 0"),
        (-SLOPES.reshape(4, 1, 1), "a slope is not above 0"),
        (SLOPES.reshape(1, 4, 1), r"not \[heads, 1, 1\]"),
    ],
)
def test_refuses_other_slopes(biased, slopes, reason):
    biased.graph.initializers["slopes"].const_value = ir.tensor(slopes)
    for passes in PASSES.values():
        with pytest.raises(ExportError, match=reason):
            fusion.fuse_graph(biased.clone(), sites=SITES, passes=passes)


def test_long_text_holds_no_square_of_scores(biased, tmp_path):
    """4,096 tokens, 4 heads: scores and biases alone would be 256 MiB each; the run adds a fifth of that."""
    fusion.fuse_graph(biased, sites={"rope": 4, "alibi_attention": 2, "skip_layer_norm": 4})
    ir.save(biased, tmp_path / "model.onnx")
    script = textwrap.dedent(
        """
        import sys
        import numpy as np, onnxruntime as ort

        def peak():
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

        session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
        before = peak()
        ids = np.ones((1, 4096), np.int64)
        session.run(None, {"input_ids": ids, "attention_mask": ids, "mask_positions": np.zeros((0, 2), np.int64)})
        print(peak() - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100 * 1024  # KiB

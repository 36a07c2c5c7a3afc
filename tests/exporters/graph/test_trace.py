"""What the trace itself promises: standard operators, the caller's model untouched, arguments refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402

from gte_deploy.core.errors import ExportError  # noqa: E402
from gte_deploy.exporters.graph.trace import RotaryTable, trace  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from traces import fresh_traces  # noqa: E402

ARGUMENTS: dict[str, Any] = {"max_length": 512, "pooling": None, "logits": "masked", "opset": 20}


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return load_model(golden_dir / "mlm", task="fill-mask")


@pytest.fixture(scope="module")
def traced(model: Any) -> ir.Model:
    model.train()
    model.lm_head.eval()  # a mode of its own
    model.config._attn_implementation = "sdpa"
    rotary = model.gte.rotary_emb
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with fresh_traces():
        result = trace(model, task="fill-mask", **ARGUMENTS)
    # The caller's model comes back as it was.
    assert model.training and model.gte.layers[0].training and not model.lm_head.training
    assert model.config._attn_implementation == "sdpa"
    assert model.gte.rotary_emb is rotary
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    return result


def test_standard_operators_only(traced):
    assert dict(traced.opset_imports) == {"": 20}
    kinds = {node.op_type for node in traced.graph}
    assert kinds <= {
        *("Add", "Cast", "Concat", "Gather", "GatherND", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Neg"),
        *("Reshape", "Shape", "Slice", "Softmax", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
    }


def test_mask_stays_one_row_per_text(traced):
    """Added to the scores as [batch, 1, 1, sequence]; nothing of [batch, 1, sequence, sequence] is ever made."""
    for softmax in (node for node in traced.graph if node.op_type == "Softmax"):
        total = softmax.inputs[0].producer()
        shapes = [[str(size) for size in value.shape] for value in total.inputs]
        assert ["batch", "1", "1", "sequence"] in shapes
    full = [
        v.name
        for node in traced.graph
        for v in node.outputs
        if v.shape and str(v.shape) == "[batch,1,sequence,sequence]"
    ]
    assert not full


def test_nothing_length_dependent_is_computed(traced):
    """Positions are cut from the tables, and no angle is computed at run time."""
    kinds = [node.op_type for node in traced.graph]
    assert not {"If", "Loop", "Cos", "Sin", "Range", "ConstantOfShape", "Expand"} & set(kinds)
    tables = [name for name in traced.graph.initializers if ".rotary_emb." in name]
    assert sorted(tables) == ["gte.rotary_emb.cos", "gte.rotary_emb.sin"]
    assert {str(traced.graph.initializers[name].shape) for name in tables} == {"[512,4]"}


def test_tables_are_pytorchs_own(model):
    table = RotaryTable(model.gte.rotary_emb, 8192)
    states = torch.zeros(1, 8192, 32)
    expected = model.gte.rotary_emb(states, torch.arange(8192)[None])
    for found, reference in zip(table(states, None), expected, strict=True):
        assert torch.equal(found, reference)


def test_weights_are_referenced_not_copied(model, traced):
    weight = traced.graph.initializers["gte.layers.0.mlp.down_proj.weight.T"].const_value.numpy()
    parameter = model.gte.layers[0].mlp.down_proj.weight.detach().numpy()
    assert weight.base is not None and weight.__array_interface__["data"] == parameter.__array_interface__["data"]


def test_no_paths_of_this_machine_in_the_graph(traced):
    proto = ir.to_proto(traced)
    assert b"site-packages" not in proto.SerializeToString()
    assert not proto.metadata_props and not any(node.metadata_props or node.doc_string for node in proto.graph.node)


def test_a_failed_trace_gives_the_model_back(model, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(torch.onnx, "export", fail)
    rotary = model.gte.rotary_emb
    with pytest.raises(RuntimeError, match="stop"):
        trace(model, task="fill-mask", **ARGUMENTS)
    assert model.gte.rotary_emb is rotary
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "summarise"}, "task 'summarise' is none of fill-mask, embed"),
        ({"task": "classify"}, "needs a GteForSequenceClassification, and the model is a GteForMaskedLM"),
        ({"logits": "some"}, "logits 'some' is none of masked, all"),
        ({"max_length": 0}, "max_length 0 is outside"),
        ({"max_length": 8193}, "max_length 8193 is outside 8 … 8192"),
        ({"opset": 18}, "opset 18 is outside 20"),
        ({"opset": 99}, "opset 99 is outside 20"),
    ],
)
def test_refuses_by_name(model, change, message):
    with pytest.raises(ExportError, match=message):
        trace(model, **{"task": "fill-mask", **ARGUMENTS, **change})


def test_refuses_an_unknown_pooling(golden_dir):
    encoder = load_model(golden_dir / "embed_ntk", task="embed")
    with pytest.raises(ExportError, match="pooling None is none of mean, cls"):
        trace(encoder, task="embed", **ARGUMENTS)


def test_refuses_rope_that_depends_on_the_length(golden_dir):
    encoder = load_model(golden_dir / "embed_ntk", task="embed")
    encoder.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ExportError, match="rope_type 'dynamic' depends on the length"):
        trace(encoder, task="embed", **{**ARGUMENTS, "pooling": "mean"})


def test_refuses_half_precision(golden_dir):
    half = load_model(golden_dir / "mlm", task="fill-mask", dtype=torch.bfloat16)
    with pytest.raises(ExportError, match="is torch.bfloat16; a graph needs float32 weights"):
        trace(half, task="fill-mask", **ARGUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [21, 22, 23])
def test_other_opsets_fuse_and_run(model, opset):
    import numpy as np
    import onnxruntime as ort

    from gte_deploy.exporters.graph.build import build_graphs

    graph = build_graphs(model, task="fill-mask", max_length=512, opset=opset)["onnxruntime"]
    assert graph.model.opset_imports[""] == opset
    session = ort.InferenceSession(ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, 256, (2, 30))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mask_positions": np.array([[1, 2]])}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)).logits[1, 2].numpy()
    np.testing.assert_allclose(session.run(["logits"], feeds)[0][0], logits, rtol=0, atol=2e-4)

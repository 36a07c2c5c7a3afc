import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest


def test_fires_twice_a_layer(plain, apply, same_function):
    fired, reasons = apply(plain, "skip_layer_norm")
    assert fired == 4
    assert sorted(reason.split("/")[0] for reason in reasons) == ["gte.embeddings.LayerNorm", "lm_head.layer_norm"]
    same_function(plain)


def test_keeps_epsilon(plain, apply):
    apply(plain, "skip_layer_norm")
    norms = [node for node in plain.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 6
    assert [node.attributes["epsilon"].value for node in norms] == pytest.approx([1e-12] * 6, rel=1e-6)


def test_runtime_does_not_replace_it_by_its_slower_kernel(fuse, plain, tmp_path):
    """On [batch, sequence, hidden] ONNX Runtime makes SkipLayerNormalization of the two, which is slower on a CPU."""

    def kernels(model: ir.Model) -> list[str]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]

    assert "SkipLayerNormalization" in kernels(plain), "the reason for the pass has gone: measure again"
    fuse(plain)
    assert "SkipLayerNormalization" not in kernels(plain)
    assert kernels(plain).count("LayerNormalization") == 6


def _first_axis(model: ir.Model) -> None:
    _norm(model).attributes["axis"] = ir.AttrInt64("axis", 1)


def _no_residual(model: ir.Model) -> None:
    norm = _norm(model)
    norm.replace_input_with(0, norm.inputs[0].producer().inputs[1])


def _doubled(model: ir.Model) -> None:
    total = _norm(model).inputs[0].producer()
    total.replace_input_with(1, total.inputs[0])


def _norm(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.name.startswith("gte.layers.1.post_mlp_layernorm/"))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (_first_axis, "does not normalise the last axis"),
        (_no_residual, "neither operand"),
        (_doubled, "neither operand"),
    ],
)
def test_refuses_another_residual_step(plain, refused, alter, reason):
    alter(plain)
    message = refused(plain)
    assert "fired" in message and "sites" in message
    if alter is not _doubled:  # without its use the MLP before it is dead, and an earlier pass says so
        assert "'skip_layer_norm' fired 3 times" in message and "has 4 sites" in message
        assert reason in message

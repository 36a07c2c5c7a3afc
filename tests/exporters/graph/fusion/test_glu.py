import onnx_ir as ir
import pytest


def test_fires_once_a_layer_and_leaves_the_head(plain, apply, same_function, kinds):
    fired, reasons = apply(plain, "glu")
    assert fired == 2
    assert len(reasons) == 1 and reasons[0].startswith("lm_head/Gelu")
    domains = [node.domain for node in plain.graph if node.op_type == "Gelu"]
    assert domains == ["com.microsoft", "com.microsoft", ""]
    same_function(plain)


def _tanh(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.name == "gte.layers.1.mlp.act_fn/Gelu")
    node.attributes["approximate"] = ir.AttrString("approximate", "tanh")


def test_refuses_an_approximate_gelu(plain, refused):
    _tanh(plain)
    message = refused(plain)
    assert "'glu' fired 1 times" in message and "has 2 sites" in message
    assert "'tanh', not exact" in message


def test_refuses_halves_in_the_wrong_order(plain, apply):
    from gte_deploy.exporters.graph.editing import Mismatch
    from gte_deploy.exporters.graph.fusion.glu import GLU

    apply(plain, "up_gate")
    split = next(node for node in plain.graph if node.name == "gte.layers.0.mlp/up_gate")
    up, gate = (value.consumers()[0] for value in split.outputs)
    up.replace_input_with(0, split.outputs[1])
    gate.replace_input_with(0, split.outputs[0])
    gelu = next(node for node in plain.graph if node.op_type == "Gelu" and ".layers.0." in node.name)
    with pytest.raises(Mismatch, match="two halves"):
        GLU.rewrite(plain.graph, gelu)

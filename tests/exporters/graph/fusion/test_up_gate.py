import numpy as np
import onnx_ir as ir
import pytest


def test_merges_two_matrices_of_every_layer(plain, apply, same_function, kinds):
    fired, reasons = apply(plain, "up_gate")
    assert fired == 2
    assert len(reasons) == 1 and reasons[0].startswith("lm_head/Gelu"), "the head's GELU gates nothing"
    same_function(plain)


def test_merged_matrix_holds_up_before_gate(plain, apply, torch_model):
    apply(plain, "up_gate")
    mlp = torch_model.gte.layers[1].mlp
    node = next(node for node in plain.graph if node.name == "gte.layers.1.mlp.up_gate_proj/MatMul")
    expected = np.concatenate([mlp.up_proj.weight.detach().numpy().T, mlp.gate_proj.weight.detach().numpy().T], axis=1)
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), expected)


def _up_of_another_tensor(model: ir.Model) -> None:
    source = next(node for node in model.graph if node.name == "gte.embeddings.LayerNorm/LayerNormalization")
    node = next(node for node in model.graph if node.name == "gte.layers.0.mlp.up_proj/MatMul")
    node.replace_input_with(0, source.outputs[0])


def _gate_used_twice(model: ir.Model) -> None:
    gelu = next(node for node in model.graph if node.name == "gte.layers.0.mlp.act_fn/Gelu")
    product = gelu.outputs[0].consumers()[0]
    product.replace_input_with(1, gelu.outputs[0])


@pytest.mark.parametrize(
    ("alter", "reason"),
    [(_up_of_another_tensor, "do not have the same input"), (_gate_used_twice, "is used by Mul, Mul")],
)
def test_refuses_another_gate(plain, refused, alter, reason):
    alter(plain)
    message = refused(plain)
    assert "'up_gate' fired 1 times" in message and "has 2 sites" in message
    assert reason in message

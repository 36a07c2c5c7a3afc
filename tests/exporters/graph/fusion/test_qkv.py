import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.exporters.graph import fusion


def test_merges_three_projections_of_every_layer(plain, apply, same_function, find):
    assert apply(plain, "qkv") == (2, [])
    assert [node.name for node in plain.graph if node.op_type == "Gemm"][:2] == [
        "gte.layers.0.self_attn.qkv_proj/Gemm",
        "gte.layers.1.self_attn.qkv_proj/Gemm",
    ]
    same_function(plain)


def test_merged_matrix_holds_query_key_value_in_order(plain, apply, find, torch_model):
    apply(plain, "qkv")
    attention = torch_model.gte.layers[0].self_attn
    gemm = find(plain, "Gemm")
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = np.concatenate([part.weight.detach().numpy().T for part in parts], axis=1)
    bias = np.concatenate([part.bias.detach().numpy() for part in parts])
    np.testing.assert_array_equal(gemm.inputs[1].const_value.numpy(), weight)
    np.testing.assert_array_equal(gemm.inputs[2].const_value.numpy(), bias)
    sizes = find(plain, "Split").inputs[1].const_value.numpy()
    assert sizes.tolist() == [32, 32, 32]


def test_projections_stay_apart_for_a_cpu(plain, apply, same_function, kinds):
    assert apply(plain, "projections", passes=fusion.PASSES) == (2, [])
    names = [node.name for node in plain.graph if node.op_type == "Gemm" and ".layers." in node.name]
    assert names[:3] == [f"gte.layers.0.self_attn.{kind}_proj/Gemm" for kind in "qkv"] and len(names) == 6
    assert "Split" not in kinds(plain)
    same_function(plain)


def _values_of_another_tensor(model: ir.Model) -> None:
    """Layer 1's values are made from layer 1's MLP output instead of its input."""
    source = next(
        node for node in model.graph if node.name == "gte.layers.0.post_attention_layernorm/LayerNormalization"
    )
    node = next(node for node in model.graph if node.name == "gte.layers.1.self_attn.v_proj/MatMul")
    node.replace_input_with(0, source.outputs[0])


def _queries_without_bias(model: ir.Model) -> None:
    add = next(node for node in model.graph if node.name == "gte.layers.1.self_attn.q_proj/Add")
    ir.convenience.replace_all_uses_with(add.outputs[0], add.inputs[0])
    add.inputs[0].shape = add.outputs[0].shape


def _weight_computed_at_run_time(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.name == "gte.layers.1.self_attn.k_proj/MatMul")
    turned = ir.node("Neg", [node.inputs[1]], name="computed")
    model.graph.insert_before(node, turned)
    node.replace_input_with(1, turned.outputs[0])


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (_values_of_another_tensor, "do not have the same input"),
        (_queries_without_bias, "some of queries, keys and values have a bias"),
        (_weight_computed_at_run_time, "is not a constant"),
    ],
)
@pytest.mark.parametrize(("name", "passes"), [("qkv", fusion.MERGED_PASSES), ("projections", fusion.PASSES)])
def test_refuses_other_projections(plain, refused, alter, reason, name, passes):
    alter(plain)
    message = refused(plain, passes=passes)
    assert f"{name!r} fired 1 times" in message and "has 2 sites" in message
    assert reason in message

import numpy as np
import onnx_ir as ir
import pytest

from gte_deploy.exporters.graph.editing import integers


def test_fires_on_queries_and_keys_of_every_layer(plain, apply, same_function, kinds):
    assert apply(plain, "rope") == (4, [])
    assert kinds(plain).count("RotaryEmbedding") == 4
    assert "Neg" not in kinds(plain)
    same_function(plain, lengths=(1, 2, 40, 2000))


def test_tables_are_the_cosines_and_sines_of_pytorch(plain, apply, torch_model, find):
    import torch

    apply(plain, "rope")
    cos, sin = torch_model.gte.rotary_emb(torch.zeros(1), torch.arange(8192)[None])
    for node in (node for node in plain.graph if node.op_type == "RotaryEmbedding"):
        _, position, cos_table, sin_table = node.inputs
        half = cos.shape[-1] // 2
        assert position.producer().op_type == "Expand"  # [B, S]: one offset for all is read otherwise by OpenVINO
        np.testing.assert_array_equal(cos_table.const_value.numpy(), cos[0, :, :half].numpy())
        np.testing.assert_array_equal(sin_table.const_value.numpy(), sin[0, :, :half].numpy())
    tables = {node.inputs[2] for node in plain.graph if node.op_type == "RotaryEmbedding"}
    assert len(tables) == 1, "every layer shares one table"


def _swap_halves(model: ir.Model, find) -> None:
    concat = find(model, "Neg").outputs[0].consumers()[0]
    first, second = concat.inputs
    concat.replace_input_with(0, second)
    concat.replace_input_with(1, first)


def _shift_positions(model: ir.Model, find) -> None:
    table = next(node for node in model.graph if node.op_type == "Slice" and node.inputs[0].name.endswith(".cos"))
    table.replace_input_with(1, integers(model.graph, 1))


def _rotate_a_quarter(model: ir.Model, find) -> None:
    find(model, "Neg").inputs[0].producer().replace_input_with(1, integers(model.graph, 2))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (_swap_halves, "is not made by a node|is made by Neg"),
        (_shift_positions, "positions do not start at 0"),
        (_rotate_a_quarter, "the upper half does not fit"),
    ],
)
def test_refuses_another_rotation(plain, find, refused, alter, reason):
    alter(plain, find)
    message = refused(plain)
    assert "'rope' fired" in message and "has 4 sites" in message
    assert any(part in message for part in reason.split("|")), message

import onnx_ir as ir
import pytest

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph import fusion

CPU = {"rope": 4, "attention": 2, "projections": 2, "skip_layer_norm": 4}
MERGED = {"rope": 4, "attention": 2, "qkv": 2, "up_gate": 2, "glu": 2, "skip_layer_norm": 4}


@pytest.mark.parametrize(("passes", "expected"), [(fusion.PASSES, CPU), (fusion.MERGED_PASSES, MERGED)])
def test_all_passes_in_order(fuse, plain, same_function, passes, expected):
    fired = fuse(plain, passes=passes)
    assert list(fired.items()) == list(expected.items())
    same_function(plain, lengths=(1, 2, 40, 2000))


def test_layers_run_on_token_rows(fuse, plain, kinds):
    """Between a layer's operators nothing turns back and forth: one Reshape in, one out, and those around attention."""
    fuse(plain, passes=fusion.MERGED_PASSES)
    assert not [
        node.name
        for node in plain.graph
        if node.op_type == "Reshape" and node.inputs[0].producer().op_type == "Reshape"
    ]
    around_attention = 3 + 2 + 2 + 1  # q, k, v; heads of q and k; with their masks; the result
    assert kinds(plain).count("Reshape") == 1 + 2 * around_attention + 1


def test_mask_columns_are_made_once(fuse, plain, kinds):
    fuse(plain)
    assert [node.name for node in plain.graph if node.name.startswith("mask/")].count("mask/key_columns") == 1
    assert kinds(plain).count("Expand") == 2 + 1  # columns of queries and of keys; positions
    assert kinds(plain).count("Pad") == 1


def test_nothing_depends_on_a_branch_or_a_length(fuse, plain, kinds):
    fuse(plain)
    assert not {"If", "Loop", "Scan"} & set(kinds(plain))


def test_inner_values_have_no_shapes(fuse, plain):
    """Named axes make ONNX Runtime keep buffers from layer to layer."""
    fuse(plain)
    assert [v.name for node in plain.graph for v in node.outputs if v.shape] == ["last_hidden_state", "logits"]


def test_names_are_unique_and_say_where(fuse, plain):
    fuse(plain)
    names = [node.name for node in plain.graph]
    assert len(set(names)) == len(names)
    assert "gte.layers.1.mlp.down_proj/Gemm" in names


def test_no_weight_is_left_unused_or_stored_twice(fuse, plain):
    fuse(plain)
    assert not [name for name, value in plain.graph.initializers.items() if not value.uses()]
    matrices = [
        value.const_value.tobytes() for value in plain.graph.initializers.values() if value.const_value.size > 64
    ]
    assert len(set(matrices)) == len(matrices)


def test_another_number_of_layers_is_an_error(fuse, plain):
    with pytest.raises(
        ExportError, match=r"'rope' fired 4 times, and this architecture has 6 sites: .*no other Neg node"
    ):
        fuse(plain, layers=3)


def test_a_fused_graph_is_not_fused_again(fuse, plain):
    fuse(plain)
    with pytest.raises(ExportError, match="'rope' fired 0 times"):
        fuse(plain)


def test_same_graph_same_bytes(fuse, traced_proto):
    first, second = (ir.from_proto(traced_proto) for _ in range(2))
    for model in (first, second):
        fuse(model)
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()

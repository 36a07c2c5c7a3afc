"""Queries, keys and values in one GEMM and one rotation: the same function as the trace."""

import dataclasses

import numpy as np
import pytest

from gte_deploy.core.errors import ExportError
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.quantization.calibration import running
from gte_deploy.exporters.targets.tensorrt.qkv import join_projections, joined_parts

LAYER = "gte.layers.1.self_attn"


@pytest.fixture
def joined(plain, sites):
    """The FP32 graph with joined projections."""
    model = plain["openvino"].model.clone()
    counts = join_projections(model, sites=sites)
    return dataclasses.replace(plain["openvino"], model=model, fusions=counts)


def test_it_computes_what_the_trace_does(plain, joined, spec, make_batch, num_layers):
    assert joined.fusions == {"qkv": num_layers}
    batch = make_batch(3, 70)
    with running(plain["openvino"], spec) as one, running(joined, spec) as other:
        expected, found = (backend.run(batch, ["last_hidden_state", "logits"]) for backend in (one, other))
    real = batch.attention_mask == 1
    np.testing.assert_allclose(found["last_hidden_state"][real], expected["last_hidden_state"][real], rtol=0, atol=5e-5)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=2e-4)


def test_a_matrix_has_the_columns_of_queries_keys_and_values(joined, model):
    found = next(linear for linear in find_linear_layers(joined.model) if linear.name == f"{LAYER}.qkv_proj.weight")
    assert joined_parts(found) == {f"{LAYER}.{kind}_proj.weight" for kind in "qkv"}
    attention = model.gte.layers[1].self_attn
    expected = [getattr(attention, f"{kind}_proj").weight.detach().numpy().T for kind in "qkv"]
    np.testing.assert_array_equal(found.matrix(), np.concatenate(expected, axis=1))


def _values_of_another_input(graph):
    node = next(node for node in graph if node.name == f"{LAYER}.v_proj/MatMul")
    node.replace_input_with(0, next(node for node in graph if node.op_type == "LayerNormalization").outputs[0])


def _keys_with_another_sine(graph):
    negation = [node for node in graph if node.op_type == "Neg"][-1]
    (crossed,) = negation.outputs[0].consumers()
    (sine_term,) = crossed.outputs[0].consumers()
    (total,) = sine_term.outputs[0].consumers()
    sine_term.replace_input_with(1, total.inputs[0].producer().inputs[1])


@pytest.mark.parametrize(
    ("alter", "reason"),
    [(_values_of_another_input, "do not have the same input"), (_keys_with_another_sine, "rotated differently")],
)
def test_projections_of_another_form_are_refused(plain, sites, num_layers, alter, reason):
    model = plain["openvino"].model.clone()
    alter(model.graph)
    with pytest.raises(ExportError, match=f"'qkv' fired {num_layers - 1} times.*{reason}"):
        join_projections(model, sites=sites)

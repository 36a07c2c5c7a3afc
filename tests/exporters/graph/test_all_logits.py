"""The graph with the logits of every token, made from the graph with masked logits, against transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402

from factories import make_checkpoint  # noqa: E402
from gte_deploy.core.errors import ExportError  # noqa: E402
from gte_deploy.core.spec import ModelSpec  # noqa: E402
from gte_deploy.exporters.graph.all_logits import all_logits_graph, needs_mask_positions  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs, save_graphs  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402

RNG = np.random.default_rng(0)
IDS = RNG.integers(5, 256, (3, 20))
MASK = (np.arange(20) < np.array([20, 13, 4])[:, None]).astype(np.int64)
TYPES = (np.arange(20) > 6).astype(np.int64) * MASK
REAL = MASK == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all_logits")
    return load_model(make_checkpoint(folder, task="fill-mask", layers=1, type_vocab_size=2), task="fill-mask")


@pytest.fixture(scope="module")
def graphs(model):
    return build_graphs(model, task="fill-mask", max_length=64, token_types=True)


def run(graph: Graph) -> dict[str, np.ndarray]:
    """Every output of a graph."""
    session = ort.InferenceSession(ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
    names = [tensor.name for tensor in graph.outputs]
    return dict(zip(names, session.run(names, {spec.name: feeds[spec.name] for spec in graph.inputs}), strict=True))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_token_gets_the_logits_of_transformers(graphs, model, engine):
    graph = all_logits_graph(graphs[engine])
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), token_type_ids=torch.tensor(TYPES)
        ).logits.numpy()
    found = run(graph)
    assert list(found) == ["logits", "last_hidden_state"], "many libraries take the first output"
    assert found["logits"].shape == expected.shape == (3, 20, 256)
    np.testing.assert_allclose(found["logits"][REAL], expected[REAL], atol=2e-4)
    assert [tensor.name for tensor in graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert graph.outputs[0].shape == ("batch", "sequence", 256) and graph.fusions == graphs[engine].fusions


def test_the_graph_adds_no_weight_and_leaves_the_other_unchanged(graphs, tmp_path):
    masked = graphs["onnxruntime"]
    before = ir.to_proto(masked.model).SerializeToString()
    save_graphs({tmp_path / "a.onnx": masked}, tmp_path / "a.onnx_data")
    save_graphs({tmp_path / "b.onnx": masked, tmp_path / "c.onnx": all_logits_graph(masked)}, tmp_path / "b.onnx_data")
    assert (tmp_path / "a.onnx_data").read_bytes() == (tmp_path / "b.onnx_data").read_bytes()
    assert (tmp_path / "c.onnx").stat().st_size < 1.1 * (tmp_path / "b.onnx").stat().st_size
    assert ir.to_proto(masked.model).SerializeToString() == before


def test_an_unknown_use_of_the_mask_positions_is_refused(graphs):
    model = graphs["openvino"].model.clone()
    gather = next(node for node in model.graph if node.op_type == "GatherND")
    gather.op_type = "Gather"
    with pytest.raises(ExportError, match="Gather reads the mask positions"):
        all_logits_graph(dataclasses.replace(graphs["openvino"], model=model))


def test_only_masked_logits_need_another_graph():
    spec = ModelSpec("fill-mask", 8, 16, 4, 0)
    assert needs_mask_positions(spec)
    assert not needs_mask_positions(dataclasses.replace(spec, logits="all"))
    assert not needs_mask_positions(dataclasses.replace(spec, task="embed"))

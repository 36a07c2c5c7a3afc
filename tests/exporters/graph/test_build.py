"""Graphs of every task against the golden results, transformers, and the interface that the backends rely on."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402
from transformers import GteConfig  # noqa: E402

from factories import make_checkpoint  # noqa: E402
from gte_deploy.core.errors import ExportError  # noqa: E402
from gte_deploy.core.spec import Engine, TensorSpec  # noqa: E402
from gte_deploy.exporters.graph import build as graph_module  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs, save_graph, save_graphs  # noqa: E402
from gte_deploy.exporters.graph.editing import by_name  # noqa: E402
from gte_deploy.exporters.graph.fusion import fuse_graph  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.families.gte import GTE  # noqa: E402
from gte_deploy.tasks.base import HIDDEN  # noqa: E402

IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
POSITIONS = TensorSpec("mask_positions", "int64", ("num_masks", 2))

# Golden results are float64; FP32 agrees to 1e-4, and to 5e-4 where it has rounded the angles of far positions.
GOLDEN_ATOL, LONG_ATOL = 1e-4, 5e-4


@pytest.fixture(scope="session")
def folders(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = tmp_path_factory.mktemp("graphs")
    # One layer: these are about heads, and a trace costs by the layer. Head size 24: no power of two.
    small = {"layers": 1, "hidden_size": 48, "heads": 2, "seed": 5}
    return {
        "mlm": golden_dir / "mlm",
        "embed": golden_dir / "embed_ntk",
        "rerank": golden_dir / "rerank",
        "cls": make_checkpoint(made / "cls", task="embed", type_vocab_size=1, pooling="cls", **small),
        "tokens": make_checkpoint(made / "tokens", task="token-classify", num_labels=3, **small),
        "all": make_checkpoint(made / "all", **small),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "mlm": {"task": "fill-mask"},
    "embed": {"task": "embed", "pooling": "mean"},
    "rerank": {"task": "classify"},
    "cls": {"task": "embed", "pooling": "cls"},
    "tokens": {"task": "token-classify"},
    "all": {"task": "fill-mask", "logits": "all"},
}


@pytest.fixture(scope="session")
def graphs(folders: Any) -> Callable[[str], Graph]:
    """`graphs("mlm")`: ONNX Runtime's graph, and `graphs("mlm plain")` OpenVINO's; traced once a session."""
    built: dict[str, dict[Engine, Graph]] = {}

    def get(name: str) -> Graph:
        name, _, plain = name.partition(" ")
        if name not in built:
            model = load_model(folders[name], task=OPTIONS[name]["task"])
            built[name] = build_graphs(model, max_length=8192, **OPTIONS[name])
        return built[name]["openvino" if plain else "onnxruntime"]

    return get


def run(graph: Graph, input_ids: Any, attention_mask: Any = None, mask_positions: Any = None) -> list[np.ndarray]:
    """The hidden states, and then the other outputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    proto = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    ids = np.asarray(input_ids, np.int64)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64),
        "mask_positions": np.asarray([] if mask_positions is None else mask_positions, np.int64).reshape(-1, 2),
    }
    names = sorted((tensor.name for tensor in graph.outputs), key=lambda name: name != HIDDEN)
    return session.run(names, {spec.name: feeds[spec.name] for spec in graph.inputs})


def golden(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as data:
        return dict(data)


@pytest.mark.parametrize("name", ["mlm plain", "mlm", "embed", "rerank"])
def test_golden_hidden_states(graphs, folders, name):
    expected = golden(folders[name.split()[0]])
    mask = expected["attention_mask"]
    hidden = run(graphs(name), expected["input_ids"], mask)[0] * mask[..., None]
    np.testing.assert_allclose(hidden, expected["hidden"], rtol=0, atol=GOLDEN_ATOL)


@pytest.mark.parametrize("name", ["mlm plain", "mlm", "embed", "rerank"])
def test_golden_far_positions(graphs, folders, name):
    expected = golden(folders[name.split()[0]])
    tail = run(graphs(name), expected["long_input_ids"])[0][:, -8:]
    np.testing.assert_allclose(tail, expected["long_hidden_tail"], rtol=0, atol=LONG_ATOL)


@pytest.mark.parametrize("name", ["mlm plain", "mlm"])
def test_golden_logits_at_masks(graphs, folders, name):
    expected = golden(folders["mlm"])
    found = run(graphs(name), expected["input_ids"], expected["attention_mask"], expected["mask_positions"])[1]
    np.testing.assert_allclose(found, expected["mask_logits"], rtol=0, atol=GOLDEN_ATOL)


def test_golden_scores(graphs, folders):
    expected = golden(folders["rerank"])
    found = run(graphs("rerank"), expected["input_ids"], expected["attention_mask"])[1]
    np.testing.assert_allclose(found, expected["scores"], rtol=0, atol=GOLDEN_ATOL)


@pytest.mark.parametrize(
    ("name", "inputs", "answer"),
    [
        ("mlm plain", (IDS, MASK, POSITIONS), TensorSpec("logits", "float32", ("num_masks", 256))),
        ("mlm", (IDS, MASK, POSITIONS), TensorSpec("logits", "float32", ("num_masks", 256))),
        ("all", (IDS, MASK), TensorSpec("logits", "float32", ("batch", "sequence", 256))),
        ("embed", (IDS, MASK), TensorSpec("sentence_embedding", "float32", ("batch", 32))),
        ("cls", (IDS, MASK), TensorSpec("sentence_embedding", "float32", ("batch", 48))),
        ("rerank", (IDS, MASK), TensorSpec("logits", "float32", ("batch", 1))),
        ("tokens", (IDS, MASK), TensorSpec("logits", "float32", ("batch", "sequence", 3))),
    ],
)
def test_interface(graphs, name, inputs, answer):
    graph = graphs(name)
    width = answer.shape[-1] if name == "cls" else {"all": 48, "tokens": 48}.get(name, 32)
    assert graph.inputs == inputs
    hidden = TensorSpec(HIDDEN, "float32", ("batch", "sequence", width))
    # Libraries that take the first output want logits, but pool hidden states by themselves.
    assert graph.outputs == ((answer, hidden) if answer.name == "logits" else (hidden, answer))
    assert graph.model.opset_imports[""] == graph.opset == 20


@pytest.mark.parametrize(("name", "layers"), [("embed", 2), ("rerank", 2), ("cls", 1), ("tokens", 1), ("all", 1)])
def test_counts_follow_the_config(graphs, name, layers):
    per_layer = {"rope": 2, "attention": 1, "projections": 1, "skip_layer_norm": 2}
    fired = graphs(name).fusions
    assert fired == {key: count * layers for key, count in per_layer.items()}


def _reference(folders: Any, name: str, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    model = load_model(folders[name], task=OPTIONS[name]["task"])
    with torch.no_grad():
        outputs = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True, return_dict=True
        )
    logits = outputs.logits.numpy() if "logits" in outputs else None
    return outputs.hidden_states[-1].numpy(), logits


@pytest.mark.parametrize("name", ["mlm", "embed", "cls", "rerank", "tokens", "all"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 17), (4, 1), (3, 33), (2, 512)])
def test_equals_transformers_at_every_shape(graphs, folders, name, rows, tokens):
    rng = np.random.default_rng(tokens)
    ids = rng.integers(5, 256, (rows, tokens))
    mask = (np.arange(tokens) < np.maximum(1, tokens - 3 * np.arange(rows))[:, None]).astype(np.int64)
    positions = np.stack([np.arange(rows), mask.sum(1) - 1], axis=1)
    hidden, logits = _reference(folders, name.split()[0], ids, mask)
    found_hidden, found = run(graphs(name), ids, mask, positions)

    real = mask.astype(bool)
    np.testing.assert_allclose(found_hidden[real], hidden[real], rtol=0, atol=1e-4)
    if name == "mlm":
        logits = logits[positions[:, 0], positions[:, 1]]
    if name in ("tokens", "all"):
        found, logits = found[real], logits[real]
    if name == "embed":
        logits = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    if name == "cls":
        logits = hidden[:, 0]
    # Two FP32 runs of these ill-conditioned random models differ from float64 by up to 1.2e-4 each.
    np.testing.assert_allclose(found, logits, rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", ["mlm plain", "mlm", "embed", "cls"])
def test_row_without_tokens_is_finite_and_harms_no_other(graphs, name):
    ids = np.random.default_rng(0).integers(5, 256, (3, 20))
    mask = np.ones_like(ids)
    mask[1] = 0
    outputs = run(graphs(name), ids, mask, [[1, 3]])
    assert all(np.isfinite(output).all() for output in outputs)
    if name == "embed":
        assert not outputs[1][1].any(), "the mean of no token is the zero vector"
    np.testing.assert_allclose(outputs[0][2], run(graphs(name), ids[2:], mask[2:])[0][0], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["mlm plain", "mlm"])
def test_no_masks_gives_no_logits(graphs, name):
    hidden, logits = run(graphs(name), np.full((2, 9), 7), mask_positions=[])
    assert hidden.shape == (2, 9, 32)
    assert logits.shape == (0, 256)


@pytest.mark.parametrize("position", [(0, 9), (2, 0)])
def test_a_mask_outside_the_batch_is_an_error(graphs, position):
    with pytest.raises(Exception, match="(?i)out of bounds|invalid index"):
        run(graphs("mlm"), np.full((2, 9), 7), mask_positions=[position])


def test_head_runs_on_masked_rows_only(graphs):
    """Every node between the gather and the logits has as many rows as there are masks."""
    model = graphs("mlm").model
    gather = next(node for node in model.graph if node.op_type == "GatherND")
    assert [value.name for value in gather.inputs] == ["last_hidden_state", "mask_positions"]
    logits, value = by_name(model.graph.outputs, "logits"), gather.outputs[0]
    path = []
    while value is not logits:
        node = value.consumers()[0]
        path.append(node.op_type)
        value = node.outputs[0]
    assert path == ["Gemm", "Gelu", "LayerNormalization", "Gemm"]


def test_decoder_shares_the_embedding_matrix(graphs):
    model = graphs("mlm").model
    gather = next(node for node in model.graph if node.op_type == "Gather")
    decoder = [node for node in model.graph if node.op_type == "Gemm"][-1]
    assert decoder.inputs[1] is gather.inputs[0]


def test_longer_than_max_length_is_an_error(graphs):
    with pytest.raises(Exception, match="RotaryEmbedding|rotary"):
        run(graphs("mlm"), np.full((1, 8193), 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlm", "embed"])
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_equals_transformers_on_long_rows(graphs, folders, name, tokens):
    ids = np.random.default_rng(tokens).integers(5, 256, (1, tokens))
    hidden, _ = _reference(folders, name.split()[0], ids, np.ones_like(ids))
    np.testing.assert_allclose(run(graphs(name), ids)[0], hidden, rtol=0, atol=LONG_ATOL)


def save_both(graphs: Callable[[str], Graph], folder: Path) -> list[Path]:
    folder.mkdir()
    paths = {folder / "model.onnx": graphs("mlm"), folder / "model_openvino.onnx": graphs("mlm plain")}
    return save_graphs(paths, folder / "model.onnx_data")


def test_saved_files_are_the_same_each_time_and_readable_by_others(graphs, tmp_path):
    digests = set()
    for folder in (tmp_path / "first", tmp_path / "second"):
        written = save_both(graphs, folder)
        assert [path.name for path in written] == ["model.onnx", "model.onnx_data", "model_openvino.onnx"]
        assert sorted(folder.iterdir()) == written
        assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o644}
        digests.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in written))
    assert len(digests) == 1


def test_the_graphs_of_both_engines_share_their_weights(graphs, tmp_path):
    fused, data, plain = save_both(graphs, tmp_path / "both")
    places = []
    for path in (fused, plain):
        tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
        external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        assert {tensor.location for tensor in external} == {data.name}
        assert all(tensor.offset % 4096 == 0 for tensor in external), "engines map what begins on a page"
        assert all(tensor.nbytes < 256 for tensor in tensors if tensor not in external)
        places.append({(tensor.offset, tensor.length) for tensor in external})
    assert places[0] == places[1]
    *_, (offset, length) = sorted(places[0])
    assert data.stat().st_size == offset + length


def test_a_saved_graph_computes_what_it_did(graphs, tmp_path):
    save_graph(graphs("embed"), tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.full((1, 5), 9)
    np.testing.assert_array_equal(
        session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0], run(graphs("embed"), ids)[0]
    )


def test_a_failed_write_leaves_the_old_file(graphs, tmp_path, monkeypatch):
    old = {"model.onnx": b"old", "model.onnx_data": b"old weights"}
    for name, contents in old.items():
        (tmp_path / name).write_bytes(contents)

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_module, "sync_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_graph(graphs("embed"), tmp_path / "model.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_error_of_a_pass_reaches_the_caller(graphs, monkeypatch):
    """A config with another number of layers than the traced graph has."""
    model = ir.from_proto(ir.to_proto(graphs("mlm plain").model))
    with pytest.raises(ExportError, match="6 sites"):
        fuse_graph(model, sites=GTE.sites(GteConfig(num_hidden_layers=3)))

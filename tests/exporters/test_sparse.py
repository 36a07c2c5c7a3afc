"""Graphs of sparse models: the vocabulary in parts, stored once; in 8 bits; for CUDA and TensorRT; what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pooling_module = pytest.importorskip("sentence_transformers.sparse_encoder.modules")

import torch  # noqa: E402
from transformers import GteConfig  # noqa: E402

from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.onnxruntime import OnnxBackend  # noqa: E402
from gte_deploy.core.errors import ExportError, InputError  # noqa: E402
from gte_deploy.core.spec import ModelSpec, SparseSpec  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.graph.build import Graph, build_graphs, save_graph, save_graphs  # noqa: E402
from gte_deploy.exporters.graph.linear_layers import find_linear_layers  # noqa: E402
from gte_deploy.exporters.quantization.calibration import measure_ranges  # noqa: E402
from gte_deploy.exporters.quantization.int8 import int8_scheme, quantize_int8  # noqa: E402
from gte_deploy.exporters.quantization.recipes import groups_of  # noqa: E402
from gte_deploy.exporters.targets.cuda.graph import cuda_graph, opened_for_comparison  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.graph import tensorrt_graph  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.layouts import PADDING_FREE  # noqa: E402
from gte_deploy.models import sparse_heads  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.families.gte import GTE  # noqa: E402

LENGTH, VOCAB = 64, 256
SPARSE = SparseSpec("splade", activation="log1p_relu")
SPEC = ModelSpec("sparse", LENGTH, VOCAB, 32, 0, sparse=SPARSE)
PARTS = 3
SITES = GTE.sites(GteConfig(num_hidden_layers=1))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_heads, "PART", 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Heads of 16: TensorRT's fused attention has no smaller ones.
    folder = make_checkpoint(tmp_path_factory.mktemp("sparse") / "mlm", layers=1, heads=2, seed=9)
    return load_model(folder, task="fill-mask")


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    mask = (np.arange(20) < np.array([[20], [11], [1]])).astype(np.int64)
    return Batch(rng.integers(5, VOCAB, mask.shape) * mask, mask)


@pytest.fixture(scope="module")
def graphs_of(model: Any) -> Callable[[SparseSpec], dict[str, Graph]]:
    """`graphs_of(sparse)`: engine -> graph, a copy to be altered; traced once."""
    built: dict[SparseSpec, dict[str, Graph]] = {}

    def get(sparse: SparseSpec) -> dict[str, Graph]:
        if sparse not in built:
            built[sparse] = build_graphs(model, task="sparse", max_length=LENGTH, sparse=sparse)
        return {name: replace(graph, model=graph.model.clone()) for name, graph in built[sparse].items()}

    return get


def expected(model: Any, batch: Batch, sparse: SparseSpec) -> np.ndarray:
    """transformers' logits of every token, pooled by sentence-transformers' own module."""
    mask = torch.from_numpy(batch.attention_mask)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask).logits
        module = pooling_module.SpladePooling(sparse.pooling, sparse.activation).eval()
        return module({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"].numpy()


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_both_graphs_in_parts(pooling, activation, graphs_of, model, batch, tmp_path):
    """Their weights lie once in the file, though the word embedding is also the matrix of the parts."""
    sparse = SparseSpec("splade", activation=activation, pooling=pooling)
    graphs = graphs_of(sparse)
    places = {tmp_path / f"{engine}.onnx": graph for engine, graph in graphs.items()}
    save_graphs(places, tmp_path / "weights.data")
    for path in places:
        stored = [external(tensor) for tensor in onnx.load(path, load_external_data=False).graph.initializer]
        (words,) = (place for place in stored if place[1] == VOCAB * 32 * 4)
        inside = [place for place in stored if words[0] <= place[0] < words[0] + words[1] and place != words]
        assert [length for _, length in sorted(inside)] == [rows * 32 * 4 for rows in (100, 100, 56)]
    wanted = expected(model, batch, sparse)
    for engine, path in zip(graphs, places, strict=True):
        found = run(engine, path, batch, "sparse_embedding")
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5, err_msg=engine)
        assert run(engine, path, batch, "last_hidden_state").shape == (3, 20, 32)


def external(tensor: Any) -> tuple[int, int]:
    """Offset and length of a tensor in the file of weights; nothing for one in the graph."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    return int(fields.get("offset", -1)), int(fields.get("length", 0))


def run(engine: str, path: Path, batch: Batch, output: str) -> np.ndarray:
    if engine == "openvino":
        pytest.importorskip("openvino")
        from gte_deploy.backends.openvino import OpenVinoBackend

        backend: Any = OpenVinoBackend(path, SPEC, num_threads=1)
    else:
        backend = OnnxBackend(path, SPEC, num_threads=1)
    try:
        return backend.run(batch, (output,))[output]
    finally:
        backend.close()


def test_parts_in_8_bits(graphs_of, model, batch, tmp_path):
    """Every part is quantized, and a sweep judges them as the one matrix that they are."""
    graphs = graphs_of(SPARSE)
    graph = graphs["onnxruntime"]
    ranges = measure_ranges(graph, SPEC, [batch])
    plan = int8_scheme(graph.model, ranges)
    parts = [name for name in groups_of(graph, plan.excluded) if "decoder" in name]
    assert parts == ["lm_head.decoder"] and len(groups_of(graph, plan.excluded)["lm_head.decoder"]) == PARTS
    high = {linear.name for linear in find_linear_layers(graph.model) if "decoder" not in linear.name}
    wanted = expected(model, batch, SPARSE)
    for engine in ("onnxruntime", "openvino"):
        copy = graphs[engine].model.clone()
        counts = quantize_int8(copy, plan.excluding(high), engine=engine, activations="static")
        assert counts["int8_linears"] == PARTS
        path = tmp_path / f"{engine}.onnx"
        save_graph(type(graph)(copy, {}, graph.opset, graph.inputs, graph.outputs), path)
        found = run(engine, path, batch, "sparse_embedding")
        cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosine.min() > 0.999 and not np.array_equal(found, wanted)


@pytest.mark.parametrize(("precision", "removes", "share"), [("fp32", True, 1e-4), ("fp16", True, 0.02)])
def test_for_cuda(precision, removes, share, graphs_of, model, batch, tmp_path):
    """The CPU's stand-in for what a GPU runs."""
    plain = graphs_of(SPARSE)["openvino"]
    graph = cuda_graph(plain, sites=SITES, precision=precision, removes_padding=removes)
    file = tmp_path / "model.onnx"
    save_graph(graph, file)
    wanted = expected(model, batch, SPARSE)
    with opened_for_comparison({file: graph}, SPEC) as (backend, _):
        found = backend.run(batch, ("sparse_embedding",))["sparse_embedding"]
    assert np.abs(found - wanted).max() < share * np.abs(wanted).max()


def test_for_tensorrt(graphs_of):
    """Standard operators that TensorRT has, none of them with a choice that it lacks."""
    plain = graphs_of(SPARSE)["openvino"]
    graph = tensorrt_graph(plain, "fp16", sites=SITES)
    assert {"ReduceMax", "Where", "Log"} <= {node.op_type for node in graph.model.graph}
    assert not {"ScatterElements", "Loop", "Scan"} & {node.op_type for node in graph.model.graph}
    assert [output.name for output in graph.outputs] == ["sparse_embedding", "last_hidden_state"]
    with pytest.raises(ExportError, match="padding cannot be removed"):
        tensorrt_graph(plain, "fp16", sites=SITES, layout=PADDING_FREE)


@pytest.fixture(scope="module")
def token_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_checkpoint(tmp_path_factory.mktemp("sparse") / "weights", task="token-classify", layers=1)


@pytest.mark.parametrize("options", [{"target": "cuda"}, {"format": "trt"}])
def test_token_weights_on_gpus_are_pooled_by_the_runtime(options, token_weights, tmp_path):
    with pytest.raises(InputError, match="Export it with --task token-classify"):
        export(token_weights, tmp_path / "out", task="sparse", max_length=32, **options)
    assert not (tmp_path / "out").exists()


def test_padding_free_engines_have_no_sparse_head(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "mlm", layers=1)
    with pytest.raises(InputError, match="padding 'remove' is not for task sparse"):
        export(checkpoint, tmp_path / "out", task="sparse", format="trt", padding="remove", max_length=32)


def test_how_must_be_said(model):
    with pytest.raises(ExportError, match="needs a SparseSpec"):
        build_graphs(model, task="sparse", max_length=LENGTH)
    with pytest.raises(ExportError, match="needs a GteForTokenClassification"):
        build_graphs(model, task="sparse", max_length=LENGTH, sparse=SparseSpec("token-weights"))

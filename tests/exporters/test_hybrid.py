"""Exports for the task hybrid: both outputs are compared on every target, and an error in either fails the export."""

import json
from pathlib import Path

import numpy as np
import pytest

import gte_deploy
from factories import make_checkpoint, raise_token_weights
from gte_deploy.core.errors import ExportError, InputError, ParityError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.export import export
from gte_deploy.exporters.graph.build import build_graphs
from gte_deploy.exporters.verification.answers import check_answers
from gte_deploy.exporters.verification.bounds import TOLERANCES
from gte_deploy.exporters.verification.cases import Case
from gte_deploy.exporters.verification.differences import CaseComparison
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.heads import TokenReluHead
from gte_deploy.tasks.hybrid import HYBRID
from runtime_models import TEXTS, make_word_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    make_word_checkpoint(folder, task="token-classify", layers=1, pooling="cls", seed=3, layout="original")
    return raise_token_weights(folder)


def compared(bundle):
    """Engine and precision -> the outputs that every case compares."""
    report = json.loads((Path(bundle) / "report.json").read_text(encoding="utf-8"))["parity"]
    assert report["passed"]
    return {
        (engine["engine"], engine["compute"]): set.intersection(*(set(case["outputs"]) for case in engine["cases"]))
        for engine in report["engines"]
    }


TARGETS = [
    {"precision": "int8"},
    {"target": "cuda", "precision": "fp16"},
    {"format": "trt", "onnx_only": True, "padding": "remove"},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"target": "openvino"},
            {"precision": "bf16"},
            {"target": "cuda", "precision": "fp32", "padding": "keep"},
            {"format": "trt", "onnx_only": True, "precision": "int8"},
            {"format": "trt"},
        )
    ),
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_every_target_compares_both_outputs(options, checkpoint, tmp_path):
    if options.get("format") == "trt" and not options.get("onnx_only"):
        pytest.importorskip("tensorrt_rtx")
    export(checkpoint, tmp_path / "bundle", task="hybrid", max_length=64, **options)
    found = compared(tmp_path / "bundle")
    assert found and all(names == set(HYBRID.outputs) for names in found.values())


def test_int8_answers_stay_near(checkpoint, bundle_of):
    # Without VNNI, sums of products overflow 16 bits unless weights have 7 bits.
    bundle = bundle_of(checkpoint, task="hybrid", precision="int8", reduce_range=True)
    with gte_deploy.load(checkpoint, backend="torch", task="hybrid") as model:
        expected = model.encode_hybrid(list(TEXTS))
    for backend in ("onnx", "openvino"):
        with gte_deploy.load(bundle, backend=backend, num_threads=1) as model:
            found = model.encode_hybrid(list(TEXTS))
        pairs = [*zip(found.dense, expected.dense, strict=True)]
        pairs += [(a.to_dense(), b.to_dense()) for a, b in zip(found.sparse, expected.sparse, strict=True)]
        for ours, theirs in pairs:
            norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
            assert (norms == 0 and (ours == theirs).all()) or ours @ theirs / norms > 0.98


def test_no_graph_scatters(checkpoint):
    """One weight for each token: GPUs run it too."""
    model = load_model(checkpoint, task="token-classify")
    spec = gte_deploy.models.description.describe(checkpoint, task="hybrid").spec
    for graph in build_graphs(model, task="hybrid", max_length=32, pooling="cls", sparse=spec.sparse).values():
        assert [output.name for output in graph.outputs] == list(HYBRID.outputs)
        assert not any("Scatter" in node.op_type for node in graph.model.graph)
    with pytest.raises(ExportError, match="needs a SparseSpec"):
        build_graphs(model, task="hybrid", max_length=32, pooling="cls")
    with pytest.raises(ExportError, match="hybrid needs one"):
        build_graphs(model, task="hybrid", max_length=32, sparse=spec.sparse)


def test_an_engine_of_answers_alone_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="task hybrid needs the last layer's states of every token"):
        export(checkpoint, tmp_path / "out", task="hybrid", format="trt", outputs="answer", onnx_only=True)


@pytest.mark.parametrize("name", ["sentence_embedding", "token_weights"])
def test_a_wrong_output_misses_the_bounds(name):
    """The comparison of a batch, with one output off by 2 %."""
    spec = ModelSpec("hybrid", 32, 128, 8, 0, pooling="cls")
    random = np.random.default_rng(0)
    right = {
        "last_hidden_state": random.normal(size=(2, 4, 8)).astype(np.float32),
        "sentence_embedding": random.normal(size=(2, 8)).astype(np.float32),
        "token_weights": random.uniform(size=(2, 4, 1)).astype(np.float32),
    }
    wrong = {**right, name: right[name] + np.float32(0.02)}

    class Side:
        def __init__(self, outputs):
            self.outputs = outputs

        def run(self, batch, outputs):
            return {name: self.outputs[name][: len(batch.input_ids)] for name in outputs}

    batch = gte_deploy.backends.base.Batch(np.ones((2, 4), np.int64), np.ones((2, 4), np.int64))
    case = Case(length=4, batch=2, ragged=False)
    comparison = CaseComparison(HYBRID.outputs, spec)
    expected = comparison.reference(Side(right), case, batch)
    scales = {output: comparison.scales.of(output) for output in HYBRID.outputs}
    for outputs, passes in ((right, True), (wrong, False)):
        run = comparison.candidate(Side(outputs), case, batch, expected).over(scales)
        assert run.within(TOLERANCES["fp32"]) == passes
        assert run.outputs[name].within(TOLERANCES["fp32"]) == passes


def test_wrong_weights_differ_from_the_checkpoints_own_library(checkpoint, monkeypatch, tmp_path):
    """The reference of parity shares the head with the tracer, so only transformers can find an error in the head."""
    right = TokenReluHead.__call__
    monkeypatch.setattr(TokenReluHead, "__call__", lambda self, states: right(self, states) * 1.5)
    with pytest.raises(ParityError, match="token_weights"):
        export(checkpoint, tmp_path / "out", task="hybrid", target="openvino", max_length=64)


@pytest.mark.parametrize("pooling", ["cls", None])
def test_answers_against_both_libraries(pooling, tmp_path):
    """With modules.json SentenceTransformer judges the dense half, and transformers the weights in any case."""
    pytest.importorskip("sentence_transformers")
    prompts = {"query": "w7 w8 "} if pooling else None
    folder = make_checkpoint(
        tmp_path / "model", task="token-classify", layers=1, max_positions=64, pooling=pooling, prompts=prompts
    )
    with gte_deploy.load(raise_token_weights(folder), backend="torch", task="hybrid") as model:
        check = check_answers(folder, model)
        assert check.passed and check.skipped == ()
        named = "GteForTokenClassification and SentenceTransformer" if pooling else "GteForTokenClassification of"
        assert check.compared["library"].startswith(named)
        assert check.compared["answers"] > 20

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest

from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import Graph, build_graphs
from gte_deploy.exporters.job import EVALUATION_TOKENS
from gte_deploy.exporters.quantization import recipes as lower_precision
from gte_deploy.exporters.quantization.recipes import groups_of, quantize_graphs
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, AccuracyBounds
from gte_deploy.exporters.verification.texts import builtin_texts, calibration_texts, text_batches, texts_left_out
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.checkpoint import load_model
from gte_deploy.text.tokenization import load_tokenizer

SPEC = ModelSpec(task="fill-mask", max_length=256, vocab_size=30528, hidden_size=256, pad_token_id=0)


@pytest.fixture(scope="module")
def tiny() -> dict[Any, Graph]:
    return build_graphs(load_model(resolve_checkpoint(None), task="fill-mask"), task="fill-mask", max_length=256)


@pytest.fixture
def quantize(tiny, monkeypatch) -> Callable[..., Any]:
    monkeypatch.setattr(lower_precision, "CALIBRATION_TOKENS", 1200)
    monkeypatch.setattr(lower_precision, "SWEEP_TOKENS", 400)
    tokenizer = load_tokenizer(resolve_checkpoint(None))

    def run(precision="int8", **options):
        lines: list[str] = []
        options.setdefault("graphs", tiny)
        graphs = options.pop("graphs")
        return quantize_graphs(
            graphs, precision, spec=SPEC, tokenizer=tokenizer, progress=lines.append, **options
        ), lines

    return run


def counts(graph):
    return {name: count for name, count in graph.fusions.items() if "linears" in name or "embeddings" in name}


def test_the_trained_model_needs_no_layer_in_fp32(quantize):
    made, lines = quantize()
    assert set(made.graphs) == {"onnxruntime", "openvino"}
    for graph in made.graphs.values():
        assert counts(graph) == {"int8_linears": 29, "fp32_linears": 1, "int8_embeddings": 1}
    assert not made.sweep.excluded and not ACCURACY_BOUNDS["int8"].missed(made.sweep.accuracy)
    assert len(lines) == 1 and lines[0].startswith("calibrate on")


def test_the_most_sensitive_layers_stay_high_where_a_bound_is_missed(quantize, tiny, monkeypatch):
    bounds = AccuracyBounds(cosine_mean=0.9998, top1_agreement=0.5)
    monkeypatch.setitem(lower_precision.ACCURACY_BOUNDS, "int8", bounds)
    made, lines = quantize(graphs={"onnxruntime": tiny["onnxruntime"]})
    worst = next(iter(made.sweep.loss))
    assert worst.endswith("mlp.down_proj") and f"{worst}.weight" in made.sweep.excluded
    assert not bounds.missed(made.sweep.accuracy)
    found = counts(made.graphs["onnxruntime"])
    assert found["fp32_linears"] == 1 + len(made.sweep.excluded) and found["int8_linears"] > 10
    groups = groups_of(tiny["onnxruntime"], ())
    high = [group for group in made.sweep.loss if made.sweep.excluded.issuperset(groups.get(group, [group]))]
    assert high == list(made.sweep.loss)[: len(high)]
    assert lines[-1].endswith(f"stay in a higher precision: {', '.join(high)}")


def test_a_model_that_cannot_be_int8_is_told_why(quantize, tiny, monkeypatch):
    monkeypatch.setitem(lower_precision.ACCURACY_BOUNDS, "int8", AccuracyBounds(cosine_mean=1 - 1e-9, top1_agreement=0))
    made, _ = quantize(graphs={"onnxruntime": tiny["onnxruntime"]})
    assert counts(made.graphs["onnxruntime"])["int8_linears"] == 0
    message = made.sweep.failure
    assert "int8 misses its bounds with this model" in message and "No bundle was written" in message
    assert "mlp.down_proj loses" in message and "× the median" in message
    assert "Other calibration texts do not help" in message and "int8-weight" in message


def test_what_only_random_tokens_miss_asks_for_more_calibration_texts(quantize, tiny, monkeypatch):
    """Their values lie outside of the ranges that the calibration texts gave."""
    missed = types.SimpleNamespace(failures=lambda: ["length 17: smallest cosine 0.5"])
    monkeypatch.setattr(lower_precision, "check_parity", lambda *arguments: missed)
    made, _ = quantize(graphs={"onnxruntime": tiny["onnxruntime"]})
    failure = made.finer().sweep.failure
    assert "on random tokens: length 17: smallest cosine 0.5" in failure
    assert "calibrate on more texts like those that will be served" in failure


def test_a_users_texts_decide_the_ranges(quantize, tiny, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(f"{'zebra ' * 30}\n12345 67890\n", encoding="utf-8")
    texts = calibration_texts(load_tokenizer(resolve_checkpoint(None)), SPEC.vocab_size, file=own)
    made, lines = quantize(calibration=texts, graphs={"onnxruntime": tiny["onnxruntime"]})
    ours, _ = quantize(graphs={"onnxruntime": tiny["onnxruntime"]})

    def scales(graph):
        values = graph.model.graph.initializers.items()
        return [value.const_value.numpy().item() for name, value in values if name.endswith("quantized.scale")]

    assert len(scales(made.graphs["onnxruntime"])) == 17
    assert scales(made.graphs["onnxruntime"]) != scales(ours.graphs["onnxruntime"])
    assert lines[0].endswith("tokens of your texts in own.txt")


@pytest.mark.parametrize(("precision", "name"), [("int8-weight", "int8_linears"), ("int4-weight", "int4_linears")])
def test_weight_only_graphs_are_for_onnxruntime(quantize, precision, name):
    made, _ = quantize(precision)
    assert list(made.graphs) == ["onnxruntime"] and made.sweep is None
    assert counts(made.graphs["onnxruntime"]) == {name: 29, "int8_embeddings": 1}


def test_the_fp32_graphs_are_left_alone(quantize, tiny):
    before = [node.op_type for node in tiny["onnxruntime"].model.graph]
    quantize("int4-weight")
    assert [node.op_type for node in tiny["onnxruntime"].model.graph] == before


def test_the_sweep_and_the_verdict_read_different_texts():
    spec = dataclasses.replace(SPEC, task="embed", pooling="mean", max_length=8192)
    tokenizer = load_tokenizer(resolve_checkpoint(None))
    texts = [text for text in builtin_texts("evaluation") if text]
    left_out = texts_left_out(texts, tokenizer, max_tokens=EVALUATION_TOKENS)
    read = {
        tuple(row[mask.astype(bool)].tolist())
        for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=EVALUATION_TOKENS)
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    }
    rows = dict(zip(texts, tokenizer.encode_texts(texts, max_length=8192, truncation=True), strict=True))
    assert {text for text, row in rows.items() if tuple(row) not in read} == set(left_out)
    assert sum(len(rows[text]) for text in left_out) > 3000


def test_layers_that_share_an_input_are_judged_together(tiny):
    groups = groups_of(tiny["openvino"], ())
    layer = "gte.layers.0"
    assert groups[f"{layer}.self_attn.qkv"] == [f"{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"]
    assert len(groups[f"{layer}.mlp.up_gate"]) == 2
    assert len(groups) == 4 * 4 + 2

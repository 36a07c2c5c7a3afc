"""A family with biased scores: its models are exported with unfused attention, and never run without padding."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import gte_deploy  # noqa: E402
from factories import SPELLING  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.torch import TorchBackend  # noqa: E402
from gte_deploy.core.errors import ConfigError, ExportError  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.graph import fusion  # noqa: E402
from gte_deploy.exporters.graph.trace import trace  # noqa: E402
from gte_deploy.exporters.verification.reference import TorchReference  # noqa: E402
from gte_deploy.models.checkpoint import load_model, save_model  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from loading import load_file  # noqa: E402

LAYERS, HEADS, LENGTH, LABELS = 2, 4, 40, ("other", "place", "river")


@pytest.fixture(scope="module")
def network() -> Iterator[Any]:
    """The classes, which transformers has for as long as the tests of this file run."""
    found = load_file(Path(__file__).with_name("alibi_network.py"), "alibi_network")
    # transformers puts a new module in its own place when it is first used.
    current = sys.modules["transformers"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AlibiConfig", "AlibiModel", "AlibiForTokenClassification"):
            patch.setattr(current, name, getattr(found, name), raising=False)
        config = found.AlibiConfig
        transformers.AutoConfig.register("alibi", config)
        mappings = transformers.models.auto.modeling_auto
        transformers.AutoModel.register(config, found.AlibiModel)
        transformers.AutoModelForTokenClassification.register(config, found.AlibiForTokenClassification)
        yield found
    transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop("alibi")
    for mapping in (mappings.MODEL_MAPPING, mappings.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING):
        mapping._extra_content.pop(config)


@pytest.fixture(scope="module")
def checkpoint(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random token classifier with its tokenizer, saved by transformers itself."""
    folder = tmp_path_factory.mktemp("alibi")
    torch.manual_seed(0)
    config = network.AlibiConfig(
        vocab_size=len(SPELLING),
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
        id2label=dict(enumerate(LABELS)),
        # Far from the tiny weights of a fresh model, whose scores the biases would drown.
        initializer_range=0.4,
    )
    network.AlibiForTokenClassification(config).save_pretrained(folder)
    tokenizer = transformers.BertTokenizer({word: i for i, word in enumerate(SPELLING)}, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def alibi(network: Any, register_family: Any) -> Any:
    """The family, registered."""
    return register_family("alibi", "ALIBI")


@pytest.fixture
def ragged_batch() -> Batch:
    """Rows of 11 and 5 tokens."""
    ids = np.zeros((2, 11), np.int64)
    ids[0], ids[1, :5] = np.arange(5, 16), (2, 60, 61, 62, 3)
    return Batch(ids, (ids != 0).astype(np.int64))


def test_biases_alone_make_the_order_of_tokens(alibi, checkpoint, network, monkeypatch):
    """Without them a model gives a token the same state in two orders of its neighbours."""
    model = load_model(checkpoint, task="embed")
    one, other = torch.tensor([[2, 60, 61, 62, 3]]), torch.tensor([[2, 62, 61, 60, 3]])
    with torch.inference_mode():
        states = [model(ids).last_hidden_state[0, 2] for ids in (one, other)]
        assert (states[0] - states[1]).abs().max() > 1e-2
        monkeypatch.setattr(network, "slopes", torch.zeros)
        states = [model(ids).last_hidden_state[0, 2] for ids in (one, other)]
    torch.testing.assert_close(*states)


@pytest.mark.parametrize(("passes", "fused"), [("PASSES", LAYERS), ("STANDARD_PASSES", LAYERS), ("MERGED_PASSES", 0)])
def test_biased_attention_is_fused_for_cpus(alibi, checkpoint, passes, fused):
    model = load_model(checkpoint)
    graph = trace(model, task="token-classify", max_length=LENGTH, pooling=None, logits="masked", opset=20)
    fired = fusion.fuse_graph(graph.clone(), sites=alibi.sites(model.config), passes=getattr(fusion, passes))
    assert fired.get("alibi_attention", 0) == fused
    assert fired.keys() <= {"alibi_attention", "skip_layer_norm"}
    if passes != "STANDARD_PASSES":
        with pytest.raises(ExportError, match=r"'attention' fired 0 times.*the mask .* not \[batch, 1, 1, sequence\]"):
            fusion.fuse_graph(graph, sites={"attention": LAYERS}, passes=[fusion.ATTENTION])


def test_packed_rows_are_refused_by_name(alibi, checkpoint, ragged_batch):
    spec = describe(checkpoint).spec
    with pytest.raises(ConfigError, match="model_type 'alibi' have alibi positions, which attention without padding"):
        TorchBackend(load_model(checkpoint), spec, packed=True)
    backend = TorchBackend(load_model(checkpoint), spec)
    alone = Batch(ragged_batch.input_ids[1:, :5], ragged_batch.attention_mask[1:, :5])
    found = backend.run(ragged_batch, ["logits"])["logits"][1:, :5]
    np.testing.assert_allclose(found, backend.run(alone, ["logits"])["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("target", [{"target": "cuda"}, {"format": "trt", "onnx_only": True}])
def test_an_export_without_padding_is_refused_by_name(alibi, checkpoint, tmp_path, target, monkeypatch):
    monkeypatch.setattr("gte_deploy.models.checkpoint.load_described", None)  # it is refused before that
    with pytest.raises(ExportError, match="'alibi', which have alibi positions: .*Export with padding='keep'"):
        export(checkpoint, tmp_path / "bundle", precision="fp16", padding="remove", **target)
    assert not (tmp_path / "bundle").exists()


def test_the_reference_knows_the_terms_of_the_head_under_its_name(alibi, checkpoint, ragged_batch):
    model = load_model(checkpoint)
    reference = TorchReference(model, task="token-classify", pooling="mean", logits="masked")
    hidden = reference.run(ragged_batch, ())["last_hidden_state"].astype(np.float64)
    weight, bias = (getattr(model.scorer, name).detach().double().numpy() for name in ("weight", "bias"))
    expected = np.sqrt((hidden**2) @ (weight**2).T + bias**2).reshape(-1, len(LABELS)).max(axis=0)
    np.testing.assert_allclose(reference.terms["logits"], expected, rtol=1e-6)


def test_a_head_of_several_layers_has_no_known_terms(alibi, checkpoint, ragged_batch):
    model = load_model(checkpoint)
    model.scorer = torch.nn.Sequential(model.scorer, torch.nn.Tanh())
    reference = TorchReference(model, task="token-classify", pooling="mean", logits="masked")
    assert np.abs(reference.run(ragged_batch, ())["logits"]).max() <= 1 and reference.terms == {}


@pytest.mark.parametrize(
    "target", [{}, {"target": "cuda", "precision": "fp16"}, {"target": "cuda", "precision": "fp32", "padding": "keep"}]
)
def test_a_bundle_answers_as_transformers_does(alibi, checkpoint, tmp_path, target):
    result = export(checkpoint, tmp_path / "bundle", max_length=32, **target)
    assert result.parity.passed
    fusions = result.manifest.graphs["onnxruntime"].fusions
    wanted = {"skip_layer_norm": 2 * LAYERS, **({} if target else {"alibi_attention": LAYERS})}
    assert {name: count for name, count in fusions.items() if name != "half_weights"} == wanted
    config = transformers.AutoConfig.from_pretrained(result.path)
    assert config.max_position_embeddings == 32, "no table of positions keeps it longer"
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint, config=config).eval()
    if target:
        return
    (check,) = result.parity.checks
    assert check.passed and check.compared["answers"] > 0 and not check.skipped
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.path)
    pipe = transformers.pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")
    expected = pipe(text := "the river is old and the city is old.")
    with gte_deploy.load(result.path) as ours:
        found = ours.classify_tokens(text)
    assert [answer["index"] for answer in found] == [answer["index"] for answer in expected]
    assert [answer["entity"] for answer in found] == [answer["entity"] for answer in expected]
    np.testing.assert_allclose(
        [answer["score"] for answer in found], [answer["score"] for answer in expected], rtol=1e-4
    )


def test_save_and_load_are_inverse(alibi, checkpoint, tmp_path):
    model = load_model(checkpoint)
    save_model(model, tmp_path, layout="native")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["AlibiForTokenClassification"]
    own = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and torch.equal(own.state_dict()[name], tensor), name

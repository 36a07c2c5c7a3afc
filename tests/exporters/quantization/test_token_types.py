"""INT8 of a pair classifier with two token types, grown from the shipped encoder: labels and logits of CrossEncoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import gte_deploy  # noqa: E402
from gte_deploy.exporters import export as export_module  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.models import resolve_checkpoint  # noqa: E402
from gte_deploy.models.checkpoint import copy_tokenizer, load_model  # noqa: E402

WORDS = "the president congress of a law that states may pass in time of war and peace with foreign powers".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GteConfig, GteForSequenceClassification

    folder = tmp_path_factory.mktemp("int8") / "checkpoint"
    source = load_model(resolve_checkpoint(None), task="fill-mask")
    config = GteConfig.from_dict({**source.config.to_dict(), "type_vocab_size": 2, "num_labels": 3})
    torch.manual_seed(0)
    model = GteForSequenceClassification(config)
    model.gte.load_state_dict(source.gte.state_dict(), strict=False)
    with torch.no_grad():
        rows = model.gte.embeddings.token_type_embeddings.weight
        rows.copy_(torch.randn_like(rows) * source.gte.embeddings.word_embeddings.weight.std())
        for layer in (model.gte.pooler.dense, model.classifier):
            layer.weight.normal_(std=layer.weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    copy_tokenizer(resolve_checkpoint(None), folder)
    file = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    return folder


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [tuple(" ".join(rng.choice(WORDS, rng.integers(1, 25))) for _ in range(2)) for _ in range(40)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, pairs: Any) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    return np.asarray(CrossEncoder(str(checkpoint), device="cpu").predict(pairs))


@pytest.fixture(scope="module")
def int8(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "EVALUATION_TOKENS", 1500)
        return export(checkpoint, tmp_path_factory.mktemp("int8") / "bundle", precision="int8", max_length=64).path


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_labels_and_logits_of_pairs(int8, checkpoint, pairs, expected, engine):
    with gte_deploy.load(int8, backend=engine, num_threads=1) as model:
        found = model.predict(pairs)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 0.05 * scale
    sure = np.diff(np.sort(expected, axis=1)[:, -2:], axis=1)[:, 0] > 0.1 * scale
    assert sure.sum() >= 20
    np.testing.assert_array_equal(found.argmax(1)[sure], expected.argmax(1)[sure])


def test_types_matter_more_than_int8(checkpoint, pairs, expected):
    """Else the comparison above would pass without them."""
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(checkpoint)(*map(list, zip(*pairs, strict=True)), padding=True)
    model = load_model(checkpoint, task="classify").eval()
    inputs = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        without = model(**inputs).logits.numpy()
    assert np.abs(without - expected).max() > 0.2 * np.abs(expected).max()

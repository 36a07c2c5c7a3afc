"""Repositories of models that tell types of tokens apart: every ensemble answers what transformers answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gte_deploy  # noqa: E402
from gte_deploy.bundle.manifest import read_manifest  # noqa: E402
from gte_deploy.exporters.triton.checks import check_repository  # noqa: E402
from gte_deploy.exporters.triton.repository import _require_equal, export_repository  # noqa: E402
from runtime_models import make_word_checkpoint  # noqa: E402
from triton_emulation import Repository  # noqa: E402

FIRST, SECOND = ["the king", "a", "water"], ["a queen of france", "the old house " * 7, ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("typed") / "checkpoint"
    options = {"task": "classify", "num_labels": 3, "type_vocab_size": 2, "layers": 1, "seed": 2}
    return make_word_checkpoint(folder, **options)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint)


@pytest.fixture(scope="module")
def path(bundle: Path, tmp_path_factory: Any) -> Path:
    return export_repository(bundle, tmp_path_factory.mktemp("typed") / "repository", threads=1).path


def by_transformers(checkpoint: Path, *texts: list[str]) -> np.ndarray:
    from transformers import AutoTokenizer, GteForSequenceClassification

    encoded = AutoTokenizer.from_pretrained(checkpoint)(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return GteForSequenceClassification.from_pretrained(checkpoint).eval()(**encoded).logits.numpy()


def test_pairs_and_single_texts(path, checkpoint):
    repository = Repository(path, "cpu")
    requests = [{"TEXT": FIRST, "TEXT_PAIR": SECOND}, {"TEXT": FIRST}, {"TEXT": FIRST[:1], "TEXT_PAIR": FIRST[1:2]}]
    pairs, singles, other = repository.ask("gte_rerank", *requests)
    np.testing.assert_allclose(pairs["LOGITS"], by_transformers(checkpoint, FIRST, SECOND), atol=1e-4)
    np.testing.assert_allclose(singles["LOGITS"], by_transformers(checkpoint, FIRST), atol=1e-4)
    np.testing.assert_allclose(other["LOGITS"], by_transformers(checkpoint, FIRST[:1], FIRST[1:2]), atol=1e-4)
    assert len(repository.runs) < len(requests), "the batcher joined some"


def test_wrong_types_fail_alone(path):
    ids, mask, types = np.array([[2, 40, 3, 41, 3]]), np.ones((1, 5), np.int64), np.array([[0, 0, 0, 1, 1]])
    repository = Repository(path, "cpu")
    requests = [
        {"INPUT_IDS": ids, "ATTENTION_MASK": mask, "TOKEN_TYPE_IDS": given} for given in (types, types + 9, -types)
    ]
    (alone,) = repository.ask("gte_rerank_ids", requests[0])
    first, *others = repository.ask("gte_rerank_ids", *requests)
    np.testing.assert_allclose(first["LOGITS"], alone["LOGITS"], atol=1e-6)
    assert all(np.isfinite(answer["LOGITS"]).all() for answer in others)


def test_states_of_tokens_come_with_their_types(path, bundle):
    (answer,) = Repository(path, "cpu").ask("gte_token_embed", {"TEXT": FIRST})
    with gte_deploy.load(bundle, num_threads=1) as model:
        for row, wanted in enumerate(model.encode(FIRST, output_value=None)):
            length = len(wanted["input_ids"])
            np.testing.assert_array_equal(answer["TOKEN_TYPE_IDS"][row, :length], wanted["token_type_ids"])
            np.testing.assert_allclose(answer["TOKEN_EMBEDDINGS"][row, :length], wanted["token_embeddings"], atol=1e-5)
        (embedded,) = Repository(path, "cpu").ask("gte_embed", {"TEXT": FIRST})
        np.testing.assert_allclose(embedded["EMBEDDING"], model.encode(FIRST), atol=1e-5)


def test_every_configuration_names_the_types(path):
    assert check_repository(path) == []
    for variant in (None, "cpu"):
        repository = Repository(path, variant)
        encoder = repository.config("gte_encoder")
        inputs = ["input_ids", "attention_mask", "token_type_ids"]
        assert [tensor.name for tensor in encoder.input] == inputs
        assert [tensor.name for tensor in repository.config("gte_tokenizer").output] == inputs
        for sample in encoder.model_warmup:
            value = sample.inputs["token_type_ids"]
            data = (path / "gte_encoder" / "warmup" / value.input_data_file).read_bytes()
            types = np.frombuffer(data, np.int64)
            assert len(types) == value.dims[0] and 0 <= types.min() and types.max() < 2


def test_a_graph_that_forgets_its_types_is_found(bundle, path, tmp_path):
    import onnx

    from gte_deploy.core.errors import ParityError

    spec = read_manifest(bundle).spec
    source, served = bundle / "onnx" / "model.onnx", next(path.glob("gte_encoder/1/model.onnx"))
    _require_equal(source, served, spec)
    model = onnx.load(served)
    table = next(node for node in model.graph.node if "token_type_ids" in node.input)
    index = list(table.input).index("token_type_ids")
    model.graph.node.insert(
        0, onnx.helper.make_node("Sub", ["token_type_ids", "token_type_ids"], ["no_types"], "forget")
    )
    table.input[index] = "no_types"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="model.onnx differs from"):
        _require_equal(source, tmp_path / "model.onnx", spec)


def test_models_without_types_keep_their_tensors(repositories):
    for task in ("embed", "classify", "token-classify"):
        repository = Repository(repositories[task], "cpu")
        assert [tensor.name for tensor in repository.config("gte_encoder").input] == ["input_ids", "attention_mask"]
        outputs = [tensor.name for tensor in repository.config("gte_token_embed").output]
        assert outputs == ["INPUT_IDS", "ATTENTION_MASK", "TOKEN_EMBEDDINGS"]


def test_the_spec_travels_with_the_configuration(path):
    parameters = Repository(path, "cpu").config("gte_embed").parameters
    spec = json.loads(parameters["gte_deploy_spec"].string_value)
    assert (spec["token_types"], spec["type_vocab_size"]) == (True, 2)

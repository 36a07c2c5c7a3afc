"""encode_hybrid: against transformers' classes, against its two halves, and what is refused."""

import json

import numpy as np
import pytest

import gte_deploy
from factories import make_checkpoint
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.cli import main
from gte_deploy.core.spec_json import spec_from_json
from gte_deploy.models.config import task_of
from gte_deploy.tasks.hybrid import HybridEmbedding
from gte_deploy.tasks.sparse import SparseEmbedding
from hybrid_reference import hybrid_reference, make_hybrid_checkpoint

TEXTS = [
    "Paris is the capital of France.",
    "a",
    "",
    "the old man and the [MASK] walked! readable unknownword 中国",
    "the king isn't old. " * 9,
]
BACKENDS = ["torch", "onnx", "openvino"]
TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_hybrid_checkpoint(tmp_path_factory.mktemp("hybrid") / "checkpoint")


@pytest.fixture(scope="module")
def hybrid_on(checkpoint, bundle_of):
    def load(backend, **options):
        if backend == "torch":
            return gte_deploy.load(checkpoint, backend="torch", task="hybrid", **options)
        bundle = bundle_of(checkpoint, task="hybrid")
        return gte_deploy.load(bundle, backend=backend, num_threads=1, **options)

    return load


def assert_same(found, expected):
    np.testing.assert_array_equal(found.dense, expected.dense)
    for ours, theirs in zip(found.sparse, expected.sparse, strict=True):
        np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_transformers(backend, checkpoint, hybrid_on):
    expected = [hybrid_reference(checkpoint, text) for text in TEXTS]
    weights = np.stack([sparse for _, sparse in expected])
    assert (weights > 0).sum() > 8
    with hybrid_on(backend) as model:
        for batch_size in (1, 32):
            found = model.encode_hybrid(TEXTS, batch_size=batch_size)
            np.testing.assert_allclose(found.dense, np.stack([dense for dense, _ in expected]), atol=TOLERANCE)
            sparse = np.stack([each.to_dense() for each in found.sparse])
            np.testing.assert_allclose(sparse, weights, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_halves_are_those_of_other_tasks(backend, checkpoint, hybrid_on, bundle_of):
    """`encode` and `encode_sparse` of the same model, and of models for embed and for token-classify."""
    with hybrid_on(backend) as model:
        whole = model.encode_hybrid(TEXTS)
        np.testing.assert_allclose(model.encode(TEXTS), whole.dense, rtol=0, atol=TOLERANCE)
        assert_same(whole, HybridEmbedding(whole.dense, model.encode_sparse(TEXTS)))
        for task in ("embed", "token-classify"):
            if backend == "torch":
                other = gte_deploy.load(checkpoint, backend="torch", task=task)
            else:
                other = gte_deploy.load(bundle_of(checkpoint, task=task), backend=backend, num_threads=1)
            with other:
                if task == "embed":
                    np.testing.assert_allclose(other.encode(TEXTS), whole.dense, rtol=0, atol=TOLERANCE)
                    continue
                for ours, theirs in zip(whole.sparse, other.encode_sparse(TEXTS), strict=True):
                    np.testing.assert_allclose(ours.to_dense(), theirs.to_dense(), rtol=0, atol=TOLERANCE)


def test_one_pass(hybrid_on):
    """A call runs the engine once for each batch, for both outputs."""
    with hybrid_on("onnx") as model:
        asked, run = [], model._backend.run
        model._backend.run = lambda batch, outputs: asked.append(tuple(outputs)) or run(batch, outputs)
        model.encode_hybrid(TEXTS[:2], batch_size=2)
        assert asked == [("sentence_embedding", "token_weights")]


def test_options(hybrid_on):
    torch = pytest.importorskip("torch")
    with hybrid_on("torch") as model:
        found = model.encode_hybrid(
            TEXTS, "query", truncate_dim=8, normalize_embeddings=True, max_active_dims=2, batch_size=3
        )
        dense = model.encode(TEXTS, "query", truncate_dim=8, normalize_embeddings=True, batch_size=3)
        assert_same(found, HybridEmbedding(dense, model.encode_sparse(TEXTS, "query", max_active_dims=2, batch_size=3)))
        assert found.dense.shape == (len(TEXTS), 8) and max(map(len, found.sparse)) == 2
        assert model.encode_hybrid(TEXTS, precision="ubinary").dense.dtype == np.uint8
        one = model.encode_hybrid(TEXTS[0])
        assert one.dense.shape == (32,) and isinstance(one.sparse, SparseEmbedding)
        assert model.encode_hybrid(TEXTS, as_dict=True).sparse == model.encode_sparse(TEXTS, as_dict=True)
        tensors = model.encode_hybrid(TEXTS, convert_to_tensor=True)
        assert isinstance(tensors.dense, torch.Tensor) and tensors.sparse.layout == torch.sparse_coo
        assert model.encode_query(TEXTS[0]).shape == (32,)  # the dense half, with its prompt
        np.testing.assert_array_equal(model.encode_query(TEXTS[0]), model.encode(TEXTS[0], "query"))
        with pytest.raises(gte_deploy.InputError, match="input 0 has 201 tokens"):
            model.encode_hybrid(["a " * 199])
        assert model.encode_hybrid("a " * 199, truncation=True).dense.shape == (32,)
        with pytest.raises(gte_deploy.InputError, match="ask for one of them"):
            model.encode_hybrid(TEXTS, convert_to_tensor=True, as_dict=True)
        with pytest.raises(gte_deploy.InputError, match="truncate_dim"):
            model.encode_hybrid(TEXTS, truncate_dim=33)
        decoded = model.decode(model.encode_hybrid(TEXTS[0]).sparse)
        assert dict(decoded) == model.encode_sparse(TEXTS[0], as_dict=True)


def test_the_bundle(checkpoint, bundle_of):
    manifest = read_manifest(bundle_of(checkpoint, task="hybrid"))
    assert task_of(checkpoint) == "embed"  # the default stays
    assert manifest.spec.sparse is not None and manifest.spec.sparse.head == "token-weights"
    for graph in manifest.graphs.values():
        shapes = {tensor.name: tensor.shape for tensor in graph.outputs}
        assert shapes["sentence_embedding"] == ("batch", 32)
        assert shapes["token_weights"] == ("batch", "sequence", 1)
        assert [[tensor.name for tensor in part.outputs] for part in graph.parts] == [["sentence_embedding"]]


def test_what_is_refused(checkpoint, bundle_of, tmp_path):
    with (
        gte_deploy.load(checkpoint, backend="torch", task="token-classify") as model,
        pytest.raises(gte_deploy.InputError, match="needs a hybrid model"),
    ):
        model.encode_hybrid("a")
    several = make_checkpoint(tmp_path / "several", task="token-classify", num_labels=3)
    with pytest.raises(gte_deploy.ConfigError, match="token-classify with 3 labels"):
        gte_deploy.load(several, backend="torch", task="hybrid")
    masked = make_checkpoint(tmp_path / "masked")
    with pytest.raises(gte_deploy.ConfigError, match="needs a token classifier of one label"):
        gte_deploy.load(masked, backend="torch", task="hybrid")
    spec = json.loads((bundle_of(checkpoint, task="hybrid") / "manifest.json").read_text())["spec"]
    with pytest.raises(ValueError, match=r"spec\.sparse is missing, though the task is hybrid"):
        spec_from_json({**spec, "sparse": None})
    with pytest.raises(ValueError, match="'splade', though the task is hybrid"):
        spec_from_json({**spec, "sparse": {**spec["sparse"], "head": "splade"}})


def test_the_command_prints_both_halves(checkpoint, hybrid_on, capsys):
    arguments = ["encode-hybrid", "-m", str(checkpoint), "--normalize", "--max-active-dims", "2", "--json", *TEXTS[:2]]
    assert main(arguments) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with hybrid_on("torch") as model:
        expected = model.encode_hybrid(TEXTS[:2], normalize_embeddings=True, max_active_dims=2, as_dict=True)
    assert [each["sparse"] for each in found] == expected.sparse
    np.testing.assert_allclose([each["dense"] for each in found], expected.dense, atol=1e-7)

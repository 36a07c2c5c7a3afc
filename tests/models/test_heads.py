"""The torch heads of all tasks: one computation in the backend and in the reference of parity checks."""

import numpy as np
import pytest
import torch

from factories import add_multi_vector_modules, add_sparse_modules, make_checkpoint
from gte_deploy.backends.base import Batch
from gte_deploy.backends.torch import TorchBackend
from gte_deploy.core.spec import TASK_NAMES, SparseSpec
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.models.checkpoint import load_described, load_model
from gte_deploy.models.description import describe
from gte_deploy.models.heads import HEADS, HeadOptions, make_heads, mean_pool


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    return {
        "fill-mask": make_checkpoint(folder / "fill-mask"),
        "embed": make_checkpoint(folder / "embed", task="embed", pooling="mean"),
        "classify": make_checkpoint(folder / "classify", task="classify", num_labels=3),
        "token-classify": make_checkpoint(folder / "token-classify", task="token-classify", num_labels=4),
        "sparse": add_sparse_modules(make_checkpoint(folder / "sparse")),
        "hybrid": make_checkpoint(folder / "hybrid", task="token-classify", pooling="cls"),
        "multi-vector": add_multi_vector_modules(
            make_checkpoint(folder / "multi-vector", task="embed"), library="sentence-transformers"
        ),
    }


def ragged_batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(40) < np.array([[3], [40], [17]])).astype(np.int64)
    return Batch(np.where(mask == 1, rng.integers(5, 80, mask.shape), 0), mask, np.array([[0, 1], [1, 39], [2, 5]]))


def test_every_task_has_a_head(checkpoints):
    assert set(HEADS) == set(TASK_NAMES) == set(checkpoints)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_backend_and_reference_compute_the_same(checkpoints, task):
    folder, batch = checkpoints[task], ragged_batch()
    described = describe(folder, task=task)
    spec = described.spec
    backend = TorchBackend(load_described(described), spec)
    reference = TorchReference(
        load_described(described), task=task, pooling=spec.pooling, logits=spec.logits, sparse=spec.sparse
    )
    right = reference.run(batch, ())
    found = backend.run(batch, backend.outputs)
    assert set(right) == set(backend.outputs) - ({"logits"} if task == "sparse" else set())
    for name, values in right.items():
        if name == "sparse_embedding":  # the reference follows the definition token by token
            np.testing.assert_allclose(found[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mean_pooling_leaves_padding_out(dtype):
    hidden = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = (torch.arange(9) < torch.tensor([[9], [2], [0]])).long()
    pooled = mean_pool(hidden, mask)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, length in enumerate((9, 2)):
        torch.testing.assert_close(pooled[row], hidden[row, :length].to(pooled.dtype).mean(0))
    assert not pooled[2].any(), "a row without any token has the zero vector"
    torch.testing.assert_close(mean_pool(hidden[:1], None), pooled[:1])


def test_sparse_heads_share_the_weights_of_the_model(checkpoints):
    model = load_model(checkpoints["fill-mask"])
    (head,) = make_heads(model, HeadOptions("sparse", sparse=SparseSpec("splade")))
    first = next(iter(head.module.decoder.parameters()))
    assert first.data_ptr() == model.lm_head.decoder.weight.data_ptr()

"""The padding-free form of the torch backend against the padded one, on the CPU: the same answers from other shapes."""

import numpy as np
import pytest

from factories import add_sparse_modules, make_checkpoint
from gte_deploy.backends.base import Batch
from gte_deploy.backends.torch import TorchBackend, open_torch_backend
from gte_deploy.models.checkpoint import load_model

TOLERANCE = 1e-5  # the same float32 sums in another order


def packed_backend(folder, **options):
    from gte_deploy.models.description import describe

    return TorchBackend(load_model(folder), describe(folder).spec, packed=True, **options)


@pytest.fixture(scope="module")
def checkpoints(word_checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    labels = make_checkpoint(folder / "token-classify", task="token-classify", num_labels=3, max_positions=128)
    mean = make_checkpoint(folder / "embed-mean", task="embed", pooling="mean", max_positions=128)
    sparse = add_sparse_modules(make_checkpoint(folder / "sparse", max_positions=128), pooling="sum")
    return {**word_checkpoints, "token-classify": labels, "embed-mean": mean, "sparse": sparse}


def batches():
    rng = np.random.default_rng(0)
    for lengths in ([1], [128], [3, 40, 3, 17], [5] * 4, [128, 1, 64]):
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        ids = np.where(mask == 1, rng.integers(5, 80, mask.shape), 0)
        places = [(row, length // 2) for row, length in enumerate(lengths)] + [(0, 0)]
        yield Batch(ids, mask, np.array(places))
    # Padding on the left and in the middle: positions go on counting over it.
    mask = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    yield Batch(rng.integers(5, 80, mask.shape), mask, np.array([[0, 3], [1, 4], [0, 2]]))
    yield Batch(rng.integers(5, 80, (2, 9)), np.ones((2, 9), np.int64), np.empty((0, 2), np.int64))


@pytest.mark.parametrize("name", ["fill-mask", "embed", "embed-mean", "classify", "token-classify", "sparse"])
def test_packed_is_padded(checkpoints, name):
    padded, packed = open_torch_backend(checkpoints[name])[0], packed_backend(checkpoints[name])
    assert packed.outputs == padded.outputs and packed.precision == padded.precision == "fp32"
    for batch in batches():
        for asked in (packed.outputs, packed.outputs[1:]):
            found, expected = packed.run(batch, asked), padded.run(batch, asked)
            assert list(found) == list(asked)
            for output, values in found.items():
                assert values.shape == expected[output].shape and values.dtype == np.float32
                by_token = output == "last_hidden_state" or (name, output) == ("token-classify", "logits")
                where = batch.attention_mask == 1 if by_token else slice(None)
                share = TOLERANCE * max(1, np.abs(expected[output]).max(initial=0))  # of sums over many tokens
                np.testing.assert_allclose(values[where], expected[output][where], atol=share, err_msg=output)
                if by_token:
                    assert not values[batch.attention_mask == 0].any()


def test_no_token_of_padding_is_computed(checkpoints):
    backend = packed_backend(checkpoints["embed"])
    seen = []
    backend._encoder.embeddings.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    batch = next(batch for batch in batches() if len(batch.input_ids) == 3)
    backend.run(batch, ["sentence_embedding"])
    assert seen == [(1, 128 + 1 + 64, 32)]


def test_bfloat16_keeps_the_angles_of_far_positions(checkpoints):
    """Weights are rounded and RoPE's frequencies are not: far positions stay as near to float32 as the first ones."""
    import torch

    exact, rounded = (
        open_torch_backend(checkpoints["embed"], precision=precision)[0] for precision in ("fp32", "bf16")
    )
    assert rounded.precision == "bf16" and rounded._model.rotary_emb.inv_freq.dtype == torch.float32
    ids = np.random.default_rng(0).integers(5, 80, (1, 128))
    one, two = (
        backend.run(Batch(ids, np.ones_like(ids)), ["last_hidden_state"])["last_hidden_state"][0]
        for backend in (exact, rounded)
    )
    assert two.dtype == np.float32
    cosine = (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    assert cosine[:32].mean() > 0.99 and cosine[-32:].mean() > 0.99


def test_fill_mask_without_positions_and_after_closing(checkpoints):
    from gte_deploy.core.errors import BackendError

    backend = packed_backend(checkpoints["fill-mask"])
    ids = np.ones((1, 3), np.int64)
    with pytest.raises(BackendError, match="^logits of a fill-mask model need mask_positions"):
        backend.run(Batch(ids, ids), ["logits"])
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(Batch(ids, ids), ["last_hidden_state"])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_compiled_is_the_same(checkpoints, packed):
    if packed:
        compiled = packed_backend(checkpoints["fill-mask"], compile=True)
    else:
        compiled, _ = open_torch_backend(checkpoints["fill-mask"], compile=True)
    plain, _ = open_torch_backend(checkpoints["fill-mask"])
    for batch in batches():
        found, expected = (backend.run(batch, ["logits"])["logits"] for backend in (compiled, plain))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(1, np.abs(expected).max(initial=0)))

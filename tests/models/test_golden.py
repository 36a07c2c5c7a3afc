"""PyTorch against the float64 results of an independent implementation (tests/golden/README.md)."""

import numpy as np
import pytest
import torch

from gte_deploy.models.checkpoint import load_model

TOLERANCE = 1e-4
# float32 rounds the rotation angles of positions near 2,000: their sines are off by some 1e-4.
TOLERANCE_LONG = 5e-4


@pytest.fixture(scope="module", params=["mlm", "embed_ntk", "rerank"])
def golden(request, golden_dir):
    folder = golden_dir / request.param
    return load_model(folder), np.load(folder / "expected.npz")


def _difference(actual: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(actual.shape) == expected.shape
    return float(np.abs(actual.double().numpy() - expected).max())


@torch.inference_mode()
def test_hidden_states(golden):
    model, expected = golden
    mask = torch.from_numpy(expected["attention_mask"])
    hidden = model.base_model(torch.from_numpy(expected["input_ids"]), attention_mask=mask).last_hidden_state
    assert mask.min() == 0, "the golden batch must be ragged, or padding is not tested"
    assert _difference(hidden * mask[..., None], expected["hidden"]) < TOLERANCE


@torch.inference_mode()
def test_long_row(golden):
    model, expected = golden
    tail = model.base_model(torch.from_numpy(expected["long_input_ids"])).last_hidden_state[:, -8:]
    assert _difference(tail, expected["long_hidden_tail"]) < TOLERANCE_LONG


@torch.inference_mode()
def test_masked_lm_logits(golden_dir):
    model, expected = load_model(golden_dir / "mlm"), np.load(golden_dir / "mlm" / "expected.npz")
    logits = model(
        torch.from_numpy(expected["input_ids"]), attention_mask=torch.from_numpy(expected["attention_mask"])
    ).logits
    rows, tokens = torch.from_numpy(expected["mask_positions"]).T
    assert _difference(logits[rows, tokens], expected["mask_logits"]) < TOLERANCE


@torch.inference_mode()
def test_reranker_scores(golden_dir):
    model, expected = load_model(golden_dir / "rerank"), np.load(golden_dir / "rerank" / "expected.npz")
    scores = model(
        torch.from_numpy(expected["input_ids"]), attention_mask=torch.from_numpy(expected["attention_mask"])
    ).logits
    assert _difference(scores, expected["scores"]) < TOLERANCE

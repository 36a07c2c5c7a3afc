"""A program for ExecuTorch answers as the checkpoint's own library does, in gte_deploy and in ExecuTorch alone.

executorch pins packages that this project does without, so the export and the runs have an environment of their own:
`make test-consumers` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from factories import make_checkpoint

pytestmark = [pytest.mark.consumers, pytest.mark.parametrize("environment", ["executorch"])]

FP32 = 2e-5
INT8 = 0.999
"""Least cosine."""
WORDS = ("w7 w8 w9", "w20", "w30 w31 w32 w33 w34 w35 w36")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a checkpoint of one layer; the time of ExecuTorch's passes grows with the layers."""
    folder = tmp_path_factory.mktemp("sources")
    options = {"layout": "native", "layers": 1}
    return {
        "embed": make_checkpoint(folder / "embed", task="embed", pooling="mean", normalize=True, **options),
        "fill-mask": make_checkpoint(folder / "mlm", **options),
        "classify": make_checkpoint(folder / "rerank", task="classify", **options),
    }


def test_embeddings(sources: dict[str, Path], run_script: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    bundle = tmp_path / "bundle"
    folder = run_script("export_executorch.py", sources["embed"], bundle, "embed", "fp32", *WORDS)
    expected = SentenceTransformer(str(sources["embed"]), device="cpu").encode(list(WORDS))
    np.testing.assert_allclose(np.load(folder / "embeddings.npy"), expected, rtol=0, atol=FP32)
    answers = json.loads((folder / "answers.json").read_text())
    assert answers["backend"] == "executorch" and "64" in answers["refusal"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["graphs"]["executorch"]["computes"] == ["fp32"] and not manifest["missed_bounds"]
    alone = torch.load(run_script("embed_executorch.py", bundle, *WORDS) / "embeddings.pt", weights_only=True)
    np.testing.assert_allclose(alone.numpy(), expected, rtol=0, atol=FP32)


def test_int8(sources: dict[str, Path], run_script: Callable[..., Path], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    bundle = tmp_path / "bundle"
    folder = run_script("export_executorch.py", sources["embed"], bundle, "embed", "int8", *WORDS)
    expected = SentenceTransformer(str(sources["embed"]), device="cpu").encode(list(WORDS))
    found = np.load(folder / "embeddings.npy")
    assert ((found * expected).sum(axis=1) > INT8).all()
    assert np.abs(found - expected).max() > FP32  # it is INT8 indeed
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precision"] == "int8" and not manifest["missed_bounds"]


def test_masks(sources: dict[str, Path], run_script: Callable[..., Path], tmp_path: Path) -> None:
    """Three masks take two runs of a program for two."""
    from transformers import pipeline

    texts = ("w7 [MASK] w9", "[MASK] w8 [MASK] w9 [MASK]")
    folder = run_script("export_executorch.py", sources["fill-mask"], tmp_path / "bundle", "fill-mask", "fp32", *texts)
    fills = json.loads((folder / "answers.json").read_text())["fills"]
    library = pipeline("fill-mask", model=str(sources["fill-mask"]), top_k=5)
    for found, text in zip(fills, texts, strict=True):
        assert_same_words(found, library(text))


def assert_same_words(found: list, expected: list) -> None:
    if isinstance(expected[0], list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_words(one, other)
        return
    assert [fill["token"] for fill in found] == [fill["token"] for fill in expected]
    np.testing.assert_allclose([fill["score"] for fill in found], [fill["score"] for fill in expected], atol=FP32)


def test_scores(sources: dict[str, Path], run_script: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    folder = run_script("export_executorch.py", sources["classify"], tmp_path / "bundle", "classify", "fp32", *WORDS)
    library = CrossEncoder(str(sources["classify"]), device="cpu")
    pairs = [(WORDS[0], word) for word in WORDS[1:]]
    expected = library.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(np.load(folder / "scores.npy"), expected, rtol=0, atol=FP32)

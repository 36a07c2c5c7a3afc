"""Models of each kind on both sides: ours for the adapters, and sentence-transformers' as the judge.

The frameworks are not installed beside this project: `make test-consumers` runs this folder in an environment of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gte_deploy
from runtime_models import make_word_checkpoint

LONG = "the old man and the river " * 60


class Both(NamedTuple):
    """A loaded model, the same checkpoint in sentence-transformers, and its folder."""

    ours: gte_deploy.Model
    theirs: Any
    path: Path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [
        "Paris is the capital of France.",
        "the old man walked on and on",
        "light is on the water",
        "the king and the queen",
        "a small city on the river",
        "sing to the world of a new day",
        LONG,
    ]


@pytest.fixture(scope="session")
def embedder(word_checkpoints):
    path = word_checkpoints["embed"]
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(str(path), device="cpu")
    with gte_deploy.load(path, backend="torch") as ours:
        yield Both(ours, theirs, path)


@pytest.fixture(scope="session")
def reranker(word_checkpoints):
    path = word_checkpoints["classify"]
    theirs = pytest.importorskip("sentence_transformers").CrossEncoder(str(path), device="cpu")
    with gte_deploy.load(path, backend="torch") as ours:
        yield Both(ours, theirs, path)


@pytest.fixture(scope="session")
def sparse_encoder(tmp_path_factory):
    encoder = pytest.importorskip("sentence_transformers.sparse_encoder")
    from sentence_transformers.base.modules import Transformer

    masked_lm = make_word_checkpoint(tmp_path_factory.mktemp("mlm") / "mlm", seed=7)
    path = tmp_path_factory.mktemp("sparse") / "model"
    modules = [Transformer(str(masked_lm), transformer_task="fill-mask"), encoder.modules.SpladePooling("max")]
    encoder.SparseEncoder(modules=modules, device="cpu").save_pretrained(str(path))
    with gte_deploy.load(path, backend="torch") as ours:
        yield Both(ours, encoder.SparseEncoder(str(path), device="cpu"), path)

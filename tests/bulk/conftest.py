"""A model for bulk runs, sentence-transformers' model of the same checkpoint as the judge, and rows of texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gte_deploy
from runtime_models import make_texts


@pytest.fixture(scope="session")
def embedder(word_checkpoints: dict[str, Path]) -> Iterator[gte_deploy.Model]:
    with gte_deploy.load(word_checkpoints["embed"], backend="torch") as model:
        yield model


@pytest.fixture(scope="session")
def judge(word_checkpoints: dict[str, Path]) -> Any:
    """SentenceTransformer with the embedder's checkpoint."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(word_checkpoints["embed"]), device="cpu")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return ["", "中国 a", *make_texts(150), "a", "a"]

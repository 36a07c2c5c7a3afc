"""Fixtures that every test package shares: hand-made checkpoints, golden data, the GPU skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from factories import make_checkpoint
from runtime_models import (  # noqa: F401  fixtures
    backend,
    bundle_of,
    load_on,
    models,
    repeat_tolerance,
    word_checkpoints,
)

# Before anything imports torch: many small tests on few cores are faster with one thread each, and stay offline.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="gpu test: torch is not installed")
    if not torch.cuda.is_available():
        # Without its parameters: pytest folds equal reasons into one line.
        name = getattr(item, "originalname", item.name)
        pytest.skip(f"{name}: needs an NVIDIA GPU, and torch.cuda.is_available() is False")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden checkpoints: mlm, embed_ntk, rerank."""
    return Path(__file__).with_name("golden")


@pytest.fixture(scope="session")
def tiny_mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original-layout fill-mask checkpoint. Shared by the session: read only."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "mlm")


@pytest.fixture(scope="session")
def tiny_embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original-layout embedding checkpoint with CLS pooling and NTK scaling. Shared by the session: read only."""
    return make_checkpoint(
        tmp_path_factory.mktemp("tiny") / "embed",
        task="embed",
        rope_theta=500000,
        rope_scaling={"type": "ntk", "factor": 2.0},
        pooling="cls",
        seed=1,
    )


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original-layout reranker: pooler, one label, NTK scaling. Shared by the session: read only."""
    return make_checkpoint(
        tmp_path_factory.mktemp("tiny") / "reranker",
        task="classify",
        type_vocab_size=1,
        rope_theta=20000,
        rope_scaling={"type": "ntk", "factor": 8.0},
        seed=2,
    )

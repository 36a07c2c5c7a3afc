"""Fixtures that every test package shares: hand-made checkpoints, golden data, the GPU skip."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Before anything imports torch: many small tests on few cores are faster with one thread each, and stay offline.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _load(name: str) -> ModuleType:
    # --import-mode=importlib puts no test folder on sys.path, so a plain import cannot find the neighbour.
    spec = importlib.util.spec_from_file_location(f"gte_deploy_test_{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"tests/{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_factories = _load("factories")
_runtime_models = _load("runtime_models")

word_checkpoints = _runtime_models.word_checkpoints
bundle_of = _runtime_models.bundle_of
load_on = _runtime_models.load_on
backend = _runtime_models.backend
models = _runtime_models.models
repeat_tolerance = _runtime_models.repeat_tolerance


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="gpu test: torch is not installed")
    if not torch.cuda.is_available():
        # Without its parameters: pytest folds equal reasons into one line.
        name = getattr(item, "originalname", item.name)
        pytest.skip(f"{name}: needs an NVIDIA GPU, and torch.cuda.is_available() is False")


@pytest.fixture(scope="session")
def factories() -> ModuleType:
    """The module tests/factories.py."""
    return _factories


@pytest.fixture(scope="session")
def runtime_models() -> ModuleType:
    """The module tests/runtime_models.py."""
    return _runtime_models


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """`make_checkpoint(folder, *, task=..., layout=..., ...) -> Path`, see tests/factories.py."""
    return _factories.make_checkpoint


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden checkpoints: mlm, embed_ntk, rerank."""
    return Path(__file__).with_name("golden")


@pytest.fixture(scope="session")
def tiny_mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original-layout fill-mask checkpoint. Shared by the session: read only."""
    return _factories.make_checkpoint(tmp_path_factory.mktemp("tiny") / "mlm")


@pytest.fixture(scope="session")
def tiny_embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original-layout embedding checkpoint with CLS pooling and NTK scaling. Shared by the session: read only."""
    return _factories.make_checkpoint(
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
    return _factories.make_checkpoint(
        tmp_path_factory.mktemp("tiny") / "reranker",
        task="classify",
        type_vocab_size=1,
        rope_theta=20000,
        rope_scaling={"type": "ntk", "factor": 8.0},
        seed=2,
    )

"""Fixtures that every test package shares: hand-made checkpoints, golden data, the GPU skip."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from battery import attempts, pytest_addoption, pytest_configure  # noqa: F401  a fixture, and hooks
from factories import make_checkpoint
from headless import chromium  # noqa: F401  a fixture
from runtime_models import (  # noqa: F401  fixtures
    backend,
    bundle_of,
    load_on,
    models,
    repeat_tolerance,
    row_tolerance,
    task_bundles,
    task_checkpoints,
    word_checkpoints,
)
from traces import shared_traces  # noqa: F401  a fixture

# Before anything imports torch: many small tests on few cores are faster with one thread each, and stay offline.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# A trace makes millions of objects, and the libraries keep as many. By default the collector goes over all of them
# often, for a tenth of the time of an export.
gc.set_threshold(50_000, 10, 10)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker, which builds the file's fixtures once; `make test` spreads groups of tests.

    Tests of every backend stay single: what they share is the backend's models, and they are in the order of backends.
    Those of `tests/reliability` get the marker of the reliability battery. Its slow tests are those of `soak`.
    """
    battery = Path(__file__).with_name("reliability")
    for item in items:
        if battery in item.path.parents:
            item.add_marker(pytest.mark.reliability)
        if item.get_closest_marker("reliability") and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.soak)
        shares_its_file = "backend" not in getattr(item, "fixturenames", ())
        if shares_its_file and item.get_closest_marker("xdist_group") is None:
            group = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="gpu test: torch is not installed")
    if not torch.cuda.is_available():
        # Without its parameters: pytest folds equal reasons into one line.
        name = getattr(item, "originalname", item.name)
        pytest.skip(f"{name}: needs an NVIDIA GPU, and torch.cuda.is_available() is False")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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

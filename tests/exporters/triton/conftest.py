"""Repositories of small bundles, run by tests/support/triton_emulation.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories import add_multi_vector_modules, add_sparse_modules, add_tokens, raise_token_weights
from runtime_models import VOCAB_SIZE, make_word_checkpoint
from triton_emulation import Repository, python_backend

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tritonclient.grpc")


@pytest.fixture(autouse=True)
def _triton_python_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", python_backend())
    # A model puts its own folder first, which is right in a process of its own.
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("gte_deploy.exporters.triton.serving.exchange", None)


@pytest.fixture(scope="session")
def bundles(
    word_checkpoints: dict[str, Path],
    bundle_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A bundle for each task. Read only."""
    sparse = tmp_path_factory.mktemp("sparse") / "checkpoint"
    raise_token_weights(make_word_checkpoint(sparse, task="token-classify", seed=3))
    splade = make_word_checkpoint(tmp_path_factory.mktemp("splade") / "checkpoint")
    add_sparse_modules(splade, query_weights=np.linspace(0.5, 3, VOCAB_SIZE).tolist())
    late = make_word_checkpoint(tmp_path_factory.mktemp("late") / "checkpoint", task="embed", seed=4)
    add_tokens(late, ["[Q] ", "[D] "])
    settings = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 60}
    prompts = {"query": "to the ", "document": "the "}
    add_multi_vector_modules(late, config={**settings, "prompts": prompts})
    more = {"token-classify": sparse, "sparse": splade, "multi-vector": late}
    made = {task: bundle_of(path) for task, path in {**word_checkpoints, **more}.items()}
    return {**made, "hybrid": bundle_of(sparse, task="hybrid")}


@pytest.fixture(scope="session")
def repositories(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A repository for each task. Read only."""
    from gte_deploy.exporters.triton.repository import export_repository

    folder = tmp_path_factory.mktemp("repositories")
    return {task: export_repository(bundle, folder / task, threads=1).path for task, bundle in bundles.items()}


@pytest.fixture
def repository(repositories: dict[str, Path]) -> Callable[[str], Repository]:
    """`repository(task)`, with models of its own."""
    return lambda task: Repository(repositories[task])


@pytest.fixture
def altered_bundle(bundles: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """`altered_bundle(task, files={}, **fields)`: a copy of a bundle whose manifest says otherwise."""
    import shutil

    from gte_deploy.bundle.manifest import MANIFEST_NAME, FileEntry, read_manifest
    from gte_deploy.core.files import sha256_file

    def altered(task: str, files: dict[str, bytes] | None = None, **fields: Any) -> Path:
        folder = tmp_path / "altered-bundle"
        shutil.copytree(bundles[task], folder)
        manifest = read_manifest(folder)
        entries = dict(manifest.files)
        for name, data in (files or {}).items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            entries[name] = FileEntry(len(data), sha256_file(path))
        changed = dataclasses.replace(manifest, files=entries, **fields)
        (folder / MANIFEST_NAME).write_text(json.dumps(changed.to_json()), encoding="utf-8")
        return folder

    return altered

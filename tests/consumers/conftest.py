"""Bundles for the consumers, and the run of a consumer's script in its environment.

The checkpoints are the built-in model, written by sentence-transformers itself. The bundles hold texts of 64 tokens.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from environments import Unavailable, interpreter
from gte_deploy.models import builtin_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
MAX_LENGTH = 64
TIMEOUT_S = 900
HERE = "here"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a checkpoint in FP32, as `save` of sentence-transformers' class for the task writes it. Read only."""
    pytest.importorskip("sentence_transformers", reason="the judge of the consumers is sentence-transformers")
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    folder = tmp_path_factory.mktemp("checkpoints")
    fp32 = {"dtype": "float32"}
    transformer = Transformer(str(builtin_path()), model_kwargs=fp32)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    torch.manual_seed(0)  # the head of the reranker is new
    models = {
        "embed": SentenceTransformer(modules=modules, device="cpu"),
        "classify": CrossEncoder(str(builtin_path()), num_labels=1, device="cpu", model_kwargs=fp32),
        "sparse": SparseEncoder(str(builtin_path()), device="cpu", model_kwargs=fp32),
    }
    for task, model in models.items():
        model.save(str(folder / task))
    return {**{task: folder / task for task in models}, "fill-mask": builtin_path()}


OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"precision": "int8"},
    "ir": {"openvino_ir": "model"},
    "genai": {"openvino_ir": "genai"},
    # The weights are of no sparse model: most values are near 0, and so are their bounds.
    "sparse": {"bounds": "report"},
}
"""A word of a subject -> options of its export."""


@pytest.fixture(scope="session")
def bundle_for(bundle_of: Callable[..., Path], checkpoints: dict[str, Path]) -> Callable[[str], Path]:
    """`bundle_for("embed int8")`: the bundle that the exporter makes of the task's checkpoint. Read only."""

    def bundle(subject: str) -> Path:
        task, *words = subject.split()
        if "genai" in words:
            pytest.importorskip("openvino_tokenizers", reason="OpenVINO GenAI: openvino-tokenizers is not installed")
        options = {name: value for word in (task, *words) for name, value in OPTIONS.get(word, {}).items()}
        return bundle_of(checkpoints[task], max_length=MAX_LENGTH, task=task, **options)

    return bundle


@pytest.fixture
def environment() -> str:
    """Name of the environment that a script runs in; a test's parameter of this name replaces it."""
    return HERE


@pytest.fixture
def python(environment: str) -> Path | None:
    """The interpreter of the `environment`, without which the test is skipped; None for "here"."""
    try:
        return None if environment == HERE else interpreter(environment)
    except Unavailable as error:
        pytest.skip(f"consumers in {environment}: {error}")


@pytest.fixture
def variables() -> dict[str, str]:
    """The variables of a process in an environment: this project can be imported, and the hub is not asked."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run_script(
    python: Path | None, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`run_script(script, *arguments)` runs it in the `environment` and returns the folder with the answer.

    The environment "here" is this process, which has imported torch.
    """

    def run(script: str, *arguments: str | os.PathLike[str]) -> Path:
        command = [str(SCRIPTS / script), *map(os.fspath, arguments)]
        if python is None:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", command)
            runpy.run_path(command[0], run_name="__main__")
            return tmp_path
        ended = subprocess.run(
            [python, *command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return tmp_path

    return run

"""The programs of a model card for sentence-transformers and transformers.js, as they stand there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from family_checkpoints import make_embedder

TEXTS = ["The panda is a bear.", "It rains."]
pytestmark = pytest.mark.consumers


@pytest.fixture(scope="module", params=["gte", "bert"])
def checkpoint(request: pytest.FixtureRequest, word_checkpoints: dict[str, Path], tmp_path_factory: Any) -> Path:
    """A small embedding model that normalises, as both programs do for it."""
    if request.param == "gte":
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize

        folder = tmp_path_factory.mktemp("gte") / "embedder"
        SentenceTransformer(
            modules=[*SentenceTransformer(str(word_checkpoints["embed"]), device="cpu"), Normalize()], device="cpu"
        ).save(str(folder))
        return folder
    folder = tmp_path_factory.mktemp("bert") / "embedder"
    return make_embedder(folder, "bert", pooling="cls", normalize=True, prompts={})


def expected(checkpoint: Path) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(checkpoint), device="cpu").encode(TEXTS)


def program(bundle: Path, language: str, word: str) -> str:
    text = (bundle / "README.md").read_text(encoding="utf-8")
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL) if word in code)
    return found


def numbers(printed: str, like: NDArray[np.float32]) -> NDArray[np.float32]:
    """The matrix that a program printed, as NumPy or Node.js prints it."""
    found = re.findall(r"-?\d+(?:\.\d*)?(?:e[+-]\d+)?", printed)
    return np.array(found, np.float32).reshape(like.shape)


@pytest.mark.parametrize("environment", ["onnx"])
def test_sentence_transformers(
    python: Path, checkpoint: Path, bundle_of: Callable[..., Path], variables: dict[str, str], tmp_path: Path
) -> None:
    bundle = bundle_of(checkpoint)
    code = program(bundle, "python", "sentence_transformers").replace("MODEL", str(bundle))
    ran = subprocess.run([python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    wanted = expected(checkpoint)
    np.testing.assert_allclose(numbers(ran.stdout, wanted), wanted, rtol=0, atol=2e-5)


def test_transformers_js(
    checkpoint: Path, bundle_of: Callable[..., Path], scripts: Path, address: Callable[[Path], str]
) -> None:
    bundle = bundle_of(checkpoint)
    code = program(bundle, "js", "@huggingface/transformers").replace("MODEL", address(bundle))
    (scripts / "card.mjs").write_text(code)
    ran = subprocess.run(["node", "card.mjs"], cwd=scripts, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    wanted = expected(checkpoint)
    np.testing.assert_allclose(numbers(ran.stdout, wanted), wanted, rtol=0, atol=2e-5)

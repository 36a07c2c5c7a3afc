"""MNN converts the graph of standard operators, and answers as sentence-transformers does on the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("a river in an old city", "Über den Straßen von Köln", "word")
# MNN fuses and approximates more than ONNX Runtime: 3.4e-5 was measured for embeddings of length 1.
TOLERANCE = 2e-4


@pytest.mark.consumers
@pytest.mark.parametrize("environment", ["mnn"])
def test_embeddings(
    checkpoints: dict[str, Path], bundle_for: Callable[[str], Path], run_script: Callable[..., Path]
) -> None:
    pytest.importorskip("openvino", reason="a bundle has the graph of standard operators only where openvino is")
    from sentence_transformers import SentenceTransformer

    found = np.load(
        run_script(str(ROOT / "examples/mnn_embeddings.py"), bundle_for("embed"), *TEXTS) / "embeddings.npy"
    )
    expected = SentenceTransformer(str(checkpoints["embed"]), device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)

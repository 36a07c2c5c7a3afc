"""The examples that convert models for devices: MNN, LiteRT and Core ML answer as sentence-transformers does.

Core ML computes on macOS alone. Elsewhere the saved program is computed as coremltools defines its operators in NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from family_checkpoints import make_embedder

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("a river in an old city", "Über den Straßen von Köln", "word")
LONG = "the old river runs through the city of the king " * 5
TOKENS = 32
# MNN fuses and approximates more than ONNX Runtime: 3.4e-5 was measured for embeddings of length 1.
MNN_TOLERANCE = 2e-4
# The rounding of FP32 sums, for embeddings of length 1.
FP32 = 2e-5

pytestmark = pytest.mark.consumers
conversions = pytest.mark.parametrize("family", ["gte", "bert", "xlm-roberta"])


@pytest.fixture(scope="module")
def embedders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> an embedding model, as sentence-transformers saves it."""
    folder = tmp_path_factory.mktemp("embedders")
    options: dict[str, Any] = {"normalize": True, "prompts": {}}
    return {
        "gte": checkpoints["embed"],
        "bert": make_embedder(folder / "bert", "bert", pooling="cls", **options),
        "xlm-roberta": make_embedder(folder / "xlm-roberta", "xlm-roberta", pooling="mean", **options),
    }


def expected(checkpoint: Path, texts: tuple[str, ...], max_length: int | None = None) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(checkpoint), device="cpu")
    if max_length is not None:
        model.max_seq_length = max_length
    return model.encode(list(texts))


@pytest.mark.parametrize("environment", ["mnn"])
@pytest.mark.parametrize("family", ["gte", "bert"])
def test_mnn(
    family: str, embedders: dict[str, Path], bundle_of: Callable[..., Path], run_script: Callable[..., Path]
) -> None:
    """The graph of BERT takes token types."""
    pytest.importorskip("openvino", reason="a bundle has the graph of standard operators only where openvino is")
    bundle = bundle_of(embedders[family], max_length=TOKENS)
    found = np.load(run_script(str(ROOT / "examples/mnn_embeddings.py"), bundle, *TEXTS) / "embeddings.npy")
    np.testing.assert_allclose(found, expected(embedders[family], TEXTS), rtol=0, atol=MNN_TOLERANCE)


@conversions
@pytest.mark.parametrize("environment", ["litert"])
def test_litert(family: str, embedders: dict[str, Path], run_script: Callable[..., Path]) -> None:
    texts = (*TEXTS, LONG)
    words = ("--tokens", str(TOKENS), embedders[family], *texts)
    folder = run_script(str(ROOT / "examples/litert_embeddings.py"), *words)
    wanted = expected(embedders[family], texts, TOKENS)
    np.testing.assert_allclose(np.load(folder / "embeddings.npy"), wanted, rtol=0, atol=FP32)
    assert (folder / f"{embedders[family].name}.tflite").stat().st_size > 0


@conversions
@pytest.mark.parametrize("environment", ["coreml"])
def test_core_ml(family: str, embedders: dict[str, Path], run_script: Callable[..., Path]) -> None:
    checkpoint, texts = embedders[family], (*TEXTS, LONG)
    words = ("--tokens", str(TOKENS), checkpoint, *texts)
    folder = run_script(str(ROOT / "examples/coreml_embeddings.py"), *words)
    config = json.loads((checkpoint / "config.json").read_text())
    package = folder / f"{checkpoint.name}.mlpackage"
    words = (checkpoint / "tokenizer.json", package, str(TOKENS), str(config["pad_token_id"]), *texts)
    folder = run_script("evaluate_coreml.py", *words)
    size = config["hidden_size"]
    assert json.loads((folder / "answer.json").read_text()) == {
        "inputs": {"input_ids": [[1, TOKENS], "INT32"], "attention_mask": [[1, TOKENS], "INT32"]},
        "outputs": {
            "last_hidden_state": [[1, TOKENS, size], "FLOAT32"],
            "sentence_embedding": [[1, size], "FLOAT32"],
        },
    }
    wanted = expected(checkpoint, texts, TOKENS)
    np.testing.assert_allclose(np.load(folder / "embeddings.npy"), wanted, rtol=0, atol=FP32)

"""Others load our bundles, unmodified, and answer as PyTorch does on the checkpoint.

Each case is a script of tests/consumers/scripts in an environment that pip resolved for that library. The scripts are
the examples of docs/runtimes.md. Cases in the environment "here" run in every test run; those marked `consumers` need
environments of their own: `make test-consumers` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gte_deploy

Array = NDArray[np.float32]

HERE = "here"
MAX_LENGTH = 64
LONG = "the old river runs through the city of the king " * 30
TEXTS = ("a river in an old city", "Über den Straßen von Köln", "中国的首都是北京。", "", "word", LONG)
QUERY, DOCUMENTS = "Which river runs through the city?", TEXTS
MASKED = ("The president of the united [MASK] of America.", "Die Stadt Köln liegt am [MASK].", "中国的[MASK]都是北京。")

# The results differ by the rounding of FP32 sums; embeddings have length 1, scores and logits are of order 1.
FP32 = 2e-5
# Measured for INT8: 0.997 for the worst of these texts, which are short and not all in English.
INT8_COSINE = 0.99


def cases(*rows: tuple[str, str, str]) -> pytest.MarkDecorator:
    """Rows of script, environment and subject, as parameters; large environments and 8 bits are marked."""

    def marks(environment: str, subject: str) -> list[pytest.MarkDecorator]:
        if environment not in (HERE, "light"):
            return [pytest.mark.consumers]
        return [pytest.mark.slow] if "int8" in subject else []

    return pytest.mark.parametrize(
        ("script", "environment", "subject"),
        [pytest.param(*row, marks=marks(*row[1:]), id=" ".join(row)) for row in rows],
    )


@pytest.fixture(scope="module")
def judge(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Task -> answers of sentence-transformers or transformers on PyTorch, in FP32, from the checkpoint alone."""
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    embedder = SentenceTransformer(str(checkpoints["embed"]), device="cpu")
    sparse = SparseEncoder(str(checkpoints["sparse"]), device="cpu")
    embedder.max_seq_length = sparse.max_seq_length = MAX_LENGTH
    reranker = CrossEncoder(str(checkpoints["classify"]), device="cpu", max_length=MAX_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["fill-mask"])
    masked = AutoModelForMaskedLM.from_pretrained(checkpoints["fill-mask"], dtype=torch.float32).eval()

    def fill(text: str) -> Array:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = masked(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]
        return logits.softmax(-1)[0].numpy()

    pairs = [(QUERY, document) for document in DOCUMENTS]
    return {
        "embed": embedder.encode(list(TEXTS)),
        "sparse": sparse.encode(list(TEXTS)).to_dense().numpy(),
        "classify": reranker.predict(pairs, activation_fn=torch.nn.Identity()),
        "fill-mask": {text: fill(text) for text in MASKED},
        "ids": tokenizer.get_vocab(),
    }


@pytest.fixture
def run_on(bundle_for: Callable[[str], Path], run_script: Callable[..., Path]) -> Callable[..., Path]:
    """`run_on(script, subject, *arguments)` runs a script on the bundle of a subject; returns the answer's folder."""
    return lambda script, subject, *arguments: run_script(script, bundle_for(subject), *arguments)


@cases(
    ("embed_onnxruntime.py", HERE, "embed"),
    ("embed_onnxruntime.py", "ort120", "embed"),
    ("embed_onnxruntime.py", "ort122", "embed"),
    ("embed_onnxruntime.py", "ort124", "embed"),
    ("embed_onnxruntime.py", "ort124", "embed int8"),
    ("embed_openvino.py", HERE, "embed"),
    ("embed_fastembed.py", "light", "embed"),
    ("embed_fastembed.py", "light", "embed int8"),
    ("embed_light_embed.py", "light", "embed"),
    ("embed_light_embed.py", "light", "embed int8"),
    ("embed_optimum_onnx.py", "onnx", "embed"),
    ("embed_optimum_onnx.py", "onnx", "embed int8"),
    ("embed_sentence_transformers_onnx.py", "onnx", "embed"),
    ("embed_sentence_transformers_onnx.py", "onnx", "embed int8"),
    ("embed_sentence_transformers_openvino.py", "openvino", "embed ir"),
    ("embed_optimum_intel.py", "openvino", "embed ir"),
    ("embed_optimum_intel.py", "openvino", "embed int8 ir"),
    ("embed_openvino_genai.py", "genai", "embed genai"),
    ("embed_infinity.py", "infinity", "embed"),
)
def test_embeddings(script: str, subject: str, run_on: Callable[..., Path], judge: dict[str, Any]) -> None:
    found = np.load(run_on(script, subject, *TEXTS) / "embeddings.npy")
    assert found.shape == judge["embed"].shape and np.isfinite(found).all()
    if "int8" not in subject:
        np.testing.assert_allclose(found, judge["embed"], rtol=0, atol=FP32)
    else:
        assert (found * judge["embed"]).sum(1).min() > INT8_COSINE


@cases(
    ("rerank_onnxruntime.py", HERE, "classify"),
    ("rerank_onnxruntime.py", "ort120", "classify"),
    ("rerank_fastembed.py", "light", "classify"),
    ("rerank_optimum_onnx.py", "onnx", "classify"),
    ("rerank_optimum_intel.py", "openvino", "classify ir"),
)
def test_logits_of_a_reranker(script: str, subject: str, run_on: Callable[..., Path], judge: dict[str, Any]) -> None:
    found = np.load(run_on(script, subject, QUERY, *DOCUMENTS) / "scores.npy")
    np.testing.assert_allclose(found, judge["classify"], rtol=0, atol=FP32)


@cases(
    ("rerank_sentence_transformers_onnx.py", "onnx", "classify"),
    ("rerank_sentence_transformers_openvino.py", "openvino", "classify ir"),
)
def test_scores_of_a_reranker(script: str, subject: str, run_on: Callable[..., Path], judge: dict[str, Any]) -> None:
    """CrossEncoder applies a sigmoid to one label."""
    found = np.load(run_on(script, subject, QUERY, *DOCUMENTS) / "scores.npy")
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-judge["classify"])), rtol=0, atol=FP32)


@cases(
    ("fill_mask_onnxruntime.py", HERE, "fill-mask"),
    ("fill_mask_onnxruntime.py", "ort120", "fill-mask"),
    ("fill_mask_optimum_onnx.py", "onnx", "fill-mask"),
    ("fill_mask_optimum_intel.py", "openvino", "fill-mask ir"),
)
@pytest.mark.parametrize("text", MASKED)
def test_fill_mask(script: str, subject: str, text: str, run_on: Callable[..., Path], judge: dict[str, Any]) -> None:
    found = json.loads((run_on(script, subject, text) / "answer.json").read_text())
    wanted = judge["fill-mask"][text]
    assert [answer["score"] for answer in found] == pytest.approx(np.sort(wanted)[: -len(found) - 1 : -1], abs=FP32)
    for answer in found:
        assert answer["score"] == pytest.approx(wanted[judge["ids"][answer["token_str"]]], abs=FP32)


@cases(
    ("sparse_fastembed.py", "light", "fill-mask"),
    ("sparse_onnxruntime.py", "ort124", "sparse"),
)
def test_sparse_embeddings(script: str, subject: str, run_on: Callable[..., Path], judge: dict[str, Any]) -> None:
    found = np.load(run_on(script, subject, *TEXTS) / "embeddings.npy")
    np.testing.assert_allclose(found, judge["sparse"], rtol=0, atol=1e-4)  # logits of order 10


# --- libraries that run a checkpoint on PyTorch: the bundle answers as they do --------------------------------------


def test_sentence_transformers_on_the_checkpoint(
    bundle_for: Callable[[str], Path], checkpoints: dict[str, Path], run_script: Callable[..., Path]
) -> None:
    texts = TEXTS[:-1]  # the limit of a checkpoint is higher
    found = np.load(run_script("embed_sentence_transformers.py", checkpoints["embed"], *texts) / "embeddings.npy")
    wanted = gte_deploy.load(bundle_for("embed")).encode(texts)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FP32)


def test_cross_encoder_on_the_checkpoint(
    bundle_for: Callable[[str], Path], checkpoints: dict[str, Path], run_script: Callable[..., Path]
) -> None:
    texts = [QUERY, *DOCUMENTS[:-1]]
    found = np.load(run_script("rerank_sentence_transformers.py", checkpoints["classify"], *texts) / "scores.npy")
    wanted = gte_deploy.load(bundle_for("classify")).predict([(QUERY, document) for document in texts[1:]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FP32)


@pytest.mark.slow
def test_sparse_encoder_on_the_checkpoint(
    bundle_for: Callable[[str], Path], checkpoints: dict[str, Path], run_script: Callable[..., Path]
) -> None:
    texts = TEXTS[:-1]
    found = run_script("sparse_sentence_transformers.py", checkpoints["sparse"], *texts) / "embeddings.npy"
    wanted = gte_deploy.load(bundle_for("sparse")).encode_sparse(texts, convert_to_sparse_tensor=False)
    np.testing.assert_allclose(np.load(found), wanted, rtol=0, atol=1e-4)


def test_the_pipeline_of_transformers_on_the_checkpoint(
    bundle_for: Callable[[str], Path], checkpoints: dict[str, Path], run_script: Callable[..., Path]
) -> None:
    """It computes in FP16, the precision of the stored weights."""
    found = run_script("fill_mask_transformers.py", checkpoints["fill-mask"], MASKED[0]) / "answer.json"
    scores = {answer["token_str"]: answer["score"] for answer in json.loads(found.read_text())}
    wanted = gte_deploy.load(bundle_for("fill-mask")).fill_mask(MASKED[0])
    assert scores == pytest.approx({answer["token_str"]: answer["score"] for answer in wanted}, abs=5e-3)


# --- text-embeddings-inference, which cannot be run here: what its source reads ------------------------------------


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_what_text_embeddings_inference_reads(task: str, bundle_for: Callable[[str], Path]) -> None:
    """See docs/runtimes.md; its code is router/src/lib.rs and backends/ort/src/lib.rs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    bundle = bundle_for(task)
    session = onnxruntime.InferenceSession(bundle / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert not (bundle / "model.onnx").exists()  # it would be preferred
    assert {one.name: one.type for one in session.get_inputs()} == {
        "input_ids": "tensor(int64)",
        "attention_mask": "tensor(int64)",
    }
    answers = {one.name: (one.type, len(one.shape)) for one in session.get_outputs()}
    assert answers["sentence_embedding" if task == "embed" else "logits"] == ("tensor(float)", 2)

    config = json.loads((bundle / "config.json").read_text())
    assert config["model_type"] == "gte" and config["max_position_embeddings"] == MAX_LENGTH
    assert all(isinstance(config[name], int) for name in ("hidden_size", "num_hidden_layers", "pad_token_id"))
    (architecture,) = config["architectures"]
    assert architecture.endswith("Classification") == (task == "classify")
    assert json.loads((bundle / "tokenizer_config.json").read_text()).get("padding_side", "right") == "right"
    assert (bundle / "tokenizer.json").is_file()
    if task == "classify":
        assert config["id2label"] == {"0": "LABEL_0"} and config["label2id"] == {"LABEL_0": 0}
        return
    pooling = json.loads((bundle / "1_Pooling" / "config.json").read_text())
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    assert [pooling[f"pooling_mode_{mode}"] for mode in modes] == [False, True, False, False]
    assert json.loads((bundle / "sentence_bert_config.json").read_text())["max_seq_length"] == MAX_LENGTH

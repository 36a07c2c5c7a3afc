"""Bundles in onnxruntime-node, onnxruntime-web and transformers.js answer as PyTorch does on the checkpoint.

The scripts are the examples of docs/runtimes.md. The same script of transformers.js runs in Node.js and in Chromium.
`python tests/support/javascript.py` installs the packages; `make test-consumers` does that, too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gte_deploy.exporters.verification.answers.odd_texts import ODD_TEXTS
from gte_deploy.models import builtin_path

Array = NDArray[np.float32]

MAX_LENGTH = 64
LONG = "the old river runs through the city of the king " * 30
TEXTS = ["a river in an old city", "Über den Straßen von Köln", "中国的首都是北京。", "Съешь же ещё 😀", ""]
MASKED = ["The president of the united [MASK] of America.", "Die Stadt Köln liegt am [MASK].", "中国的[MASK]都是北京。"]
QUERY = "Which river runs through Köln?"

# The results differ by the rounding of FP32 sums, here and in WebAssembly; 4e-7 was measured. Embeddings have length 1,
# and scores are at most 1.
FP32 = 5e-6
# Measured for INT8: 0.9945 for the worst of these texts, which are short and not all in English.
INT8_COSINE = 0.99

pytestmark = pytest.mark.consumers


class Judge:
    """transformers on PyTorch, in FP32, from the checkpoint alone."""

    def __init__(self, checkpoint: Path, head: str) -> None:
        import torch
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.model = getattr(transformers, head).from_pretrained(checkpoint, dtype=torch.float32).eval()

    def all_ids(self, text: str, pair: str | None = None) -> list[int]:
        return self.tokenizer(text, pair)["input_ids"]

    def ids(self, text: str) -> list[int]:
        """The token ids of a text that is cut to the bundle's limit."""
        return self.tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]

    def outputs(self, ids: list[int]) -> Any:
        import torch

        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids]))

    def embedding(self, ids: list[int]) -> Array:
        """The mean of the hidden states, normalised: [H] float32."""
        mean = self.outputs(ids).last_hidden_state[0].mean(0).numpy()
        return mean / np.linalg.norm(mean)

    def embed(self, texts: list[str]) -> Array:
        return np.stack([self.embedding(self.ids(text)) for text in texts])


@pytest.fixture(scope="module")
def embedder(checkpoints: dict[str, Path]) -> Judge:
    return Judge(checkpoints["embed"], "AutoModel")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as a classifier with three labels and a head of random weights."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("labelled")
    model = AutoModelForSequenceClassification.from_pretrained(builtin_path(), num_labels=3, dtype=torch.float32)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)  # else all scores are near 1/3
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_path() / name, folder)
    return folder


@pytest.mark.parametrize("script", ["embed.mjs", "features.mjs"])
def test_embeddings(script: str, run: Callable[..., Any], address: Callable[[str], str], embedder: Judge) -> None:
    found = run(script, address("embed"), TEXTS)
    np.testing.assert_allclose(found, embedder.embed(TEXTS), rtol=0, atol=FP32)


def test_embeddings_in_int8(run: Callable[..., Any], address: Callable[[str], str], embedder: Judge) -> None:
    found = np.array(run("features.mjs", address("embed int8"), TEXTS))
    assert (found * embedder.embed(TEXTS)).sum(1).min() > INT8_COSINE


def test_transformers_js_cuts_a_long_text_without_its_last_token(
    run: Callable[..., Any], address: Callable[[str], str], embedder: Judge
) -> None:
    """It drops [SEP]; the answer is that of PyTorch on the same tokens, and close to that with [SEP]."""
    (found,) = run("embed.mjs", address("embed"), [LONG])
    np.testing.assert_allclose(found, embedder.embedding(embedder.all_ids(LONG)[:MAX_LENGTH]), rtol=0, atol=FP32)
    assert np.dot(found, embedder.embed([LONG])[0]) > 0.998  # 0.9985 was measured


@pytest.mark.parametrize(
    ("where", "script"), [("in_node", "onnxruntime_node.mjs"), ("in_chromium", "onnxruntime_web.mjs")]
)
@pytest.mark.parametrize("text", [*TEXTS, LONG], ids=["english", "german", "chinese", "russian", "empty", "long"])
def test_onnxruntime(
    where: str,
    script: str,
    text: str,
    address: Callable[[str], str],
    embedder: Judge,
    request: pytest.FixtureRequest,
) -> None:
    found = np.array(request.getfixturevalue(where)(script, address("embed"), text))
    np.testing.assert_allclose(found / np.linalg.norm(found), embedder.embed([text])[0], rtol=0, atol=FP32)


@pytest.mark.parametrize(("subject", "bound"), [("fill-mask", FP32), ("fill-mask int8", 0.05)])
def test_fill_mask(subject: str, bound: float, run: Callable[..., Any], address: Callable[[str], str]) -> None:
    """`bound`: of a probability; INT8 is compared for the answers that it gives."""
    judge = Judge(builtin_path(), "AutoModelForMaskedLM")
    for text, found in zip(MASKED, run("fill_mask.mjs", address(subject), MASKED), strict=True):
        ids = judge.ids(text)
        wanted = judge.outputs(ids).logits[0, ids.index(judge.tokenizer.mask_token_id)].softmax(-1).numpy()
        assert [answer["score"] for answer in found] == pytest.approx(np.sort(wanted)[:-6:-1].tolist(), abs=bound)
        for answer in found:
            assert answer["score"] == pytest.approx(wanted[answer["token"]], abs=bound)
            assert answer["token_str"] == judge.tokenizer.decode([answer["token"]])


def test_rerank(run: Callable[..., Any], address: Callable[[str], str], checkpoints: dict[str, Path]) -> None:
    judge = Judge(checkpoints["classify"], "AutoModelForSequenceClassification")
    pairs = [judge.all_ids(QUERY, text)[:MAX_LENGTH] for text in (*TEXTS, LONG)]  # transformers.js drops the last [SEP]
    wanted = [judge.outputs(ids).logits[0, 0].sigmoid().item() for ids in pairs]
    assert run("rerank.mjs", address("classify"), QUERY, [*TEXTS, LONG]) == pytest.approx(wanted, abs=FP32)


def test_text_classification(
    run: Callable[..., Any], address: Callable[[str | Path], str], labelled: Path, bundle_of: Callable[..., Path]
) -> None:
    judge = Judge(labelled, "AutoModelForSequenceClassification")
    bundle = address(bundle_of(labelled, max_length=MAX_LENGTH))
    for text, found in zip(TEXTS, run("classify.mjs", bundle, TEXTS), strict=True):
        scores = judge.outputs(judge.ids(text)).logits[0].softmax(-1).tolist()
        wanted = {judge.model.config.id2label[label]: score for label, score in enumerate(scores)}
        assert {answer["label"]: answer["score"] for answer in found} == pytest.approx(wanted, abs=FP32)


def test_token_ids(run: Callable[..., Any], address: Callable[[str], str], embedder: Judge) -> None:
    """Texts with a capital sigma at the end of a word differ, and those with ideographs beyond the first plane."""
    found = run("token_ids.mjs", address("embed"), ODD_TEXTS)
    wanted = [embedder.all_ids(text) for text in ODD_TEXTS]
    differs = re.compile(r"Σ\b|[\U00020000-\U0003FFFF]")
    assert [bool(differs.search(text)) for text in ODD_TEXTS] == [a != b for a, b in zip(found, wanted, strict=True)]

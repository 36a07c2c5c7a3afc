"""Every family on a real Triton: each task answers as the checkpoint's own library does.

A further family is one more value of `family_checkpoints.PREFIXES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

from factories import add_multi_vector_modules  # noqa: E402
from family_checkpoints import (  # noqa: E402
    MASKS,
    PREFIXES,
    make_embedder,
    make_family_checkpoint,
    make_reranker,
)
from gte_deploy.exporters.triton.checks import check_repository  # noqa: E402
from triton_server import Server  # noqa: E402

pytestmark = pytest.mark.xdist_group("triton")

TEXTS = ["the old river", "Paris is a city, and the river is old!", "", "the unknownword река"]
PAIRS = [("the river", "Paris is old"), ("Paris", "the old city and the river is old"), ("река", "")]
LABELS = ("O", "B-PER", "I-PER", "LOC")
TOLERANCE = {"rtol": 0, "atol": 1e-4}
# On each family one task, together every task that a family has tensors of its own for; the rest takes minutes.
QUICK = {("bert", "classify"), ("roberta", "fill-mask"), ("xlm-roberta", "embed")}
TASKS = ("fill-mask", "embed", "classify", "token-classify", "sparse", "hybrid", "multi-vector")
CASES = [
    pytest.param(kind, task, marks=() if (kind, task) in QUICK else pytest.mark.slow)
    for kind in PREFIXES
    for task in TASKS
]


def make(folder: Path, kind: str, task: str) -> Path:
    """A checkpoint of the family for the task, as its own library saves it."""
    match task:
        case "embed":
            return make_embedder(folder, kind, pooling="cls", normalize=True, prompts={"query": "the river: "})
        case "classify":
            return make_reranker(folder, kind)
        case "sparse":
            source = make_family_checkpoint(folder.with_name("mlm"), kind)
            modules = sentence_transformers.sparse_encoder.modules
            parts = [modules.MLMTransformer(str(source)), modules.SpladePooling("max")]
            sentence_transformers.SparseEncoder(modules=parts, device="cpu").save_pretrained(str(folder))
            return folder
        case "hybrid":
            return make_family_checkpoint(folder, kind, "token-classify")
        case "multi-vector":
            source = make_family_checkpoint(folder, kind, "embed")
            config = {"prompts": {"query": "the river: ", "document": ""}}
            # A token of ModernBERT attends to near ones, and none of those may have attention.
            expansion = {"strategy": "min", "length": 20, "attend": kind == "modernbert"}
            transformer = {"query_length": 48, "query_expansion": expansion}
            mask = {"skiplist_words": [".", ","]}
            options = {"library": "sentence-transformers", "config": config, "transformer": transformer, "mask": mask}
            return add_multi_vector_modules(source, **options)
        case "token-classify":
            return make_family_checkpoint(folder, kind, task, labels=LABELS)
    return make_family_checkpoint(folder, kind, task)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_family_is_served_as_its_own_library_answers(
    kind: str,
    task: str,
    triton: Path,
    repository_of: Callable[..., Path],
    connect: Callable[..., Any],
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxscript")
    from gte_deploy.exporters.export import export

    checkpoint = make(tmp_path / "checkpoint", kind, task)
    bundle = export(checkpoint, tmp_path / "bundle", **({"task": task} if task in ("hybrid", "sparse") else {})).path
    repository = repository_of(bundle)
    assert check_repository(repository) == []
    with Server(repository, folder=triton) as server:
        for protocol, tokenizer in (("http", None), ("grpc", checkpoint)):
            with connect(server, protocol, tokenizer=tokenizer) as client:
                CHECKS[task](client, checkpoint, kind)


def check_masks(client: Any, checkpoint: Path, kind: str) -> None:
    pipe = transformers.pipeline("fill-mask", model=str(checkpoint), device="cpu")
    for text in (f"the {MASKS[kind]} is old", f"{MASKS[kind]} the river and the city"):
        found, expected = client.fill_mask(text, top_k=5), pipe(text, top_k=5)
        for key in ("token", "token_str", "sequence"):
            assert [answer[key] for answer in found] == [answer[key] for answer in expected]
        np.testing.assert_allclose([a["score"] for a in found], [a["score"] for a in expected], rtol=1e-3)


def check_embeddings(client: Any, checkpoint: Path, kind: str) -> None:
    own = sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")
    np.testing.assert_allclose(client.encode(TEXTS), own.encode(TEXTS), **TOLERANCE)
    np.testing.assert_allclose(client.encode_query(TEXTS), own.encode_query(TEXTS), **TOLERANCE)
    assert np.abs(own.encode_query(TEXTS) - own.encode(TEXTS)).max() > 1e-2, "the prompt makes a difference"


def check_scores(client: Any, checkpoint: Path, kind: str) -> None:
    own = sentence_transformers.CrossEncoder(str(checkpoint), device="cpu")
    expected = own.predict(PAIRS)
    np.testing.assert_allclose(client.predict(PAIRS), expected, **TOLERANCE)
    ours, theirs = (model.rank("the river", TEXTS[:2]) for model in (client, own))
    assert [item["corpus_id"] for item in ours] == [item["corpus_id"] for item in theirs]
    if client.spec.token_types:
        # What a model without token types would answer is something else.
        flat = own.tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
        flat["token_type_ids"].zero_()
        with torch.inference_mode():
            scores = torch.sigmoid(own.model(**flat).logits[:, 0]).numpy()
        assert np.abs(scores - expected).max() > 1e-2
    assert client.spec.token_types == (kind in ("bert", "nomic_bert"))


def check_tags(client: Any, checkpoint: Path, kind: str) -> None:
    pipe = transformers.pipeline("token-classification", model=str(checkpoint), device="cpu", ignore_labels=[])
    for text in TEXTS[:2]:
        found, expected = client.classify_tokens(text, ignore_labels=()), pipe(text)
        for key in ("entity", "word", "start", "end"):
            assert [entity[key] for entity in found] == [entity[key] for entity in expected], key
        np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], **TOLERANCE)


def check_weights(client: Any, checkpoint: Path, kind: str) -> None:
    own = sentence_transformers.SparseEncoder(str(checkpoint), device="cpu")
    expected = own.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    vocabulary = own.tokenizer.get_vocab()
    for row, weights in zip(expected, client.encode_sparse(TEXTS), strict=True):
        found = np.zeros_like(row)
        for word, weight in weights.items():
            found[vocabulary[word]] = weight
        np.testing.assert_allclose(found, row, **TOLERANCE)


def check_both(client: Any, checkpoint: Path, kind: str) -> None:
    """By the definition: the first token's state, and the largest positive logit of each token that is not special."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    found = client.encode_hybrid(TEXTS)
    for text, dense, sparse in zip(TEXTS, found.dense, found.sparse, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**encoded, output_hidden_states=True)
        np.testing.assert_allclose(dense, outputs.hidden_states[-1][0, 0].numpy(), **TOLERANCE)
        expected: dict[str, float] = {}
        for token, weight in zip(encoded["input_ids"][0].tolist(), outputs.logits[0, :, 0].tolist(), strict=True):
            if token not in tokenizer.all_special_ids and weight > 0:
                name = tokenizer.decode([token])  # as in gte-multilingual-base's dictionaries
                expected[name] = max(weight, expected.get(name, 0.0))
        assert sparse == pytest.approx(expected, abs=1e-4)


def check_late_interaction(client: Any, checkpoint: Path, kind: str) -> None:
    own = sentence_transformers.MultiVectorEncoder(str(checkpoint), device="cpu")
    sides = []
    for call in ("encode_query", "encode_document"):
        found, expected = (getattr(model, call)(TEXTS) for model in (client, own))
        sides.append((found, expected))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), **TOLERANCE)
    (queries, their_queries), (documents, their_documents) = sides
    expected = own.similarity(their_queries, their_documents).numpy()
    np.testing.assert_allclose(client.similarity(queries, documents), expected, rtol=1e-4, atol=1e-4)


CHECKS: dict[str, Callable[[Any, Path, str], None]] = {
    "fill-mask": check_masks,
    "embed": check_embeddings,
    "classify": check_scores,
    "token-classify": check_tags,
    "sparse": check_weights,
    "hybrid": check_both,
    "multi-vector": check_late_interaction,
}

"""Every other kind of checkpoint on a real Triton: rerankers, sparse models, prompts; and the response cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_tokens, make_checkpoint, raise_token_weights, write_labels
from gte_deploy.core.errors import InputError
from runtime_models import make_word_checkpoint
from triton_server import Server

pytestmark = pytest.mark.xdist_group("triton")

PROTOCOLS = ("http", "grpc")


@pytest.fixture
def serve(triton: Path, bundle_of: Callable[..., Path], repository_of: Callable[..., Path]) -> Callable[..., Any]:
    """`serve(checkpoint, *server_options, task=None, **repository_options)`: a server for a `with` block."""

    def start(checkpoint: Path, *arguments: str, task: str | None = None, **options: Any) -> Any:
        bundle = bundle_of(checkpoint) if task is None else bundle_of(checkpoint, task=task)
        return Server(repository_of(bundle, **options), *arguments, folder=triton)

    return start


def assert_close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_reranker(
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    load_on: Callable[..., Any],
    word_checkpoints: dict[str, Path],
):
    checkpoint = word_checkpoints["classify"]
    pairs = [("the king", "the queen"), ("paris", "a city of france " * 9), ("the river",), ("", "中国")]
    long = [("the king", "the queen " * 80)] * 2
    with serve(checkpoint) as server, load_on("onnx", checkpoint, num_threads=1) as local:
        for protocol, tokenizer in (*product(PROTOCOLS, (None,)), ("grpc", checkpoint)):
            with connect(server, protocol, tokenizer=tokenizer) as client:
                assert_close(client.predict(pairs), local.predict(pairs))
                assert_close(client.predict(pairs[0]), local.predict(pairs[0]))
                assert_close(client.predict(long, truncation=True), local.predict(long, truncation=True))
                with pytest.raises(InputError, match="input 0 has 165 tokens"):
                    client.predict(long)
                ours, theirs = (model.rank("king", ["queen", "river", "time"]) for model in (client, local))
                assert [item["corpus_id"] for item in ours] == [item["corpus_id"] for item in theirs]
                assert_close([item["score"] for item in ours], [item["score"] for item in theirs])
                assert_close(client.encode("the king"), local.encode("the king"))


def test_labels_of_tokens(
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    load_on: Callable[..., Any],
    tmp_path: Path,
):
    labels = ("O", "B-PER", "I-PER", "LOC")
    checkpoint = make_word_checkpoint(tmp_path / "tagger", task="token-classify", num_labels=len(labels), seed=5)
    write_labels(checkpoint, labels)
    texts = ["the king, readable café (中国)!", "", "paris is a city of france 🙂", *["the queen"] * 9]
    with serve(checkpoint) as server, load_on("onnx", checkpoint, num_threads=1) as local:
        for protocol in PROTOCOLS:
            with connect(server, protocol) as client:
                for options in (
                    {},
                    {"ignore_labels": ()},
                    {"aggregation_strategy": "simple"},
                    {"aggregation_strategy": "average", "ignore_labels": ["PER"]},
                ):
                    ours, theirs = (model.classify_tokens(texts, **options) for model in (client, local))
                    assert [[{**e, "score": 0} for e in each] for each in ours] == [
                        [{**e, "score": 0} for e in each] for each in theirs
                    ]
                    assert_close([e["score"] for e in sum(ours, [])], [e["score"] for e in sum(theirs, [])])
                assert client.classify_tokens(texts[0])[0].keys() == local.classify_tokens(texts[0])[0].keys()
                long = "the king " * 100
                with pytest.raises(InputError, match="input 1 has 202 tokens"):
                    client.classify_tokens([texts[0], long])
                assert len(client.classify_tokens(long, truncation=True, ignore_labels=())) == 126
                for ours, theirs in zip(client.predict(texts), local.predict(texts), strict=True):
                    assert_close(ours, theirs)


def test_pairs_with_token_types(
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    tmp_path: Path,
):
    from sentence_transformers import CrossEncoder

    options = {"task": "classify", "num_labels": 3, "type_vocab_size": 2, "layers": 1, "seed": 2}
    checkpoint = make_word_checkpoint(tmp_path / "typed", **options)
    pairs = [("the king", "the queen"), ("paris", "a city of france " * 9), ("", "中国")]
    expected = CrossEncoder(str(checkpoint), device="cpu").predict(pairs)
    with serve(checkpoint) as server:
        for protocol, tokenizer in (*product(PROTOCOLS, (None,)), ("grpc", checkpoint)):
            with connect(server, protocol, tokenizer=tokenizer) as client:
                np.testing.assert_allclose(client.predict(pairs), expected, atol=1e-4)
                (states,) = client.encode(["the king"], output_value=None)
                assert states["token_type_ids"].tolist() == [0] * len(states["input_ids"])


def test_sparse(
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    bundle_of: Callable[..., Path],
    tmp_path: Path,
):
    checkpoint = make_checkpoint(tmp_path / "sparse", task="token-classify", max_positions=128)
    texts = ["w5 w6 w5 w200", "", "w7 w8 w9 w10 w11 w12 unknown"]
    expected = [sparse_weights(bundle_of(checkpoint), text) for text in texts]
    assert expected[0] and expected[2] and not expected[1]
    with serve(checkpoint) as server:
        for protocol, tokenizer in (*product(PROTOCOLS, (None,)), ("grpc", checkpoint)):
            with connect(server, protocol, tokenizer=tokenizer) as client:
                answers = client.encode_sparse(texts)
                for ours, theirs in zip(answers, expected, strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-5)
                    assert list(ours.values()) == sorted(ours.values(), reverse=True)
                assert client.encode_sparse(texts[0]) == answers[0]


def test_hybrid(
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    bundle_of: Callable[..., Path],
    tmp_path: Path,
):
    checkpoint = make_word_checkpoint(tmp_path / "hybrid", task="token-classify", seed=3, pooling="cls")
    bundle = bundle_of(raise_token_weights(checkpoint), task="hybrid")
    texts = ["the king and the queen", "", "[MASK] unknownword 中国", *["the queen"] * 9]
    options = {"normalize_embeddings": True, "max_active_dims": 4}
    with serve(checkpoint, task="hybrid") as server, gte_deploy.load(bundle, backend="onnx", num_threads=1) as local:
        expected = local.encode_hybrid(texts, as_dict=True, **options)
        for protocol, tokenizer in (*product(PROTOCOLS, (None,)), ("grpc", checkpoint)):
            with connect(server, protocol, tokenizer=tokenizer) as client:
                found = client.encode_hybrid(texts, **options)
                assert_close(found.dense, expected.dense)
                for ours, theirs in zip(found.sparse, expected.sparse, strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-5)
                assert_close(client.encode(texts, normalize_embeddings=True), expected.dense)
                assert client.encode_sparse(texts, max_active_dims=4) == found.sparse


@pytest.mark.parametrize("attended", [False, True])
def test_late_interaction(
    attended: bool,
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    load_on: Callable[..., Any],
    tmp_path: Path,
):
    """A model of PyLate: MultiVectorEncoder is the judge of answers, the local model of options and errors."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")
    checkpoint = add_tokens(make_word_checkpoint(tmp_path / "late", task="embed", seed=4), ["[Q] ", "[D] "])
    settings = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 60}
    prompts = {"query": "to the ", "document": ""}
    add_multi_vector_modules(
        checkpoint, config={**settings, "prompts": prompts, "attend_to_expansion_tokens": attended}
    )
    own = sentence_transformers.MultiVectorEncoder(str(checkpoint), device="cpu")
    texts = ["the king, and the queen?", "", "中国 — żółw 🐢 readable", "Paris", *["the river (is) not old!"] * 9]
    with serve(checkpoint) as server, load_on("onnx", checkpoint, num_threads=1) as local:
        for protocol, tokenizer in (*product(PROTOCOLS, (None,)), ("grpc", checkpoint)):
            with connect(server, protocol, tokenizer=tokenizer) as client:
                for call in ("encode_query", "encode_document"):
                    found = getattr(client, call)(texts, truncation=True)
                    for ours, theirs in zip(found, getattr(own, call)(texts), strict=True):
                        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)
                    for options in (
                        {"max_length": 20},
                        {"skip_words": ["the", "king"], "normalize_embeddings": False, "prompt": ""},
                    ):
                        ours, theirs = (getattr(each, call)(texts[0], **options) for each in (client, local))
                        assert_close(ours, theirs)
                ours, theirs = (each.rank(texts[3], texts[:9], truncation=True) for each in (client, local))
                assert [item["corpus_id"] for item in ours] == [item["corpus_id"] for item in theirs]
                assert_close([item["score"] for item in ours], [item["score"] for item in theirs])
                for call, limit in ((client.encode_query, 12), (client.encode_document, 60)):
                    with pytest.raises(InputError, match=f"input 1 has at least .* the limit is {limit}"):
                        call(["a", "the king " * 200])
                with pytest.raises(InputError, match="use encode_query, encode_document"):
                    client.encode("a")


def sparse_weights(bundle: Path, text: str) -> dict[str, float]:
    """By the definition, one text at a time: the largest positive logit of each token that is not special."""
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    fed = {name: np.array([ids]) for name, ids in tokenizer(text).items() if name in ("input_ids", "attention_mask")}
    logits = onnxruntime.InferenceSession(bundle / "onnx" / "model.onnx").run(["logits"], fed)[0]
    weights: dict[str, float] = {}
    for token, weight in zip(fed["input_ids"][0].tolist(), logits[0, :, 0].tolist(), strict=True):
        if token not in tokenizer.all_special_ids and weight > 0:
            name = tokenizer.convert_ids_to_tokens(token)
            weights[name] = max(weight, weights.get(name, 0.0))
    return weights


def test_prompts_and_the_response_cache(
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    load_on: Callable[..., Any],
    word_checkpoints: dict[str, Path],
):
    import tritonclient.grpc

    checkpoint = word_checkpoints["embed"]
    options: tuple[dict[str, Any], ...] = (
        {},
        {"prompt_name": "query"},
        {"normalize_embeddings": True},
        {"truncate_dim": 8},
    )
    with (
        serve(checkpoint, "--cache-config=local,size=1048576", response_cache=True) as server,
        load_on("onnx", checkpoint, num_threads=1) as local,
        tritonclient.grpc.InferenceServerClient(server.grpc) as raw,
        connect(server, "grpc") as client,
    ):
        for _ in range(2):  # the second time from the cache
            for each in options:
                assert_close(client.encode("the king", **each), local.encode("the king", **each))
        (statistics,) = raw.get_inference_statistics("gte_embed", as_json=True)["model_stats"]
        assert int(statistics["inference_stats"]["cache_hit"]["count"]) == len(options)
        assert_close(client.encode_document(["the king", "paris"]), local.encode_document(["the king", "paris"]))
        with connect(server, "grpc", tokenizer=checkpoint) as by_ids:
            for each in options:
                assert_close(by_ids.encode(["the king", "paris"], **each), local.encode(["the king", "paris"], **each))
            assert_close(by_ids.encode_document("the king"), local.encode_document("the king"))

"""The answers of the routes that ask a model, against sentence-transformers and transformers."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
import transformers

import gte_deploy
from factories import add_multi_vector_modules, add_tokens
from hybrid_reference import hybrid_reference, make_hybrid_checkpoint
from runtime_models import make_word_checkpoint

TEXTS = ["Paris is the capital of France.", "the king", "a good book to read, and a bad man"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def ask(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def sentence_transformer(task_checkpoints):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(task_checkpoints["embed"]), device="cpu")


@pytest.fixture(scope="module")
def cross_encoder(task_checkpoints):
    from sentence_transformers import CrossEncoder

    return {name: CrossEncoder(str(task_checkpoints[name]), device="cpu") for name in ("rank", "labels")}


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_embed(client, sentence_transformer):
    expected = sentence_transformer.encode(TEXTS)
    np.testing.assert_allclose(ask(client, "/embed", {"inputs": TEXTS}), unit(expected), **TOLERANCE)
    plain = ask(client, "/embed", {"inputs": TEXTS, "normalize": False})
    np.testing.assert_allclose(plain, expected, **TOLERANCE)
    assert ask(client, "/embed", {"inputs": TEXTS[0]}) == ask(client, "/embed", {"inputs": TEXTS[:1]})


def test_prompts_and_dimensions(client, sentence_transformer):
    expected = sentence_transformer.encode(TEXTS, prompt_name="query", truncate_dim=7)
    found = ask(client, "/embed", {"inputs": TEXTS, "prompt_name": "query", "dimensions": 7, "normalize": False})
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_embeddings_in_base64_are_the_same_numbers(client):
    for path, field in (("/embed", "inputs"), ("/v1/embeddings", "input")):
        plain = ask(client, path, {field: TEXTS})
        coded = ask(client, path, {field: TEXTS, "encoding_format": "base64"})
        if path == "/v1/embeddings":
            plain, coded = ([entry["embedding"] for entry in answer["data"]] for answer in (plain, coded))
        assert [np.frombuffer(base64.b64decode(each), "<f4").tolist() for each in coded] == [
            np.array(each, np.float32).tolist() for each in plain
        ]


def test_embed_all(client, sentence_transformer):
    expected = sentence_transformer.encode(TEXTS, output_value="token_embeddings")
    found = ask(client, "/embed_all", {"inputs": TEXTS})
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), **TOLERANCE)


def test_a_long_text_is_refused_or_cut(client, sentence_transformer):
    long = "the old city " * 100
    response = client.post("/embed", json={"inputs": ["a", long]})
    assert response.status_code == 422 and "input 1" in response.json()["error"]
    assert 'Send "truncate": true' in response.json()["error"]
    found = ask(client, "/embed", {"inputs": long, "truncate": True, "truncation_direction": "Right"})
    np.testing.assert_allclose(found, unit(sentence_transformer.encode([long])), **TOLERANCE)


def test_the_server_can_cut_by_default(client_of):
    with client_of(auto_truncate=True) as client:
        assert client.post("/embed", json={"inputs": "the old city " * 100}).status_code == 200
        assert client.post("/embed", json={"inputs": "the " * 200, "truncate": False}).status_code == 422


def test_token_ids_stand_for_their_text(client, served):
    tokenizer = served["embed"].tokenizer
    expected = ask(client, "/embed", {"inputs": TEXTS})
    for special in (True, False):
        ids = [tokenizer.encode(text, add_special_tokens=special) for text in TEXTS]
        np.testing.assert_array_equal(ask(client, "/embed", {"inputs": ids}), expected)
        assert ask(client, "/embed", {"inputs": ids[0]}) == expected[:1]
    mixed = ask(client, "/embed", {"inputs": [TEXTS[0], tokenizer.encode(TEXTS[1])]})
    np.testing.assert_array_equal(mixed, expected[:2])


def test_token_ids_of_another_tokenizer_are_refused(client, served):
    tokenizer = served["embed"].tokenizer
    response = client.post("/v1/embeddings", json={"input": [[9906, 1917]]})
    assert response.status_code == 422 and "input[0] has the token id 9,906" in response.json()["error"]["message"]
    # No text is cut into these: "##s" cannot begin a word.
    ids = tokenizer.convert_tokens_to_ids(["##s", "##s", "the"])
    response = client.post("/embed", json={"inputs": [ids]})
    assert response.status_code == 422 and "send the text" in response.json()["error"]


def test_rerank(client, cross_encoder):
    query = "the capital"
    expected = cross_encoder["rank"].rank(query, TEXTS)
    found = ask(client, "/rerank", {"query": query, "texts": TEXTS, "return_text": True})
    assert [entry["index"] for entry in found] == [entry["corpus_id"] for entry in expected]
    assert [entry["text"] for entry in found] == [TEXTS[entry["index"]] for entry in found]
    np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], **TOLERANCE)
    raw = ask(client, "/rerank", {"query": query, "texts": TEXTS, "raw_scores": True})
    scores = np.array([entry["score"] for entry in raw])
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), [e["score"] for e in expected], **TOLERANCE)
    assert all(set(entry) == {"index", "score"} for entry in raw)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_of_cohere_and_jina(client, cross_encoder, path):
    expected = cross_encoder["rank"].rank("the capital", TEXTS, top_k=2)
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    body = {"model": "rank", "query": "the capital", "documents": documents, "top_n": 2, "return_documents": True}
    found = ask(client, path, body)
    assert [(e["index"], e["document"]["text"]) for e in found["results"]] == [
        (e["corpus_id"], TEXTS[e["corpus_id"]]) for e in expected
    ]
    np.testing.assert_allclose(
        [e["relevance_score"] for e in found["results"]], [e["score"] for e in expected], **TOLERANCE
    )
    assert found["model"] == "rank" and found["usage"]["total_tokens"] > 0


def test_predict(client, cross_encoder):
    pairs = [("the king", "the queen"), ("a city", "water")]
    expected = cross_encoder["labels"].predict(pairs, apply_softmax=True)
    found = ask(client, "/predict", {"model": "labels", "inputs": [list(pair) for pair in pairs]})
    for ours, theirs in zip(found, expected, strict=True):
        assert [entry["score"] for entry in ours] == sorted((entry["score"] for entry in ours), reverse=True)
        np.testing.assert_allclose(
            [entry["score"] for entry in sorted(ours, key=lambda entry: entry["label"])], theirs, **TOLERANCE
        )
    raw = ask(client, "/predict", {"model": "labels", "inputs": list(pairs[0]), "raw_scores": True})
    logits = cross_encoder["labels"].predict([pairs[0]])[0]
    np.testing.assert_allclose([e["score"] for e in raw], sorted(logits, reverse=True), **TOLERANCE)


def test_predict_in_the_form_of_the_inference_api(client):
    plain = ask(client, "/predict", {"model": "labels", "inputs": "the king"})
    found = ask(client, "/predict", {"model": "labels", "inputs": "the king", "parameters": {"top_k": 2}})
    assert found == [plain[:2]]
    independent = ask(
        client,
        "/predict",
        {"model": "labels", "inputs": "the king", "parameters": {"function_to_apply": "sigmoid"}},
    )
    raw = ask(client, "/predict", {"model": "labels", "inputs": "the king", "raw_scores": True})
    np.testing.assert_allclose(
        [e["score"] for e in independent[0]], [1 / (1 + np.exp(-e["score"])) for e in raw], **TOLERANCE
    )


def test_similarity(client, sentence_transformer):
    from sentence_transformers.util import cos_sim

    vectors = sentence_transformer.encode(TEXTS)
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    found = ask(client, "/similarity", {"inputs": inputs})
    np.testing.assert_allclose(found, cos_sim(vectors[:1], vectors[1:])[0], **TOLERANCE)
    assert ask(client, "/similarity", {"inputs": inputs, "parameters": {}}) == found


def test_embed_sparse(client, task_checkpoints):
    """As SparseEncoder makes of the same masked-LM checkpoint: max over the tokens of log(1 + relu(logit))."""
    from sentence_transformers import sparse_encoder
    from sentence_transformers.base.modules import Transformer

    head = Transformer(str(task_checkpoints["mask"]), transformer_task="fill-mask")
    judge = sparse_encoder.SparseEncoder(modules=[head, sparse_encoder.modules.SpladePooling("max")], device="cpu")
    expected = judge.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    found = ask(client, "/embed_sparse", {"inputs": TEXTS})
    np.testing.assert_allclose(weights_of(found, expected.shape[1]), expected, **TOLERANCE)


def weights_of(found, size):
    """Weights [N, V] of the entries of an answer, which come in the order of the vocabulary."""
    weights = np.zeros((len(found), size))
    for row, entries in zip(weights, found, strict=True):
        indices = [entry["index"] for entry in entries]
        assert indices == sorted(set(indices))
        row[indices] = [entry["value"] for entry in entries]
    return weights


def test_embed_hybrid(client_of, tmp_path, bundle_of):
    """Both vectors, against transformers' token classifier in float64."""
    checkpoint = make_hybrid_checkpoint(tmp_path / "checkpoint")
    dense, weights = (np.stack(half) for half in zip(*(hybrid_reference(checkpoint, t) for t in TEXTS), strict=True))
    prefixed = np.stack([hybrid_reference(checkpoint, f"the query: {text}")[0] for text in TEXTS])
    with (
        gte_deploy.load(bundle_of(checkpoint, task="hybrid"), join_calls=True) as model,
        client_of({"both": model}) as client,
    ):
        found = ask(client, "/embed_hybrid", {"inputs": TEXTS})
        np.testing.assert_allclose(found["dense"], dense, **TOLERANCE)
        np.testing.assert_allclose(weights_of(found["sparse"], weights.shape[1]), weights, rtol=0, atol=2e-5)
        sparse = ask(client, "/embed_sparse", {"inputs": TEXTS})
        np.testing.assert_allclose(weights_of(sparse, weights.shape[1]), weights, rtol=0, atol=2e-5)
        np.testing.assert_allclose(ask(client, "/embed", {"inputs": TEXTS}), dense, **TOLERANCE)
        short = ask(client, "/embed_hybrid", {"inputs": TEXTS, "dimensions": 8, "prompt_name": "query"})
        np.testing.assert_allclose(short["dense"], unit(prefixed[:, :8]), **TOLERANCE)
        refused = client.post("/embed_hybrid", json={"inputs": TEXTS, "dimensions": 33})
        assert refused.status_code == 422 and "have 32" in refused.json()["error"]


def test_embed_multi_vector_of_a_multi_vector_model(client_of, tmp_path, bundle_of):
    """Queries and documents, against sentence-transformers' MultiVectorEncoder."""
    from sentence_transformers import MultiVectorEncoder

    folder = make_word_checkpoint(tmp_path / "colbert", task="embed", seed=4)
    add_tokens(folder, ["[Q] ", "[D] "])
    prompts = {"query": "the query: ", "document": "the "}
    add_multi_vector_modules(folder, library="sentence-transformers", mask={}, config={"prompts": prompts})
    judge = MultiVectorEncoder(str(folder), device="cpu")
    bundle = bundle_of(folder, task="multi-vector")
    with gte_deploy.load(bundle, join_calls=True) as model, client_of({"late": model}) as client:
        for is_query, encode in ((True, judge.encode_query), (False, judge.encode_document)):
            found = ask(client, "/embed_multi_vector", {"inputs": TEXTS, "is_query": is_query})
            for ours, theirs in zip(found, encode(TEXTS), strict=True):
                np.testing.assert_allclose(ours, np.asarray(theirs), **TOLERANCE)
        refused = client.post("/embed_multi_vector", json={"inputs": TEXTS})
        assert refused.status_code == 422 and "is_query" in refused.json()["error"]
        scores = judge.similarity(judge.encode_query(["the king"]), judge.encode_document(TEXTS))[0].tolist()
        ranking = ask(client, "/rerank", {"query": "the king", "texts": TEXTS})
        assert [entry["index"] for entry in ranking] == sorted(range(len(TEXTS)), key=lambda i: -scores[i])
        found_scores = [scores[entry["index"]] for entry in ranking]
        np.testing.assert_allclose([entry["score"] for entry in ranking], found_scores, **TOLERANCE)


def test_fill_mask(client, task_checkpoints):
    judge = transformers.pipeline("fill-mask", str(task_checkpoints["mask"]), dtype="float32", device="cpu")
    text = "Paris is the [MASK] of France."
    texts = [text, "a [MASK] [MASK]"]
    found = ask(client, "/fill-mask", {"inputs": texts, "parameters": {"top_k": 3}})
    everything = [judge(each, top_k=judge.model.config.vocab_size) for each in texts]
    for ours, theirs in zip([found[0], *found[1]], [everything[0], *everything[1]], strict=True):
        # The pipeline also gives rows that only fill the vocabulary up.
        assert_candidates(ours, [entry for entry in theirs if entry["token"] < len(judge.tokenizer)][:3])
    targets = ["city", "king"]
    chosen = ask(client, "/fill-mask", {"inputs": text, "parameters": {"targets": targets, "top_k": 2}})
    assert_candidates(chosen, judge(text, targets=targets, top_k=2))


def assert_candidates(found, expected):
    for name in ("token", "token_str", "sequence"):
        assert [entry[name] for entry in found] == [entry[name] for entry in expected]
    np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], **TOLERANCE)


@pytest.mark.parametrize("strategy", ["none", "simple", "average"])
def test_classify_tokens(client, task_checkpoints, strategy):
    parameters = {"aggregation_strategy": strategy, "ignore_labels": []}
    folder = str(task_checkpoints["tags"])
    judge = transformers.pipeline("token-classification", folder, dtype="float32", device="cpu", **parameters)
    found = ask(client, "/classify_tokens", {"inputs": TEXTS, "parameters": parameters})
    for ours, theirs in zip(found, judge(TEXTS), strict=True):
        assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
        names = ours[0].keys() - {"score"}
        assert [{name: e[name] for name in names} for e in ours] == [{name: e[name] for name in names} for e in theirs]
        np.testing.assert_allclose([e["score"] for e in ours], [e["score"] for e in theirs], **TOLERANCE)


def test_tokenize_and_decode(client, task_checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task_checkpoints["embed"])
    text = "Paris isn't old: 中国"
    (found,) = ask(client, "/tokenize", {"inputs": text})
    assert [token["id"] for token in found] == tokenizer(text)["input_ids"]
    assert [token["special"] for token in found] == [True, *[False] * (len(found) - 2), True]
    assert all(token["text"] == text[token["start"] : token["stop"]] for token in found[1:-1])
    (bare,) = ask(client, "/tokenize", {"inputs": text, "add_special_tokens": False})
    assert bare == found[1:-1]
    ids = [token["id"] for token in found]
    assert ask(client, "/decode", {"ids": ids}) == [tokenizer.decode(ids, skip_special_tokens=True)]
    assert ask(client, "/decode", {"ids": [ids], "skip_special_tokens": False}) == [tokenizer.decode(ids)]


def test_embed_multi_vector(client, sentence_transformer):
    states = sentence_transformer.encode(TEXTS, output_value="token_embeddings")
    found = ask(client, "/embed_multi_vector", {"inputs": TEXTS, "model": "embed"})
    for ours, theirs in zip(found, states, strict=True):
        np.testing.assert_allclose(ours, unit(theirs.numpy()), **TOLERANCE)


def test_openai_embeddings(client, sentence_transformer, task_checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task_checkpoints["embed"])
    texts = [*TEXTS, TEXTS[0]]
    found = ask(client, "/v1/embeddings", {"model": "embed", "input": texts, "user": "me"})
    expected = unit(sentence_transformer.encode(texts))
    np.testing.assert_allclose([entry["embedding"] for entry in found["data"]], expected, **TOLERANCE)
    assert [entry["index"] for entry in found["data"]] == [0, 1, 2, 3] and found["model"] == "embed"
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_the_first_model_answers_at_the_root(client_of, served):
    for name, path in (("embed", "/embed"), ("mask", "/fill-mask"), ("labels", "/predict")):
        with client_of({name: served[name], "rank": served["rank"]}) as client:
            body = {"inputs": "the [MASK]"}
            assert ask(client, "/", body) == ask(client, path, body) == ask(client, "/invocations", body)


def test_costs_are_in_the_headers(client):
    response = client.post("/embed", json={"inputs": TEXTS})
    assert response.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))
    assert int(response.headers["x-total-time"]) >= int(response.headers["x-inference-time"]) >= 0
    assert int(response.headers["x-compute-tokens"]) > 10
    assert re.match(r"total;dur=\d+\.\d\d, ", response.headers["server-timing"])


def test_embed_chunks(client, sentence_transformer):
    text = "Paris is the capital of France. the king walked to the river, and the queen is not old."
    (states,) = sentence_transformer.encode([text], output_value="token_embeddings")
    tokenizer = sentence_transformer.tokenizer
    places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    spans = [[0, 31], [32, len(text)]]
    (found,) = ask(client, "/embed_chunks", {"inputs": text, "chunks": {"spans": [spans]}})
    assert [[chunk["start"], chunk["end"]] for chunk in found] == spans
    for chunk, (start, end) in zip(found, spans, strict=True):
        inside = [number for number, (a, b) in enumerate(places) if a < end and b > start and a < b]
        expected = states[inside].numpy().mean(axis=0, keepdims=True)
        np.testing.assert_allclose(chunk["embedding"], unit(expected)[0], **TOLERANCE)
    (by_tokens,) = ask(client, "/embed_chunks", {"inputs": [text], "chunks": {"tokens": 4, "overlap": 1}})
    assert len(by_tokens) > 4 and by_tokens[0]["start"] == 0 and by_tokens[-1]["end"] == len(text)
    (by_sentences,) = ask(client, "/embed_chunks", {"inputs": [text], "chunks": {"sentences": 20}, "dimensions": 3})
    assert len(by_sentences) == 2 and len(by_sentences[0]["embedding"]) == 3
    for chunks in ({}, {"tokens": 3, "sentences": 3}, {"sentences": 3, "overlap": 1}, {"tokens": 3, "overlap": 3}, 3):
        assert client.post("/embed_chunks", json={"inputs": text, "chunks": chunks}).status_code == 422

"""The client without a server: arguments, splitting, numbering, and what becomes of every kind of failure."""

from __future__ import annotations

import copy
import inspect
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

import gte_deploy
from gte_deploy.core.errors import (
    BackendError,
    InputError,
    MissingDependencyError,
    NoAnswerError,
    NonFiniteError,
    UnavailableError,
    UnreachableError,
)
from gte_deploy.core.spec import ModelSpec
from gte_deploy.text.fingerprint import fingerprint
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.triton import client as triton
from gte_deploy.triton import transport as triton_transport

SPEC = ModelSpec(task="embed", max_length=512, vocab_size=100, hidden_size=4, pad_token_id=0)
MAX_BATCH = 8


def config_of(spec: ModelSpec = SPEC, **facts: Any) -> dict[str, Any]:
    described = {"gte_deploy_spec": asdict(spec), "gte_deploy": {"version": "1", "precision": "fp32", **facts}}
    parameters = {name: {"string_value": json.dumps(value)} for name, value in described.items()}
    return {"name": "gte_embed", "max_batch_size": MAX_BATCH, "parameters": parameters}


class FakeTransport:
    """Answers with the number that each text spells, and keeps what it was asked."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        self.spec = spec
        self.requests: list[tuple[str, Mapping[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self.wait = threading.Event()
        self.fail: Callable[[list[str]], None] = lambda texts: None
        self.value: Callable[[str], Any] = float
        self._lock = threading.Lock()

    def config(self, model: str) -> dict[str, Any]:
        return config_of(self.spec)

    def infer(self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        texts = [text.decode() for text in inputs["TEXT"][:, 0]]
        with self._lock:
            self.requests.append((model, inputs))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.wait.wait(0.02)
        with self._lock:
            self.at_once -= 1
        self.fail(texts)
        values = np.array([self.value(text) for text in texts], dtype=np.float32).reshape(len(texts), -1)
        width = inputs["TRUNCATE_DIM"][0, 0] if "TRUNCATE_DIM" in inputs else 4
        return {"EMBEDDING": np.repeat(values, width, axis=1), "LOGITS": values, "SCORE": values}

    def close(self) -> None:
        pass


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> FakeTransport:
    fake = FakeTransport()
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    return fake


@pytest.fixture
def client(transport: FakeTransport) -> Iterator[triton.Client]:
    with triton.Client(connections=3) as client:
        yield client


@pytest.mark.parametrize(
    "name",
    [
        "encode",
        "encode_query",
        "encode_document",
        "encode_sparse",
        "fill_mask",
        "predict",
        "rank",
        "classify_tokens",
    ],
)
def test_signatures_are_those_of_a_loaded_model(name: str):
    ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (triton.Client, gte_deploy.Model))
    assert ours == theirs


def test_attributes_are_those_of_a_loaded_model(client: triton.Client, transport: FakeTransport):
    assert client.tokenizer is None and client.device == "cpu"
    assert client.get_embedding_dimension() == SPEC.hidden_size and client.similarity_fn_name == "cosine"
    embeddings = client.encode(["1", "2"])
    np.testing.assert_allclose(client.similarity(embeddings, embeddings), np.ones((2, 2)), rtol=1e-6)
    client.max_seq_length = 9
    client.encode("3")
    sent = transport.requests[-1][1]
    assert sent["TRUNCATION"].tolist() == [[True]] and sent["MAX_LENGTH"].tolist() == [[9]]
    with copy.copy(client) as again:
        assert again.max_seq_length == 9


def test_a_list_goes_in_bounded_requests_several_at_a_time(client: triton.Client, transport: FakeTransport):
    numbers = list(np.random.default_rng(0).permutation(100))
    texts = [f"{number}" + " " * (number % 7) for number in numbers]
    embeddings = client.encode(texts)
    np.testing.assert_array_equal(embeddings[:, 0], numbers)
    assert all(len(inputs["TEXT"]) <= MAX_BATCH for _, inputs in transport.requests)
    assert len(transport.requests) >= 13
    assert 2 <= transport.most_at_once <= 3


def test_a_request_holds_only_so_many_tokens(client: triton.Client, transport: FakeTransport):
    texts = [f"{number}" + " " * 150 for number in range(6)]  # 54 tokens each, as far as bytes tell
    client.encode(texts, max_batch_tokens=120)
    assert [len(inputs["TEXT"]) for _, inputs in transport.requests] == [2, 2, 2]


def test_a_request_holds_only_so_many_characters(
    client: triton.Client, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(triton, "MAX_TEXT_BYTES", 100)
    texts = [f"{number}" + " " * length for number, length in enumerate((10, 60, 40, 120, 30, 3))]
    assert client.encode(texts, truncation=True)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    sent = [[len(text) for text in inputs["TEXT"][:, 0]] for _, inputs in transport.requests]
    assert all(sum(lengths) <= 100 or lengths == [121] for lengths in sent) and len(sent) >= 3


@pytest.mark.parametrize(("top_k", "most"), [(5, MAX_BATCH), (1 << 12, 4), (1 << 17, 1)])
def test_many_answers_are_asked_for_fewer_texts_at_once(monkeypatch: pytest.MonkeyPatch, top_k: int, most: int):
    spec = ModelSpec(**{**asdict(SPEC), "task": "fill-mask", "vocab_size": 1 << 18, "logits": "masked"})
    fake = FakeTransport(spec)

    def infer(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        fake.requests.append((model, inputs))
        texts, names = inputs["TEXT"], ("TOKEN", "TOKEN_ID", "SCORE", "SEQUENCE")
        kinds = (object, np.int64, np.float32, object)
        empty = {name: np.zeros((len(texts), 1, 0), kind) for name, kind in zip(names, kinds, strict=True)}
        return {"MASKS": np.ones((len(texts), 1), np.int32), **empty}

    fake.infer = infer  # type: ignore[method-assign]
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        client.fill_mask([f"a [MASK] {number}" for number in range(20)], top_k=top_k)
    assert max(len(inputs["TEXT"]) for _, inputs in fake.requests) == most


def test_options_are_sent_only_where_they_differ(client: triton.Client, transport: FakeTransport):
    client.encode(["1", "2"])
    client.encode(["1", "2"], pooling="cls", normalize_embeddings=True, truncate_dim=3, truncation=True, max_length=9)
    plain, full = (inputs for _, inputs in transport.requests)
    assert set(plain) == {"TEXT"}
    assert set(full) == {"TEXT", "POOLING", "NORMALIZE", "TRUNCATE_DIM", "TRUNCATION", "MAX_LENGTH"}
    assert all(array.shape == (2, 1) for array in full.values())
    assert [full["POOLING"][0, 0], full["TRUNCATE_DIM"].dtype, full["NORMALIZE"].dtype] == [b"cls", "int32", "bool"]


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_the_server_of_an_engine_of_answers(monkeypatch: pytest.MonkeyPatch, task: Any):
    """It has no ensemble for what the engine does not give; a reranker's does not even have embeddings."""
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), "task": task, "num_labels": 1, "pooling": "cls"}))

    def config(model: str) -> dict[str, Any]:
        if model != {"embed": "gte_embed", "classify": "gte_rerank"}[task]:
            raise BackendError(f"http://server failed with 404: unknown model {model}")
        return config_of(fake.spec, hidden_states=False)

    fake.config = config
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        assert client.info()["hidden_states"] is False and client.spec.task == task
        if task == "embed":
            assert client.encode(["1", "2"])[:, 0].tolist() == [1, 2]
        else:
            assert client.predict(["1", "2"]).shape == ()
        served = len(fake.requests)
        wanted = [{"output_value": "token_embeddings"}, {"pooling": "mean"}, *([{}] if task == "classify" else [])]
        for options in wanted:
            with pytest.raises(BackendError, match=f"only the answer of task {task}, .* Export it with --outputs all"):
                client.encode("1", **options)
        assert len(fake.requests) == served


@pytest.fixture
def of_words(monkeypatch: pytest.MonkeyPatch, word_checkpoints: Mapping[str, Any]) -> Iterator[Any]:
    """A model loaded here, its folder, and a transport whose token states are this model's."""
    folder = word_checkpoints["embed"]
    with gte_deploy.load(folder, num_threads=1) as local:
        facts = {"tokenizer": fingerprint(folder, load_tokenizer(folder)), "length_buckets": [128]}
        fake = FakeTransport(local.spec)

        def infer(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
            assert model == "gte_token_embed"
            options = {key.lower(): inputs[key][0, 0] for key in ("TRUNCATION", "MAX_LENGTH") if key in inputs}
            texts = [text.decode() for text in inputs["TEXT"][:, 0]]
            rows = local.encode(texts, prompt="", output_value=None, **options)
            longest = max(len(row["input_ids"]) for row in rows)

            def padded(name: str) -> Any:
                gaps = [(0, longest - len(row[name])) for row in rows]
                arrays = [(row[name], gap) for row, gap in zip(rows, gaps, strict=True)]
                return np.stack([np.pad(array, (gap,) + ((0, 0),) * (array.ndim - 1)) for array, gap in arrays])

            names = {
                "INPUT_IDS": "input_ids",
                "ATTENTION_MASK": "attention_mask",
                "TOKEN_EMBEDDINGS": "token_embeddings",
            }
            return {name: padded(key) for name, key in names.items()}

        fake.infer, fake.config = infer, lambda model: config_of(local.spec, **facts)
        monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
        yield local, folder, fake, facts


@pytest.mark.parametrize("prompt", ["", "the query: "])
def test_chunks_are_those_of_a_loaded_model(of_words: Any, prompt: str):
    local, folder, *_ = of_words
    texts = ["the king of the old city. The queen, 中国!", "", "a", "the king of the old city. The queen, 中国!"]
    spans = [[(0, 8), (13, 30)], [], [(0, 1)], [(4, 8)]]
    with triton.Client(tokenizer=folder) as client:
        for chunks in (gte_deploy.TokenChunks(5, 2), gte_deploy.SentenceChunks(6), spans):
            options = {"chunks": chunks, "prompt": prompt, "normalize_embeddings": True}
            for ours, theirs in zip(client.encode(texts, **options), local.encode(texts, **options), strict=True):
                assert ours.offsets.tolist() == theirs.offsets.tolist() and ours.text == theirs.text
                np.testing.assert_allclose(ours.embeddings, theirs.embeddings, rtol=0, atol=1e-5)
        cut = {"chunks": gte_deploy.TokenChunks(3), "truncation": True, "max_length": 9}
        ours, theirs = (model.encode("the king " * 20, **cut) for model in (client, local))
        np.testing.assert_allclose(ours.embeddings, theirs.embeddings, rtol=0, atol=1e-5)


def test_chunks_that_a_server_cannot_answer_are_refused(of_words: Any):
    local, folder, fake, facts = of_words
    rule = gte_deploy.TokenChunks(5)
    with triton.Client() as client, pytest.raises(InputError, match="chunks need the tokenizer"):
        client.encode("the king", chunks=rule)
    with triton.Client(tokenizer=folder) as client, pytest.raises(InputError, match="input 1 is above the limit"):
        client.encode(["the king", "the king " * 100], chunks=rule)
    answer = fake.infer
    fake.infer = lambda *call: {**(found := answer(*call)), "INPUT_IDS": found["INPUT_IDS"] + 1}
    with triton.Client(tokenizer=folder) as client, pytest.raises(BackendError, match="tokenised input 0"):
        client.encode("the king", chunks=rule)
    for changed, message in (({"hidden_states": False}, "--outputs all"), ({}, "Dense modules")):
        spec = local.spec if changed else replace(local.spec, embedding_size=8)
        fake.config = lambda model, spec=spec, changed=changed: config_of(spec, **facts, **changed)
        with triton.Client(tokenizer=folder) as client:
            with pytest.raises((InputError, BackendError), match=message):
                client.encode("the king", chunks=rule)


def test_a_server_without_any_known_ensemble(monkeypatch: pytest.MonkeyPatch):
    def config(model: str) -> dict[str, Any]:
        raise BackendError(f"unknown model {model}")

    fake = FakeTransport()
    fake.config, fake.close = config, lambda: None
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with pytest.raises(BackendError, match="unknown model gte_embed"):
        triton.Client()


def test_a_default_prompt_is_put_here_and_not_again_there(monkeypatch: pytest.MonkeyPatch):
    prompts = {"query": "1", "document": "2"}
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), "prompts": prompts, "default_prompt_name": "query"}))
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        values = [client.encode("0")[0], client.encode_document("0")[0], client.encode("0", prompt="")[0]]
    assert values == [10, 20, 0]
    assert all(inputs["PROMPT"][0, 0] == b"" for _, inputs in fake.requests)


def test_pairs_and_single_texts_go_apart_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch):
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), "task": "classify", "num_labels": 1}))
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        scores = client.predict([("1", "a"), ("2",), ("3", "b")], activation_fn=lambda logits: logits)
        assert scores.tolist() == [1, 2, 3]
        assert sorted(set(inputs) == {"TEXT", "TEXT_PAIR"} for _, inputs in fake.requests) == [False, True]
        assert [item["corpus_id"] for item in client.rank("5", ["a", "b"], top_k=1)] == [0]
        with pytest.raises(InputError, match="fill-mask"):
            client.fill_mask("a")


def texts_sent(transport: FakeTransport, *names: str) -> list[list[bytes]]:
    """The texts of every row that was sent, in order."""
    columns = [[inputs[name][:, 0] for name in names] for _, inputs in transport.requests]
    return sorted(list(row) for request in columns for row in zip(*request, strict=True))


def test_equal_texts_are_sent_once(client: triton.Client, transport: FakeTransport):
    texts = ["3", "1", "3", "2", "1", "3"] * 4
    embeddings = client.encode(texts)
    assert embeddings[:, 0].tolist() == [float(text) for text in texts]
    assert texts_sent(transport, "TEXT") == [[b"1"], [b"2"], [b"3"]]


def test_equal_pairs_are_sent_once(monkeypatch: pytest.MonkeyPatch):
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), "task": "classify", "num_labels": 1}))
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        identity = {"activation_fn": lambda logits: logits}
        assert client.predict([("1", "a"), ("2", "a"), ("1", "a")], **identity).tolist() == [1, 2, 1]
        assert texts_sent(fake, "TEXT", "TEXT_PAIR") == [[b"1", b"a"], [b"2", b"a"]]
        fake.requests.clear()
        ranked = client.rank("5", ["a", "b", "a"], **identity)
        assert {item["corpus_id"]: item["score"] for item in ranked} == {0: 5, 1: 5, 2: 5}
        assert texts_sent(fake, "TEXT", "TEXT_PAIR") == [[b"5", b"a"], [b"5", b"b"]]


def test_what_a_server_refuses_names_the_first_of_equal_texts(client: triton.Client, transport: FakeTransport):
    def fail(texts: list[str]) -> None:
        raise InputError(f"input {texts.index('9')} has 99 tokens")

    transport.fail = fail
    with pytest.raises(InputError, match="^input 2 has 99 tokens$"):
        client.encode(["1", "1", "9", "1", "9"])


def test_prompts_of_pairs_are_put_here_and_not_again_there(monkeypatch: pytest.MonkeyPatch):
    spec = {"task": "classify", "num_labels": 1, "prompts": {"query": "1"}, "default_prompt_name": "query"}
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), **spec}))
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        identity = {"activation_fn": lambda logits: logits}
        assert client.predict([("2", "7")], **identity).tolist() == [12]
        assert client.predict([("2", "7")], prompt="3", **identity).tolist() == [32]
        assert client.rank("2", ["7"], prompt="", **identity) == [{"corpus_id": 0, "score": 2.0}]
    assert [inputs["TEXT_PAIR"][0, 0] for _, inputs in fake.requests] == [b"7"] * 3
    assert all(inputs["PROMPT"][0, 0] == b"" for _, inputs in fake.requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3, "aggregation_strategy": "simple"}, "stride is not served"),
        ({"is_split_into_words": True}, "is_split_into_words is not served"),
        ({"offset_mapping": [(0, 1)]}, "offset_mapping is not served"),
        ({"aggregation_strategy": "best"}, "aggregation_strategy is 'best'; expected one of"),
    ],
)
def test_what_a_server_does_not_tag(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), "task": "token-classify", "num_labels": 2}))
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client, pytest.raises(InputError, match=message):
        client.classify_tokens("the king", **options)
    assert fake.requests == []


class SparseTransport(FakeTransport):
    """Answers with words 7 ("a", of the weight that the text spells) and 3 ("b", 9), padded to three."""

    def infer(self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        values = super().infer(model, inputs, outputs)["SCORE"]
        rows = len(values)
        return {
            "TOKENS": np.full((rows, 1), 2, np.int32),
            "TOKEN": np.array([[b"b", b"a", b""]] * rows, object),
            "TOKEN_ID": np.array([[3, 7, -1]] * rows),
            "WEIGHT": np.concatenate([np.full((rows, 1), 9), values, np.zeros((rows, 1))], axis=1, dtype=np.float32),
        }


def test_sparse_vectors_and_dictionaries(monkeypatch: pytest.MonkeyPatch):
    sparse = {"head": "splade", "query_weights": "query_weights.npy"}
    fake = SparseTransport(ModelSpec(**{**asdict(SPEC), "task": "sparse", "sparse": sparse}))
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client(connections=3) as client:
        texts = [str(number) for number in range(1, 9)] * 3
        assert client.encode_sparse(texts) == [{"b": 9.0, "a": float(text)} for text in texts]
        assert client.encode_sparse("5") == client.encode("5") == {"b": 9.0, "a": 5.0}
        vector = client.encode_document("5", as_dict=False, max_active_dims=2)
        assert (vector.indices.tolist(), vector.values.tolist(), vector.size) == ([3, 7], [5.0, 9.0][::-1], 100)
        assert fake.requests[-1][0] == "gte_sparse" and fake.requests[-1][1]["MAX_ACTIVE_DIMS"].tolist() == [[2]]
        client.encode_query("5", truncation=True)
        assert fake.requests[-1][0] == "gte_sparse_query" and set(fake.requests[-1][1]) == {"TEXT", "TRUNCATION"}
        for call, message in (
            (lambda: client.encode_sparse("5", device="cuda"), "leave device out"),
            (lambda: client.encode_sparse("5", max_active_dims=0), "max_active_dims must be"),
            (lambda: client.encode_sparse("5", route="both"), "route is 'both'; expected one of"),
        ):
            with pytest.raises(InputError, match=message):
                call()


def test_equal_names_keep_the_heaviest(monkeypatch: pytest.MonkeyPatch):
    """Two entries of a vocabulary may decode to the same word."""
    fake = SparseTransport(ModelSpec(**{**asdict(SPEC), "task": "token-classify", "num_labels": 1}))
    infer = fake.infer
    fake.infer = lambda *args: {**infer(*args), "TOKEN": np.array([[b"a", b"a", b""]], object)}  # type: ignore[method-assign]
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        assert client.encode_sparse("5") == {"a": 9.0}


def test_several_labels(monkeypatch: pytest.MonkeyPatch):
    fake = FakeTransport(ModelSpec(**{**asdict(SPEC), "task": "classify", "num_labels": 4}))
    fake.value = lambda text: [float(text), 0, 1, 2]
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: fake)
    with triton.Client() as client:
        np.testing.assert_array_equal(client.predict([["3"]] * 3), [[3, 0, 1, 2]] * 3)
        assert client.predict("3", apply_softmax=True).sum() == pytest.approx(1)
        with pytest.raises(InputError, match="one label"):
            client.rank("3", ["4"])


def test_an_error_names_the_input_as_the_caller_counts(client: triton.Client, transport: FakeTransport):
    def fail(texts: list[str]) -> None:
        if "42" in texts:
            raise InputError(f"input {texts.index('42')} has 900 tokens")

    transport.fail = fail
    texts = [str(number) for number in range(50)]
    with pytest.raises(InputError, match="^input 42 has 900 tokens$"):
        client.encode(texts)
    transport.fail = lambda texts: None
    assert client.encode(texts)[42, 0] == 42  # nothing of the failed call is left behind


def test_numbers_that_are_not_finite_do_not_leave(client: triton.Client, transport: FakeTransport):
    transport.value = lambda text: float("nan") if text == "42" else 1.0
    with pytest.raises(NonFiniteError, match="for the inputs 42;"):
        client.encode([str(number) for number in range(50)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "http://HOST:PORT"),
        ({"url": "ftp://localhost:8000"}, "http://HOST:PORT"),
        ({"url": "http://"}, "http://HOST:PORT"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "1"}, "timeout_s"),
        ({"connections": 0}, "connections"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        triton.Client(**options)


@pytest.mark.parametrize(
    "arguments",
    [{"inputs": None}, {"inputs": [1]}, {"inputs": ["\ud800"]}, {"inputs": "1", "device": "cpu"}]
    + [{"inputs": "1", name: value} for name, value in (("batch_size", 0), ("truncate_dim", 5), ("pooling", "max"))],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    client: triton.Client, transport: FakeTransport, arguments: dict[str, Any]
):
    with pytest.raises(InputError):
        client.encode(**arguments)
    assert not transport.requests


def test_no_texts_are_no_request(client: triton.Client, transport: FakeTransport):
    assert len(client.encode([])) == 0
    assert not transport.requests


@pytest.mark.parametrize(
    "config",
    [
        {"max_batch_size": 8},
        {"parameters": {"gte_deploy": {"string_value": "{"}}},
        {"parameters": {"gte_deploy": {"string_value": "[]"}}},
        {"parameters": {name: {"string_value": "{}"} for name in ("gte_deploy", "gte_deploy_spec")}},
    ],
)
def test_a_foreign_repository_is_refused(transport: FakeTransport, config: dict[str, Any]):
    transport.config = lambda model: config  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="--format triton"):
        triton.Client()


def test_a_closed_client_says_so(transport: FakeTransport):
    client = triton.Client()
    client.close()
    client.close()
    with pytest.raises(BackendError, match="closed"):
        client.encode("1")


@pytest.mark.parametrize("protocol", ["http", "grpc", "https", "grpcs"])
def test_a_server_that_is_not_there(protocol: str):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(
            UnreachableError, match=r"127.0.0.1:\d+ cannot be reached: .*[Cc]onnection refused"
        ) as caught:
            triton.Client(f"{protocol}://127.0.0.1:{free.getsockname()[1]}", timeout_s=5)
    assert isinstance(caught.value, UnavailableError) and isinstance(caught.value, ConnectionError)
    assert not isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_host_that_is_not_known(protocol: str):
    # RFC 2606: no host has this name. Without a network the resolver says so in other words.
    with pytest.raises(UnreachableError, match=r"nowhere.invalid:8000 cannot be reached: (?i:.*(name|lookup|resol))"):
        triton.Client(f"{protocol}://nowhere.invalid:8000", timeout_s=60)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_never_answers(protocol: str):
    with closing(socket.create_server(("127.0.0.1", 0))) as deaf:
        with pytest.raises(NoAnswerError, match="no answer within 0.5 s") as caught:
            triton.Client(f"{protocol}://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=0.5)
    assert isinstance(caught.value, UnavailableError) and isinstance(caught.value, TimeoutError)


@pytest.fixture
def callers() -> list[tuple[str, Any]]:
    """Path and address of everyone who asked what `answering` started."""
    return []


@pytest.fixture
def answering(callers: list[tuple[str, Any]]) -> Iterator[Callable[[int, bytes], str]]:
    """`answering(status, body)`: the URL of an HTTP server that answers everything with it."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                callers.append((self.path, self.client_address))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, b'{"error": "unexpected shape"}', InputError, "^unexpected shape$"),
        (500, b'{"error": "in ensemble \'gte_embed\', InputError: input 0 is long"}', InputError, "^input 0 is long$"),
        (500, b'{"error": "NonFiniteError: for the inputs 0"}', NonFiniteError, "^for the inputs 0$"),
        (503, b'{"error": "Exceeds maximum queue size"}', UnavailableError, "Exceeds maximum queue size"),
        (502, b"<html>Bad Gateway</html>", UnavailableError, "Bad Gateway"),
        (404, b'{"error": "unknown model"}', BackendError, "404: unknown model"),
        (500, b"", BackendError, "500: no reason given"),
    ],
)
def test_refusals_become_errors_with_their_reason(
    answering: Callable[[int, bytes], str], status: int, body: bytes, kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message) as caught:
        triton.Client(answering(status, body))
    assert type(caught.value) is kind


def test_connections_are_kept_and_closed(answering: Callable[[int, bytes], str], callers: list[tuple[str, Any]]):
    url = answering(200, json.dumps(config_of()).encode()) + "/gateway/"
    transport = triton_transport.open_transport(url, connections=2, timeout_s=5, headers={})
    for _ in range(3):
        assert transport.config("gte_embed") == config_of()
    assert {path for path, _ in callers} == {"/gateway/v2/models/gte_embed/config"}
    assert len(callers) == 3 and len({address for _, address in callers}) == 1
    transport.close()
    with pytest.raises(BackendError, match="closed"):
        transport.config("gte_embed")


def test_who_waits_for_a_connection_waits_no_longer_than_for_an_answer():
    with closing(socket.create_server(("127.0.0.1", 0))) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        transport = triton_transport.open_transport(url, connections=1, timeout_s=1, headers={})
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(transport.config, "gte_embed") for _ in range(2)]
            with closing(deaf.accept()[0]):  # one call holds the connection; the other waits for it, or is about to
                time.sleep(0.3)
                transport.close()
                for call in calls:
                    with pytest.raises(BackendError, match="no answer within 1 s|closed"):
                        call.result(timeout=30)


def test_without_tritonclient_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    for name in ("tritonclient.http", "tritonclient.grpc"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for protocol in ("http", "grpc"):
        with pytest.raises(MissingDependencyError, match=r"\[triton\]"):
            triton_transport.open_transport(f"{protocol}://localhost:1", connections=1, timeout_s=1, headers={})


def test_tritonclient_is_loaded_on_first_use():
    code = (
        "import sys, gte_deploy.triton\n"
        "heavy = {'tritonclient', 'grpc', 'gevent', 'torch', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""A client that tokenises gets the answers and errors of one that sends texts, from the same repository."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gte_deploy
from gte_deploy.core.errors import BackendError, CheckpointError, InputError
from gte_deploy.triton import client as triton
from gte_deploy.triton.transport import _refused
from runtime_models import TEXTS as MASKED_TEXTS
from triton_emulation import Repository

TEXTS = ["Paris is the capital of France.", "the king", "", "中国 — żółw 🐢 readable unknownword", "isn't old. " * 9]
URL = "http://localhost:8000"


class Emulated:
    """A transport to the emulation of a repository, which notes the models that were asked."""

    def __init__(self, repository: Repository, **facts: Any) -> None:
        self.repository, self.facts = repository, facts
        self._lock = threading.Lock()
        self.requests: list[tuple[str, Mapping[str, Any], Any]] = []

    def config(self, model: str) -> dict[str, Any]:
        from google.protobuf import json_format

        if not (self.repository.path / model).is_dir():
            raise BackendError(f"no model {model}")
        config = json_format.MessageToDict(self.repository.config(model), preserving_proto_field_name=True)
        facts = json.loads(config["parameters"]["gte_deploy"]["string_value"])
        facts = {name: value for name, value in {**facts, **self.facts}.items() if value is not None}
        config["parameters"]["gte_deploy"]["string_value"] = json.dumps(facts)
        return config

    def infer(self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        with self._lock:
            (answer,) = self.repository.ask(model, dict(inputs))
        self.requests.append((model, inputs, answer))
        if isinstance(answer, Exception):
            raise _refused(URL, 400, str(answer))
        return {name: answer[name] for name in outputs}

    def close(self) -> None:
        pass


@pytest.fixture
def clients(
    bundles: dict[str, Path], repository: Callable[[str], Repository], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`clients(task)`: a client that sends texts, and one that sends token ids; each has its `transport`."""
    opened = []

    def make(task: str) -> list[Any]:
        for tokenizer in (None, bundles[task]):
            transport = Emulated(repository(task))
            monkeypatch.setattr(triton, "open_transport", lambda url, transport=transport, **options: transport)
            client = triton.Client(URL, tokenizer=tokenizer)
            client.transport = transport
            opened.append(client)
        return opened[-2:]

    yield make
    for client in opened:
        client.close()


def ensembles_asked(client: Any) -> set[str]:
    return {model for model, _, _ in client.transport.requests}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_embeddings": True},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"prompt_name": "query"},
        {"truncation": True, "max_length": 7},
        {"batch_size": 2},
    ],
    ids=str,
)
def test_embeddings(options: dict[str, Any], clients: Callable[..., Any]) -> None:
    by_text, by_ids = clients("embed")
    np.testing.assert_allclose(by_ids.encode(TEXTS, **options), by_text.encode(TEXTS, **options), atol=1e-6)
    assert ensembles_asked(by_ids) == {"gte_embed_ids"}
    assert ensembles_asked(by_text) == {"gte_embed" if "truncate_dim" in options else "gte_embed_fast"}
    for _, inputs, _ in by_ids.transport.requests:
        assert set(inputs) == {"INPUT_IDS", "ATTENTION_MASK"} and inputs["INPUT_IDS"].shape[1] % 8 == 0


def test_calls_that_send_texts_all_the_same(clients: Callable[..., Any]) -> None:
    by_text, by_ids = clients("embed")
    for options in ({"pooling": "mean"}, {"output_value": "token_embeddings"}):
        found, expected = (client.encode(TEXTS, **options) for client in (by_ids, by_text))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert ensembles_asked(by_ids) == ensembles_asked(by_text)


def test_scores_of_pairs_and_single_texts(clients: Callable[..., Any]) -> None:
    by_text, by_ids = clients("classify")
    pairs = [("what is this", "a king"), ("the",), ("", ""), ("river", "water " * 30)]
    np.testing.assert_allclose(by_ids.predict(pairs), by_text.predict(pairs), atol=1e-6)
    assert ensembles_asked(by_ids) == {"gte_rerank_ids"}


def test_masks(clients: Callable[..., Any]) -> None:
    by_text, by_ids = clients("fill-mask")
    texts = [*MASKED_TEXTS, "[MASK] and [MASK] and [MASK]"]
    for options in ({}, {"top_k": 2, "targets": ["king", "Paris"]}):
        found, expected = (client.fill_mask(texts, **options) for client in (by_ids, by_text))
        for ours, theirs in zip(found, expected, strict=True):
            flat, wanted = (each if isinstance(each[0], list) else [each] for each in (ours, theirs))
            assert [[item["sequence"] for item in best] for best in flat] == [
                [item["sequence"] for item in best] for best in wanted
            ]
    assert ensembles_asked(by_ids) == {"gte_fill_mask_ids"}
    np.testing.assert_allclose(by_ids.encode(texts), by_text.encode(texts), atol=1e-6)


def test_hybrid_embeddings(clients: Callable[..., Any], bundles: dict[str, Path]) -> None:
    by_text, by_ids = clients("hybrid")
    options = {"normalize_embeddings": True, "truncate_dim": 5, "max_active_dims": 3, "as_dict": False}
    with gte_deploy.load(bundles["hybrid"], backend="onnx", num_threads=1) as local:
        expected = local.encode_hybrid(TEXTS, **options)
    for client in (by_text, by_ids):
        found = client.encode_hybrid(TEXTS, **options)
        np.testing.assert_allclose(found.dense, expected.dense, atol=1e-5)
        for ours, theirs in zip(found.sparse, expected.sparse, strict=True):
            np.testing.assert_allclose(ours.to_dense(), theirs.to_dense(), atol=1e-5)
        assert client.encode_hybrid(TEXTS[1]).sparse == client.encode_sparse(TEXTS[1])
    assert ensembles_asked(by_text) == {"gte_hybrid", "gte_sparse"}
    assert ensembles_asked(by_ids) == {"gte_hybrid_ids", "gte_sparse_ids"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncation": True, "max_length": 16, "prompt": "king "},
        {"prompt_name": "document", "normalize_embeddings": False},
        {"skip_words": ["the", "king", "nowhere"]},
        {"skip_words": ()},
        {"batch_size": 2},
    ],
    ids=str,
)
def test_embeddings_of_tokens(options: dict[str, Any], clients: Callable[..., Any], bundles: dict[str, Path]) -> None:
    """The server's text path, the client's id path and the local model agree, for each side."""
    by_text, by_ids = clients("multi-vector")
    texts = [*TEXTS[:4], "Paris."]
    with gte_deploy.load(bundles["multi-vector"], backend="onnx", num_threads=1) as local:
        for call in ("encode_query", "encode_document"):
            limits = {"truncation": True} if call == "encode_query" else {}
            expected = getattr(local, call)(texts, **{**limits, **options})
            for client in (by_text, by_ids):
                found = getattr(client, call)(texts, **{**limits, **options})
                for ours, theirs in zip(found, expected, strict=True):
                    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ensembles_asked(by_text) == {"gte_multi_vector_query", "gte_multi_vector_document"}
    assert ensembles_asked(by_ids) == {"gte_multi_vector_ids"}


def test_ranks_by_maxsim(clients: Callable[..., Any], bundles: dict[str, Path]) -> None:
    documents = ["the king, and the queen", "Paris", "water of the river", "a", "the queen"]
    with gte_deploy.load(bundles["multi-vector"], backend="onnx", num_threads=1) as local:
        expected = local.rank("the queen?", documents, top_k=3, return_documents=True)
        for client in clients("multi-vector"):
            found = client.rank("the queen?", documents, top_k=3, return_documents=True)
            assert [{**item, "score": 0} for item in found] == [{**item, "score": 0} for item in expected]
            scores = [[item["score"] for item in items] for items in (found, expected)]
            np.testing.assert_allclose(*scores, atol=1e-4)
            client.max_seq_length = local.max_seq_length = 5
            for call in ("encode_query", "encode_document"):
                np.testing.assert_allclose(
                    getattr(client, call)("the king of the river"),
                    getattr(local, call)("the king of the river"),
                    atol=1e-5,
                )
            local.max_seq_length = None


@pytest.mark.parametrize("task", ["sparse", "token-classify", "hybrid"])
def test_sparse_vectors(task: str, clients: Callable[..., Any]) -> None:
    by_text, by_ids = clients(task)
    for found, expected in zip(by_ids.encode_sparse(TEXTS), by_text.encode_sparse(TEXTS), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert ensembles_asked(by_ids) == {"gte_sparse_ids"}


@pytest.mark.parametrize(
    ("task", "call"),
    [
        ("embed", lambda client: client.encode(["a", "b", "the " * 200])),
        ("embed", lambda client: client.encode("a", max_length=999)),
        ("embed", lambda client: client.encode("a", max_length=1)),
        ("classify", lambda client: client.predict([("a", "b"), ("the", "king " * 200)])),
        ("classify", lambda client: client.predict([("a", "b")], max_length=4)),
        ("classify", lambda client: client.predict([("a",), ("the " * 200,)])),
        ("classify", lambda client: client.predict([("a",)], max_length=4)),
        ("multi-vector", lambda client: client.encode_query(["a", "the " * 20])),
        ("multi-vector", lambda client: client.encode_document(["a", "the " * 200])),
        ("multi-vector", lambda client: client.encode_document("a", max_length=3)),
        ("multi-vector", lambda client: client.encode_query("a", max_length=999)),
        ("multi-vector", lambda client: client.encode_query("a", skip_words=[7])),
        ("multi-vector", lambda client: client.encode("a")),
        ("fill-mask", lambda client: client.fill_mask(["a [MASK]"] * 3 + ["no mask"])),
        ("fill-mask", lambda client: client.fill_mask(["a [MASK]", "the " * 200 + "[MASK]"], truncation=True)),
    ],
)
def test_errors_are_those_of_the_server(task: str, call: Callable[[Any], Any], clients: Callable[..., Any]) -> None:
    messages = []
    for client in clients(task):
        with pytest.raises(InputError) as caught:
            call(client)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_too_many_masks(clients: Callable[..., Any]) -> None:
    by_text, by_ids = clients("fill-mask")
    for client in (by_text, by_ids):
        client.transport.repository.model("gte_tokenizer")._max_masks = 4
    by_ids._tokenizer = triton.ClientTokenizer(by_ids._tokenizer.tokenizer, by_ids.spec, (16, 128), 4)
    for client in (by_text, by_ids):
        with pytest.raises(InputError, match="input 1 has 5 masks; this server answers at most 4"):
            client.fill_mask(["a [MASK]", "[MASK] " * 5])


def test_another_tokenizer_is_refused(
    bundles: dict[str, Path], repository: Callable[[str], Repository], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: Emulated(repository("embed")))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (other / name).write_bytes((bundles["embed"] / name).read_bytes())
    data = json.loads((bundles["embed"] / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**data, "padding": None, "decoder": None}, indent=3))
    triton.Client(URL, tokenizer=other).close()  # another form of the same
    data["added_tokens"][-1]["lstrip"] ^= True
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"the tokenizer of {other} \(SHA-256 .* is not that of {URL} \(SHA-256 "):
        triton.Client(URL, tokenizer=other)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        triton.Client(URL, tokenizer=tmp_path)


def test_a_server_that_takes_only_texts(
    bundles: dict[str, Path], repository: Callable[[str], Repository], monkeypatch: Any
) -> None:
    """A repository of an earlier gte-export: texts go to gte_embed, and a tokenizer is refused."""
    transport = Emulated(repository("embed"), tokenizer=None)
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: transport)
    with pytest.raises(BackendError, match="takes only texts. Export its repository again"):
        triton.Client(URL, tokenizer=bundles["embed"])
    with triton.Client(URL) as client:
        client.encode("a text")
    assert [model for model, _, _ in transport.requests] == ["gte_embed"]


def test_the_response_cache_belongs_to_gte_embed(repository: Callable[[str], Repository], monkeypatch: Any) -> None:
    transport = Emulated(repository("embed"), response_cache=True)
    monkeypatch.setattr(triton, "open_transport", lambda url, **options: transport)
    with triton.Client(URL) as client:
        client.encode("a text", normalize_embeddings=True)
    assert [model for model, _, _ in transport.requests] == ["gte_embed"]

"""What the server refuses, with which status, and in which form."""

from __future__ import annotations

import json

import pytest

JSON = {"content-type": "application/json"}


def error(response):
    body = response.json()
    if "error_type" in body:
        assert set(body) == {"error", "error_type"}
        return response.status_code, body["error_type"], body["error"]
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return response.status_code, body["error"]["type"], body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([], "must be a JSON object, not a list"),
        ({}, "inputs: Field required"),
        ({"inputs": None}, "inputs: expected a text, token ids, or a list of these, not null"),
        ({"inputs": 1}, "not an integer"),
        ({"inputs": 1e400}, "not a number"),
        ({"inputs": ["a", 2]}, "inputs[1] must be a text or token ids, not an integer"),
        ({"inputs": ["a", None]}, "inputs[1] must be"),
        ({"inputs": ["a", [1, -1]]}, "inputs[1][1] must be a token id"),
        ({"inputs": [[1], []]}, "inputs[1] is empty"),
        ({"inputs": [1, True]}, "inputs[1] must be a token id, an integer from 0, not a boolean"),
        ({"inputs": ["a", "b\ud800"]}, "inputs[1] has a lone surrogate"),
        ({"inputs": "a", "normalise": True}, "the field normalise is not known; this route has:"),
        ({"inputs": "a", "normalize": "yes"}, "normalize: "),
        ({"inputs": "a", "normalize": 1}, "normalize: "),
        ({"inputs": "a", "dimensions": 0}, "dimensions: "),
        ({"inputs": "a", "dimensions": 33}, "dimensions is 33; embeddings of embed have 32"),
        ({"inputs": "a", "dimensions": 2**70}, "dimensions: "),
        ({"inputs": "a", "encoding_format": "hex"}, "encoding_format: "),
        ({"inputs": "a", "truncation_direction": "left"}, "cuts texts on the right"),
        ({"inputs": "a", "prompt_name": "nothing"}, "none of this model's prompts: query"),
        ({"inputs": "a", "model": 3}, "model: "),
    ],
)
def test_a_field_is_honoured_or_refused_by_name(client, body, says):
    content = json.dumps(body).replace("Infinity", "1e400")
    status, kind, message = error(client.post("/embed", content=content, headers=JSON))
    assert (status, kind) == (422, "Validation") and says in message


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/rerank", {"query": "a", "texts": "b"}, "texts: expected a list of texts, not a text"),
        ("/rerank", {"query": ["a"], "texts": ["b"]}, "query: "),
        ("/predict", {"inputs": ["a", "b", "c"]}, "a pair has two"),
        ("/predict", {"inputs": [["a"], ["a", "b", "c"]]}, "inputs[1] must be a list of one or two texts"),
        ("/predict", {"inputs": "a", "raw_scores": True, "parameters": {"function_to_apply": "none"}}, "not both"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0] must be a text, not an object"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n: "),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "max_tokens_per_doc is not known"),
        ("/similarity", {"inputs": {"source_sentence": "a"}}, "inputs.sentences: Field required"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", 1]}}, "inputs.sentences[1] must be"),
        ("/tokenize", {"inputs": [1]}, "inputs[0] must be a text"),
        ("/decode", {"ids": ["a"]}, "ids[0] must be a token id"),
        ("/decode", {"ids": [[999_999]]}, "ids[0] has the id 999,999"),
        ("/fill-mask", {"inputs": "no mask"}, "no mask"),
        ("/fill-mask", {"inputs": "a [MASK]", "parameters": {"top_k": 0}}, "parameters.top_k: "),
        ("/fill-mask", {"inputs": "a [MASK]", "parameters": {"top_k": 5000}}, "top_k must be"),
        ("/classify_tokens", {"inputs": "a", "parameters": {"aggregation_strategy": "x"}}, "aggregation_strategy: "),
        ("/embed_sparse", {"inputs": "a", "route": "both"}, "route: "),
    ],
)
def test_the_fields_of_other_routes(client, path, body, says):
    status, _, message = error(client.post(path, json=body))
    assert status == 422 and says in message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": []}),
        ("/rerank", {"query": "a", "texts": []}),
        ("/v1/embeddings", {"input": []}),
        ("/decode", {"ids": []}),
    ],
)
def test_an_empty_list_has_a_status_of_its_own(client, path, body):
    status, kind, message = error(client.post(path, json=body))
    assert status == 400 and kind in ("Empty", "invalid_request_error") and "is empty" in message


def test_a_task_that_the_model_is_not_for(client_of, served):
    with client_of({"embed": served["embed"], "labels": served["labels"]}) as client:
        status, kind, message = error(client.post("/rerank", json={"query": "a", "texts": ["b"]}))
        assert (status, kind) == (424, "Backend")
        assert "classify with one label" in message and "this server has embed (embed), labels (classify)" in message
        status, _, message = error(client.post("/predict", json={"inputs": "a", "model": "embed"}))
        assert status == 424 and "use labels" in message
        status, kind, message = error(client.post("/v1/embeddings", json={"input": "a", "model": "labels"}))
        assert status == 424 and kind == "server_error" and "use embed" in message


def test_a_model_that_is_not_there(client):
    response = client.post("/v1/embeddings", json={"input": "a", "model": "text-embedding-3-small"})
    status, kind, message = error(response)
    assert (status, kind) == (404, "invalid_request_error") and "this server has embed, " in message
    assert response.json()["error"]["param"] == "model"
    assert error(client.get("/v1/models/nothing"))[0] == error(client.get("/info?model=nothing"))[0] == 404


def test_routes_that_are_not_there(client):
    assert error(client.get("/nothing"))[:2] == (404, "Validation")
    assert error(client.post("/v1/chat/completions", json={}))[:2] == (404, "invalid_request_error")
    response = client.get("/embed")
    assert error(response)[0] == 405 and response.headers["allow"] == "POST"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a"])
def test_only_json_is_taken(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    assert error(client.post("/embed", content=b'{"inputs": "a"}', headers=headers))[0] == 415
    coded = {**JSON, "content-encoding": "gzip"}
    assert error(client.post("/embed", content=b"\x1f\x8b", headers=coded))[0] == 415
    with_charset = {"content-type": "application/JSON; charset=utf-8"}
    assert client.post("/embed", content=b'{"inputs": "a"}', headers=with_charset).status_code == 200


def test_too_much(client_of):
    with client_of(max_client_batch_size=3, max_body_bytes=1000) as client:
        for path, body in (
            ("/embed", {"inputs": ["a"] * 4}),
            ("/predict", {"inputs": [["a"]] * 4}),
            ("/rerank", {"query": "a", "texts": ["a"] * 4}),
            ("/v1/rerank", {"query": "a", "documents": ["a"] * 4}),
            ("/tokenize", {"inputs": ["a"] * 4}),
            ("/decode", {"ids": [[1]] * 4}),
            ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["a"] * 4}}),
            ("/fill-mask", {"inputs": ["[MASK]"] * 4}),
            ("/classify_tokens", {"inputs": ["a"] * 4}),
        ):
            status, _, message = error(client.post(path, json=body))
            assert status == 413 and "4 texts" in message, path
        status, kind, message = error(client.post("/v1/embeddings", json={"input": "a" * 1000}))
        assert (status, kind) == (413, "invalid_request_error") and "takes 1,000" in message


def test_answers_that_would_be_too_large(client, monkeypatch):
    monkeypatch.setattr("gte_deploy.serving.handlers.MAX_NUMBERS", 1000)
    monkeypatch.setattr("gte_deploy.serving.handlers.MAX_OBJECTS", 30)
    monkeypatch.setattr("gte_deploy.serving.handlers.MAX_ANSWERS", 30)
    monkeypatch.setattr("gte_deploy.serving.handlers.MAX_CHARACTERS", 100)
    for path, body in (
        ("/embed_all", {"inputs": ["the old city"] * 8}),
        ("/embed_multi_vector", {"inputs": ["the old city"] * 8, "model": "embed"}),
        ("/embed_sparse", {"inputs": ["the old city"] * 8}),
        ("/tokenize", {"inputs": "the old city " * 20}),
        ("/fill-mask", {"inputs": "[MASK] " * 7}),
        ("/fill-mask", {"inputs": "[MASK] the old city of the king", "parameters": {"top_k": 8}}),
    ):
        status, _, message = error(client.post(path, json=body))
        assert status == 413 and "the answer would have" in message, path


def test_a_gap_without_end_is_not_read_to_its_end(client):
    status, _, message = error(client.post("/embed", json={"inputs": " " * (3 << 20), "truncate": True}))
    assert status == 422 and "of which at most 1,048,576 are read" in message


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan"])
def test_the_header_of_the_deadline(client, given):
    response = client.post("/embed", json={"inputs": "a"}, headers={"X-Request-Timeout": given})
    assert error(response)[0] == 422 and "X-Request-Timeout" in response.text


def test_the_token(client_of):
    with client_of(token="secret") as client:
        for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "Basic secret"}):
            response = client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
            assert error(response)[:2] == (401, "invalid_request_error")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/info", "/v1/models", "/openapi.json", "/nothing"):
            assert client.get(path).status_code == 401
        for path in ("/health", "/ready", "/ping", "/metrics", "/"):
            assert client.get(path).status_code == 200
        for path in ("/", "/invocations"):
            assert client.post(path, json={"inputs": "a"}).status_code == 401
        headers = {"authorization": "bearer secret"}
        assert client.post("/embed", json={"inputs": "a"}, headers=headers).status_code == 200
    with client_of(token="secret", protect_all=True) as client:
        for path in ("/health", "/ready", "/ping", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=headers).status_code == 200


def test_the_page_can_be_left_out(client, client_of):
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    with client_of(page=False) as without:
        assert error(without.get("/"))[0] == 405
        assert without.get("/page/page.js").status_code == 404


def test_other_origins_are_let_in_only_if_they_are_named(client, client_of):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/embed", headers=asked).headers
    with client_of(cors_origins=("https://a.example",), token="secret") as open_client:
        response = open_client.options("/embed", headers={**asked, "access-control-request-headers": "authorization"})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        refused = open_client.post("/embed", json={"inputs": "a"}, headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = open_client.options("/embed", headers={**asked, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_an_error_of_the_server_itself(client_of, served, caplog):
    class Broken:
        spec = served["embed"].spec
        path = served["embed"].path
        tokenizer = served["embed"].tokenizer
        joining = None

        def encode(self, *args, **kwargs):
            raise ZeroDivisionError("a secret text")

    with client_of({"broken": Broken()}) as client:
        response = client.post("/embed", json={"inputs": "a"}, headers={"x-request-id": "my-id"})
        status, kind, message = error(response)
        assert (status, kind) == (500, "Backend") and "my-id" in message and "secret" not in message
        assert response.headers["x-request-id"] == "my-id"
    assert "ZeroDivisionError" in caplog.text


def test_a_request_id_of_another_form_is_replaced(client):
    found = client.get("/health", headers={"x-request-id": "a b" * 100}).headers["x-request-id"]
    assert len(found) == 32

"""Bad requests to a server: 4xx and an error in JSON, and the next good request on the connection is unchanged.

tests/serving/test_refusals.py looks at what single refusals say; here every route gets every bad input.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from bad_inputs import (
    BAD_ITEMS,
    EMPTY,
    FINITE,
    GOOD,
    MEGABYTES,
    NESTED,
    NOT_JSON,
    NOT_TEXTS,
    SURROGATES,
    TOO_LARGE,
    rows,
)
from gte_deploy.serving.document import openapi_document
from gte_deploy.serving.routes import MODEL_ROUTES
from http_server import ServerProcess, serve_command
from hybrid_reference import make_hybrid_checkpoint

JSON = {"Content-Type": "application/json"}

# Path -> the body around a text or a list of texts.
ROUTES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "/embed": lambda texts: {"inputs": texts, "truncate": True},
    "/embed_all": lambda texts: {"inputs": texts, "truncate": True},
    "/embed_sparse": lambda texts: {"inputs": texts, "truncate": True},
    "/embed_hybrid": lambda texts: {"inputs": texts, "truncate": True},
    "/embed_chunks": lambda texts: {"inputs": texts, "chunks": {"tokens": 8}, "truncate": True},
    "/embed_multi_vector": lambda texts: {"inputs": texts, "model": "embed", "truncate": True},
    "/rerank": lambda texts: {"query": "a king", "texts": texts, "truncate": True},
    "/predict": lambda texts: {"inputs": texts, "truncate": True},
    "/similarity": lambda texts: {
        "inputs": {"source_sentence": "a king", "sentences": texts},
        "parameters": {"truncate": True},
    },
    "/fill-mask": lambda texts: {"inputs": texts, "truncate": True},
    "/classify_tokens": lambda texts: {"inputs": texts, "truncate": True},
    "/tokenize": lambda texts: {"inputs": texts},
    "/decode": lambda ids: {"ids": ids},
    "/v1/embeddings": lambda texts: {"input": texts, "truncate": True},
    "/v1/rerank": lambda texts: {"query": "a king", "documents": texts, "truncate": True},
}
LISTS = ("/rerank", "/similarity", "/v1/rerank")  # which take no single text
TEXT_ROUTES = [path for path in ROUTES if path != "/decode"]


class Client:
    """One connection that stays open: a request after which the server closes it is a failure of the test."""

    def __init__(self, url: str) -> None:
        self.address = (url.removeprefix("http://").split(":")[0], int(url.rpartition(":")[2]))
        self._connection = http.client.HTTPConnection(*self.address, timeout=60)
        self._connection.connect()
        self._socket = self._connection.sock

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] = JSON) -> Any:
        """Return status, content type and body of the answer."""
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        assert self._connection.sock is self._socket, "the connection was closed"
        return answer.status, answer.headers.get("content-type"), content

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, task_bundles, bundle_of) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    hybrid = bundle_of(make_hybrid_checkpoint(folder / "checkpoint"), task="hybrid")
    models = [f"{name}={bundle}" for name, bundle in {**task_bundles, "hybrid": hybrid}.items()]
    server = ServerProcess(serve_command(*models, "--threads", 1, "--access-log", "json"), cwd=folder)
    server.wait_until_ready()
    yield server
    assert server.end() == 0
    assert "Traceback" not in server.log and "king" not in server.log, server.log[-5000:]
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    statuses = Counter(line["status"] for line in lines if line["path"] != "/ready")
    assert statuses.total() > 0 and max(statuses) < 500, statuses


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    client = Client(server.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def good_answers(client) -> dict[str, bytes]:
    answers = {path: ask_good(client, path) for path in ROUTES}
    assert len(answers) == len(MODEL_ROUTES)
    return answers


def ask_good(client: Client, path: str) -> bytes:
    texts = [[2, 9, 3]] if path == "/decode" else [GOOD]
    status, _, content = client.ask(
        "POST", path, json.dumps(ROUTES[path]([texts] if path == "/predict" else texts)).encode()
    )
    assert status == 200, content
    return re.sub(rb'"id":"[0-9a-f-]+"', b"", content)  # of a ranking in Cohere's form


@pytest.fixture(autouse=True)
def _the_next_good_request_is_unchanged(request, client, good_answers):
    yield
    path = request.node.callspec.params.get("path") if hasattr(request.node, "callspec") else None
    for good in {path or "/embed", "/fill-mask"}:
        assert ask_good(client, good) == good_answers[good]


def refused(client: Client, path: str, body: bytes | None) -> tuple[int, str]:
    """Status and message of a refusal, which has the form of the route."""
    assert body is not None
    status, kind, content = client.ask("POST", path, body)
    assert 400 <= status < 500 and kind == "application/json", (status, content[:500])
    error = json.loads(content)["error"]
    message = error["message"] if path.startswith("/v1/") else error
    assert message and "Traceback" not in message and len(message) < 2000
    return status, message


def strict(content: bytes) -> Any:
    """The value of strict JSON: all numbers are finite."""

    def refuse(name: str) -> None:
        raise AssertionError(f"the answer has {name}")

    return json.loads(content, parse_constant=refuse)


def in_json(inputs: Any) -> Any:
    """The rows that JSON can say."""
    return rows(row for row in inputs if row.json() is not None)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("row", in_json(NOT_TEXTS))
def test_no_text_at_all(client, row, path):
    status, message = refused(client, path, row.json(ROUTES[path]))
    is_nan = isinstance(row.value, float) and math.isnan(row.value)
    assert status == (400 if is_nan else 422)
    assert ("NaN" if is_nan else "expected") in message


@pytest.mark.parametrize("path", ROUTES)
def test_no_texts(client, path):
    for row in EMPTY:
        status, message = refused(client, path, row.json(ROUTES[path]))
        assert status == 400 and "is empty" in message


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("row", in_json(BAD_ITEMS))
def test_one_bad_item_names_its_index(client, row, path):
    good = [2, 9] if path == "/decode" else "a"
    for place, texts in ((0, [row.value, good]), (1, [good, row.value])):
        status, message = refused(client, path, json.dumps(ROUTES[path](texts)).encode())
        if row.value != row.value:
            assert status == 400 and "NaN" in message
            continue
        # A list that begins with a number is one of token ids, where a route takes them, and the text is what is wrong.
        assert status == 422 and any(f"[{at}]" in message for at in ((0, 1) if row.value == 7 else (place,)))


@pytest.mark.parametrize("path", TEXT_ROUTES)
@pytest.mark.parametrize("row", in_json(NESTED))
def test_nested_lists(client, row, path):
    if path == "/predict" and row.value == [[GOOD]]:
        return  # a batch of one text
    assert refused(client, path, row.json(ROUTES[path]))[0] == 422


@pytest.mark.parametrize("path", TEXT_ROUTES)
@pytest.mark.parametrize("row", rows(SURROGATES))
def test_lone_surrogates(client, row, path):
    bodies = [ROUTES[path]([GOOD, row.value])]
    bodies += [] if path in LISTS else [ROUTES[path](row.value)]
    bodies += [{**ROUTES[path]([GOOD]), "query": row.value}] if "query" in bodies[0] else []
    for body in bodies:
        status, message = refused(client, path, json.dumps(body).encode())
        assert status == 422 and "lone surrogate" in message


@pytest.mark.parametrize("path", TEXT_ROUTES)
@pytest.mark.parametrize("row", rows(FINITE))
def test_odd_texts_give_finite_answers(client, row, path):
    text = f"{row.value} [MASK] {row.value}" if path == "/fill-mask" else row.value
    body = ROUTES[path]([[text], [text, text]] if path == "/predict" else [text, text])
    status, _, content = client.ask("POST", path, json.dumps(body).encode())
    if path == "/tokenize" and row.name == "combining marks":
        assert status == 422 or strict(content)  # the route has no `truncate`
        return
    assert status == 200 and strict(content), content[:500]


@pytest.mark.parametrize("path", ["/embed", "/fill-mask", "/rerank"])
@pytest.mark.parametrize("row", rows(MEGABYTES))
def test_a_megabyte_is_cut(client, row, path):
    status, _, content = client.ask("POST", path, row.json(lambda text: ROUTES[path]([text])))
    is_too_much = path == "/fill-mask" and row.name == "masks"  # every answer repeats the text
    assert status == (413 if is_too_much else 200) and strict(content)


@pytest.mark.parametrize("path", ["/embed", "/v1/rerank"])
@pytest.mark.parametrize("row", rows(TOO_LARGE))
def test_ten_megabytes_are_refused(server, row, path):
    """The connection may be closed here, instead of reading on."""
    with contextlib.closing(Client(server.url)) as own:
        try:
            status, message = refused(own, path, row.json(lambda text: ROUTES[path]([text])))
        except (BrokenPipeError, ConnectionResetError):
            assert len(row.json() or b"") > 20_000_000, "the server did not read on"
            return
    assert status in (413, 422) and ("bytes" in message or "characters" in message)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("body", "says"), [pytest.param(body, says, id=name) for name, body, says in NOT_JSON])
def test_what_is_not_strict_json(client, path, body, says):
    status, message = refused(client, path, body)
    assert status == 400 and says in message


PROBES = [None, True, 7, -1, 0, 1.5, 1e300, 2**70, -(2**70), "", "x", "\0", [], [None], [[]], {}, {"a": None}, [{}] * 3]


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_with_values_of_every_type(client, path, attempts):
    """Values that the published schema refuses are refused, judged by jsonschema; the others never fail the server."""
    document = openapi_document()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    judge = jsonschema.Draft202012Validator({**reference, "components": document["components"]})
    good = ROUTES[path]([[2, 9]] if path == "/decode" else ["the [MASK]"])
    tried = 0
    for place in places_of(good, document, reference):
        for value in PROBES:
            body = replaced(good, place, value)
            status, _, content = client.ask("POST", path, json.dumps(body).encode())
            assert status == 200 or 400 <= status < 500, (place, value, content)
            if not judge.is_valid(body):
                assert status in (400, 413, 422), (place, value, content[:200])
                assert str(place[-1]) in content.decode(), "the message names the field"
            tried += 1
    assert tried >= 3 * len(PROBES)
    attempts("fields of requests with values of every type", tried)


def places_of(good: dict[str, Any], document: dict[str, Any], schema: dict[str, Any]) -> list[tuple[str, ...]]:
    """The fields of a request, and those of the objects in it."""
    found = []
    for name, field in resolved(document, schema)["properties"].items():
        found.append((name,))
        options = [field, *field.get("anyOf", ()), *field.get("allOf", ())]
        for option in options:
            found += [(name, inner) for inner in resolved(document, option).get("properties", {})]
    return found


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def replaced(good: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    if len(place) == 1:
        return {**good, place[0]: value}
    inner = good.get(place[0])
    return {**good, place[0]: {**(inner if isinstance(inner, dict) else {}), place[1]: value}}


TARGETS = [
    ("/nothing", 404),
    ("//embed", 404),
    ("/embed%00", 404),
    ("/%ff%fe", 404),
    ("/../../etc/passwd", 404),
    ("/page/../../../etc/passwd", 404),
    ("/page/%2e%2e/%2e%2e/etc/passwd", 404),
    ("/v1/models/%00", 404),
    ("/v1/models/..%2f..", 404),
    ("/v1/models/%F0%9F%91%A9", 404),
    ("/info?model=%ff", 404),
    ("/info?model=nothing&model=embed", 200),
    ("/info?model=", 404),
    ("/" + "x" * 20_000, 404),
    ("/health?" + "x=1&" * 5_000, 200),
    ("/embed", 405),
]


@pytest.mark.parametrize(("target", "expected"), TARGETS, ids=[target[:30] for target, _ in TARGETS])
def test_odd_targets(client, target, expected):
    status, kind, content = client.ask("GET", target)
    assert status == expected and kind == "application/json"
    assert "error" in strict(content) or status == 200
    assert b"root:" not in content


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET", "HEAD"])
def test_methods_that_a_route_does_not_take(client, method):
    for path in ("/embed", "/v1/rerank"):
        assert client.ask(method, path)[0] == 405


HEADERS = [
    ({"Content-Type": "application/json; charset=utf-16"}, 200),  # JSON has no charset: it is UTF-8
    ({"Content-Type": "text/json"}, 415),
    ({"Content-Type": ""}, 415),
    ({"Content-Type": "application/json, text/plain"}, 415),
    ({"Content-Type": "\xff"}, 415),
    ({**JSON, "Content-Encoding": "gzip, identity"}, 415),
    ({**JSON, "Accept": "text/xml;q=\xff"}, 200),
    ({**JSON, "Accept-Encoding": "*;q=0"}, 200),
    ({**JSON, "Authorization": "Bearer \xff\xfe"}, 200),
    ({**JSON, "X-Request-Timeout": "1e999"}, 200),  # the server's own bound holds
    ({**JSON, "X-Request-Timeout": "\xb2"}, 422),
    ({**JSON, "X-Request-Timeout": "9" * 400}, 200),
    ({**JSON, "X-Request-Timeout": "-9e999"}, 422),
    ({**JSON, "X-Request-Id": "\xff" * 500}, 200),
    ({**JSON, "traceparent": "00-" + "z" * 5_000}, 200),
    ({**JSON, "Cookie": "a=" + "b" * 8_000}, 200),
    ({**JSON, "Origin": "null"}, 200),
    ({**JSON, "Host": "\xff/../a"}, 200),
    ({**JSON, "Range": "bytes=9-1"}, 200),
    ({**JSON, **{f"x-{number}": "1" for number in range(90)}}, 200),
]


@pytest.mark.parametrize(
    ("headers", "expected"), HEADERS, ids=[f"{[*h][-1]} {[*h.values()][-1][:12]!a}" for h, _ in HEADERS]
)
def test_odd_headers(client, headers, expected):
    status, kind, content = client.ask("POST", "/embed", b'{"inputs": "a king"}', headers)
    assert (status, kind) == (expected, "application/json")
    assert "error" in strict(content) or status == 200


POST = b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
GOOD_POST = POST + b'Content-Length: 15\r\n\r\n{"inputs": "a"}'
RAW: list[tuple[str, bytes]] = [
    ("no HTTP", b"HELLO\r\n\r\n"),
    ("binary", bytes(range(256)) * 8),
    ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200),
    ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("a later version", b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n"),
    ("spaces in the target", b"GET /a b c HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("an unknown method", b"FLY /embed HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a header without a colon", b"GET /health HTTP/1.1\r\nHost a\r\n\r\n"),
    ("a header with a space before the colon", b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n"),
    ("a folded header", b"GET /health HTTP/1.1\r\nHost: a\r\n b: c\r\n\r\n"),
    ("NUL in a header", b"GET /health HTTP/1.1\r\nHost: a\0b\r\n\r\n"),
    ("lines that end with LF alone in a header", b"GET /health HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
    ("a length that is none", POST + b"Content-Length: abc\r\n\r\n{}"),
    ("a negative length", POST + b"Content-Length: -1\r\n\r\n{}"),
    ("a length with a sign", POST + b"Content-Length: +2\r\n\r\n{}"),
    ("a length of 30 digits", POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}"),
    ("two lengths", POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    ("length and chunks", POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    ("an unknown transfer coding", POST + b"Transfer-Encoding: gzip\r\n\r\n{}"),
    ("chunks twice", POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    ("a chunk size that is none", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    ("a negative chunk size", POST + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n"),
    ("a chunk size of 20 digits", POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n{}\r\n0\r\n\r\n"),
    ("a chunk without its end", POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n"),
    ("a body that is cut off", POST + b'Content-Length: 99\r\n\r\n{"inputs"'),
    ("chunks that are cut off", POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"),
    ("headers that are cut off", POST),
    ("a header of a megabyte", b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n"),
    ("a target of a megabyte", b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a websocket",
     b"GET /embed HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
     b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"),
    ("an upgrade to HTTP/2",
     b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
     b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"),
    ("a proxy's request", b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
    ("nothing", b""),
    ("line ends", b"\r\n" * 1000),
]  # fmt: skip


def exchange(client: Client, data: bytes, *, ends: bool = True) -> bytes:
    """Send bytes on a connection of their own, end the sending, and return all that comes back."""
    received = b""
    with socket.create_connection(client.address, timeout=20) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65_536):
            received += chunk
    return received


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in RAW])
def test_what_is_not_http(client, data):
    """The connection ends, with an answer or without; it is never one of the server's own failures."""
    received = exchange(client, data)
    for status in statuses(received):
        assert status < 500, received[:500]
    assert b"Traceback" not in received


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def test_a_second_request_is_not_smuggled_in(client):
    """Of a request with a length and with chunks, two servers may see two ends."""
    inside = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    received = exchange(client, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inside)
    assert b"smuggled" not in received


def test_bodies_in_chunks_and_requests_in_a_row(client):
    in_chunks = POST + b'Transfer-Encoding: chunked\r\n\r\n1;x=y\r\n{\r\ne\r\n"inputs": "a"}\r\n0\r\nTrailer: a\r\n\r\n'
    last = GOOD_POST.replace(b"Host: a", b"Host: a\r\nConnection: close")
    received = exchange(client, in_chunks + GOOD_POST + POST + b"Content-Length: 1\r\n\r\n{" + last, ends=False)
    assert statuses(received) == [200, 200, 400, 200]
    answers = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert answers[0] == answers[1] == answers[3]


def test_a_hundred_continue_is_given(client):
    head = POST + b"Connection: close\r\nExpect: 100-continue\r\n"
    received = exchange(client, head + b'Content-Length: 15\r\n\r\n{"inputs": "a"}', ends=False)
    assert statuses(received) in ([100, 200], [200])

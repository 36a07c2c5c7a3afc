"""A server that is no Triton, or no longer one: a wrong answer is a typed error in time, and the next good one counts.

The server speaks raw bytes on a socket, so that it can send what no HTTP library would.
"""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gte_deploy.core.errors import (
    BackendError,
    GteDeployError,
    InputError,
    NoAnswerError,
    NonFiniteError,
    UnavailableError,
)
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tasks import fill_mask
from gte_deploy.triton import Client
from gte_deploy.triton import transport as triton_transport
from gte_deploy.triton.address import parse_address
from gte_deploy.triton.answers import checked_answer, forms, read_description

pytestmark = pytest.mark.reliability
Answer = bytes | Iterable[bytes]

VOCABULARY = 100
SPECS: dict[str, dict[str, Any]] = {
    "embed": {"task": "embed"},
    "classify": {"task": "classify", "num_labels": 1},
    "fill-mask": {"task": "fill-mask"},
    "sparse": {"task": "sparse", "sparse": {"head": "splade", "query_weights": None}},
    "token-classify": {"task": "token-classify", "num_labels": 2, "id2label": {"0": "a", "1": "b"}},
}


def config_of(task: str = "embed", **changes: Any) -> bytes:
    spec = {**asdict(ModelSpec(task="embed", max_length=512, vocab_size=VOCABULARY, hidden_size=4, pad_token_id=0))}
    described = {"gte_deploy_spec": {**spec, **SPECS[task]}, "gte_deploy": {"version": "1", "precision": "fp32"}}
    parameters = {name: {"string_value": json.dumps(value)} for name, value in described.items()}
    return json.dumps({"name": "gte_embed", "max_batch_size": 8, "parameters": parameters, **changes}).encode()


def facts_of(**facts: Any) -> bytes:
    """A configuration whose facts say something else."""
    config = json.loads(config_of())
    config["parameters"]["gte_deploy"]["string_value"] = json.dumps({"version": "1", **facts})
    return json.dumps(config).encode()


def spec_of(**changes: Any) -> bytes:
    config = json.loads(config_of())
    spec = json.loads(config["parameters"]["gte_deploy_spec"]["string_value"])
    config["parameters"]["gte_deploy_spec"]["string_value"] = json.dumps({**spec, **changes})
    return json.dumps(config).encode()


def http(body: bytes, *headers: str, status: str = "200 OK", length: Any = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class RawServer:
    """Answers a request for a path that ends with a name with the bytes for it, piece by piece if there are several."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Callable[[], Answer]] = {}
        self.requests: list[bytes] = []
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = True
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                while head := self._head(connection):
                    self.requests.append(head)
                    what = head.split(b" ")[1].rpartition(b"/")[2].decode()
                    answer = self.answers[what]()
                    for piece in (answer,) if isinstance(answer, bytes) else answer:
                        connection.sendall(piece)
        except OSError:
            pass  # the client has gone

    @staticmethod
    def _head(connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (part := connection.recv(1 << 16)):
                return b""
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                missing = int(line.partition(b":")[2]) - len(body)
                while missing > 0:
                    missing -= len(connection.recv(1 << 16))
        return head


@pytest.fixture
def server() -> Iterator[RawServer]:
    server = RawServer()
    server.answers["config"] = lambda: http(config_of())
    yield server
    server.close()


def url_of(server: RawServer, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.port}"


CONFIGS: dict[str, Answer] = {
    "a page of a proxy": http(b"<html><body>Please log in</body></html>"),
    "nothing": http(b""),
    "null": http(b"null"),
    "a list": http(b"[]"),
    "a number": http(b"3"),
    "no UTF-8": http(b"\xff\xfe\xff"),
    "deep": http(b"[" * 200_000),
    "deep objects": http(b'{"a":' * 200_000),
    "long number": http(b'{"max_batch_size": ' + b"9" * 10_000 + b"}"),
    "cut": http(config_of()[:50]),
    "no parameters": http(config_of(parameters=None)),
    "parameters in a list": http(config_of(parameters=[])),
    "other parameters": http(config_of(parameters={"gte_deploy": {"string_value": 3}})),
    "spec in a list": http(spec_of(prompts=[]).replace(b"gte_deploy_spec", b"gte_deploy_specs")),
    "length": http(spec_of(max_length="512")),
    "negative length": http(spec_of(max_length=-1)),
    "task": http(spec_of(task="chat")),
    "new field": http(spec_of(new=1)),
    "no field": http(spec_of(id2label=None)),
    "facts in a list": http(
        config_of().replace(b'{\\"version\\"', b'[{\\"version\\"').replace(b'fp32\\"}', b'fp32\\"}]')
    ),
    "buckets of texts": http(facts_of(length_buckets=["16"])),
    "buckets in disorder": http(facts_of(length_buckets=[32, 16])),
    "a bucket of 0": http(facts_of(length_buckets=[0, 16])),
    "tokenizer": http(facts_of(tokenizer=3, length_buckets=[16])),
    "hidden states": http(facts_of(hidden_states="yes")),
    "cache": http(facts_of(response_cache=1)),
    "masks": http(facts_of(max_masks=-5)),
    "state rows": http(facts_of(max_state_rows=0.5)),
    "rows": http(config_of(max_batch_size=-1)),
    "rows in words": http(config_of(max_batch_size="eight")),
    "too many rows": http(config_of(max_batch_size=10**30)),
    "rows of true": http(config_of(max_batch_size=True)),
    "no status": b"hello\r\n\r\n",
    "HTTP 9": b"HTTP/9.9 200 OK\r\n\r\n",
    "status in words": b"HTTP/1.1 fine OK\r\n\r\n",
    "no content": http(b"", status="204 No Content"),
    "elsewhere": http(b"", "Location: http://127.0.0.1:1/", status="302 Found"),
    "compressed": http(gzip.compress(b"0" * (1 << 24)), "Content-Encoding: gzip"),
    "compressed, unknown": http(b"abc", "Content-Encoding: x"),
    "too large": http(b"", length=1 << 40),
    "length in words": http(config_of(parameters=3), length="many"),
    "a length without end": http(config_of(parameters=3), length="9" * 5000),
    "negative content": http(config_of(parameters=3), length=-5),
    "two lengths": http(config_of(), "Content-Length: 5"),
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk below 0": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    "a chunk of -1": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + config_of(),
    "a chunk without end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 500 + b"\r\nabc",
    "a line without end": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000,
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 5_000,
    "no colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "an error without end": http(b'{"error": "' + b"x" * (1 << 17) + b'"}', status="500 X"),
    "an error in a list": http(b"[1]", status="500 X"),
    "a deep error": http(b"[" * 60_000, status="500 X"),
}


@pytest.mark.parametrize("answer", CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_description(server: RawServer, answer: bytes):
    def close_after() -> Iterator[bytes]:
        yield answer
        raise OSError  # the server closes the connection

    server.answers["config"] = close_after
    started = time.monotonic()
    with pytest.raises(GteDeployError) as caught:
        Client(url_of(server), timeout_s=20)
    assert isinstance(caught.value, BackendError) and not isinstance(caught.value, NoAnswerError)
    assert len(str(caught.value)) < 3000 and time.monotonic() - started < 10


Tensor = tuple[str, str, Any, bytes]


def texts_of(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def floats(*values: float, kind: str = "<f4") -> bytes:
    return np.array(values, dtype=kind).tobytes()


def ints(*values: int, kind: str = "<i4") -> bytes:
    return np.array(values, dtype=kind).tobytes()


def body_of(*tensors: Tensor, **changes: Any) -> bytes:
    outputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(data), **changes}}
        for name, kind, shape, data in tensors
    ]
    header = json.dumps({"model_name": "m", "outputs": outputs}).encode()
    content = header + b"".join(data for *_, data in tensors)
    return http(content, f"Inference-Header-Content-Length: {len(header)}")


EMBEDDING: Tensor = ("EMBEDDING", "FP32", [3, 4], floats(*range(12)))
LOGITS: Tensor = ("LOGITS", "FP32", [3, 1], floats(1, 2, 3))
SCORE: Tensor = ("SCORE", "FP32", [3, 1], floats(1, 2, 3))
MASKS: list[Tensor] = [
    ("MASKS", "INT32", [3, 1], ints(1, 2, 1)),
    ("TOKEN", "BYTES", [3, 2, 1], texts_of(b"a", b"", b"b", b"c", b"d", b"")),
    ("TOKEN_ID", "INT64", [3, 2, 1], ints(5, -1, 6, 7, 8, -1, kind="<i8")),
    ("SCORE", "FP32", [3, 2, 1], floats(0.5, 0, 0.4, 0.3, 0.2, 0)),
    ("SEQUENCE", "BYTES", [3, 2, 1], texts_of(b"x", b"", b"y", b"z", b"w", b"")),
]
WEIGHTS: list[Tensor] = [
    ("TOKENS", "INT32", [3, 1], ints(1, 2, 0)),
    ("TOKEN", "BYTES", [3, 2], texts_of(b"a", b"", b"b", b"c", b"", b"")),
    ("TOKEN_ID", "INT64", [3, 2], ints(5, -1, 6, 7, -1, -1, kind="<i8")),
    ("WEIGHT", "FP32", [3, 2], floats(1, 0, 2, 3, 0, 0)),
]
ENTITIES: list[Tensor] = [
    ("ENTITIES", "INT32", [3, 1], ints(1, 1, 0)),
    ("LABEL", "BYTES", [3, 1], texts_of(b"a", b"b", b"")),
    ("WORD", "BYTES", [3, 1], texts_of(b"x", b"y", b"")),
    ("INDEX", "INT32", [3, 1], ints(1, 2, -1)),
    ("START", "INT32", [3, 1], ints(0, 1, -1)),
    ("END", "INT32", [3, 1], ints(1, 2, -1)),
    ("SCORE", "FP32", [3, 1], floats(0.5, 0.6, 0)),
]


def replaced(tensors: list[Tensor], *tensor: Any) -> bytes:
    """The answer with another tensor of that name."""
    return body_of(*[tensor if each[0] == tensor[0] else each for each in tensors])


EMBEDDINGS: dict[str, bytes] = {
    "a page of a proxy": http(b"<html>Please log in</html>"),
    "nothing": http(b""),
    "no outputs": http(b"{}"),
    "outputs that are an object": http(b'{"outputs": {}}'),
    "outputs that are numbers": http(b'{"outputs": [1]}'),
    "another output": body_of(("OTHER", *EMBEDDING[1:])),
    "the output twice": body_of(EMBEDDING, EMBEDDING),
    "no name": http(b'{"outputs": [{"datatype": "FP32", "shape": [3, 4]}]}'),
    "no datatype": http(b'{"outputs": [{"name": "EMBEDDING", "shape": [3, 4]}]}'),
    "data in JSON": http(b'{"outputs": [{"name": "EMBEDDING", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}'),
    "half the header": http(b'{"outputs": []}', "Inference-Header-Content-Length: 5"),
    "a header length in words": http(b'{"outputs": []}', "Inference-Header-Content-Length: five"),
    "a header length below 0": http(b'{"outputs": []}', "Inference-Header-Content-Length: -1"),
    "a header length without end": http(b'{"outputs": []}', f"Inference-Header-Content-Length: {'9' * 5000}"),
    "FP64": body_of(("EMBEDDING", "FP64", [3, 4], floats(*range(12), kind="<f8"))),
    "INT64": body_of(("EMBEDDING", "INT64", [3, 4], ints(*range(12), kind="<i8"))),
    "BYTES": body_of(("EMBEDDING", "BYTES", [3, 4], texts_of(*[b"a"] * 12))),
    "UINT8": body_of(("EMBEDDING", "UINT8", [3, 4], bytes(12))),
    "no type": body_of(("EMBEDDING", "FP31", [3, 4], bytes(48))),
    "one row": body_of(("EMBEDDING", "FP32", [1, 4], floats(1, 2, 3, 4))),
    "four rows": body_of(("EMBEDDING", "FP32", [4, 4], floats(*range(16)))),
    "no rows": body_of(("EMBEDDING", "FP32", [0, 4], b"")),
    "no width": body_of(("EMBEDDING", "FP32", [3, 0], b"")),
    "narrow": body_of(("EMBEDDING", "FP32", [3, 2], floats(*range(6)))),
    "wide": body_of(("EMBEDDING", "FP32", [3, 5], floats(*range(15)))),
    "flat": body_of(("EMBEDDING", "FP32", [12], floats(*range(12)))),
    "deep": body_of(("EMBEDDING", "FP32", [3, 4, 1], floats(*range(12)))),
    "a hundred dimensions": body_of(("EMBEDDING", "FP32", [1] * 100, floats(1))),
    "a number": body_of(("EMBEDDING", "FP32", [], floats(1))),
    "a shape below 0": body_of(("EMBEDDING", "FP32", [-3, -4], floats(*range(12)))),
    "an open shape": body_of(("EMBEDDING", "FP32", [3, -1], floats(*range(12)))),
    "a shape in words": body_of(("EMBEDDING", "FP32", "3,4", floats(*range(12)))),
    "a shape of fractions": body_of(("EMBEDDING", "FP32", [3.0, 4.0], floats(*range(12)))),
    "a shape without end": body_of(("EMBEDDING", "FP32", [10**18, 10**18], floats(1))),
    "an enormous shape": body_of(("EMBEDDING", "FP32", [3, 1 << 39], floats(1))),
    "a shape of true": body_of(("EMBEDDING", "FP32", [True, True], floats(1))),
    "too few bytes": body_of(("EMBEDDING", "FP32", [3, 4], floats(*range(11)))),
    "too many bytes": body_of(("EMBEDDING", "FP32", [3, 4], floats(*range(13)))),
    "a size beyond the body": body_of(EMBEDDING, binary_data_size=1 << 40),
    "a size below 0": body_of(EMBEDDING, binary_data_size=-48),
    "a size in words": body_of(EMBEDDING, binary_data_size="48"),
    "compressed": http(gzip.compress(b"{}" * 1000), "Content-Encoding: gzip"),
    "too large": http(b"", length=1 << 31),
}
NOT_FINITE: dict[str, bytes] = {
    "NaN": body_of(("EMBEDDING", "FP32", [3, 4], floats(*[0] * 5, np.nan, *[0] * 6))),
    "Inf": body_of(("EMBEDDING", "FP32", [3, 4], floats(*[0] * 5, np.inf, *[0] * 6))),
    "NaN of 16 bits": body_of(("EMBEDDING", "FP16", [3, 4], floats(*[0] * 5, np.nan, *[0] * 6, kind="<f2"))),
    "-Inf of 16 bits": body_of(("EMBEDDING", "FP16", [3, 4], floats(*[0] * 5, -np.inf, *[0] * 6, kind="<f2"))),
}
SCORES: dict[str, bytes] = {
    "one row": body_of(SCORE, ("LOGITS", "FP32", [1, 1], floats(2))),
    "one number": body_of(SCORE, ("LOGITS", "FP32", [1], floats(2))),
    "two labels": body_of(SCORE, ("LOGITS", "FP32", [3, 2], floats(*range(6)))),
    "no scores": body_of(LOGITS),
    "no logits": body_of(SCORE),
}
WORDS: dict[str, bytes] = {
    "no mask": replaced(MASKS, "MASKS", "INT32", [3, 1], ints(1, 0, 1)),
    "masks below 0": replaced(MASKS, "MASKS", "INT32", [3, 1], ints(1, -1, 1)),
    "more masks than answers": replaced(MASKS, "MASKS", "INT32", [3, 1], ints(1, 3, 1)),
    "masks of one row": replaced(MASKS, "MASKS", "INT32", [1, 1], ints(1)),
    "a fraction of a mask": replaced(MASKS, "MASKS", "FP32", [3, 1], floats(1, 2, 1)),
    "no UTF-8": replaced(MASKS, "TOKEN", "BYTES", [3, 2, 1], texts_of(b"\xff", b"", b"b", b"c", b"d", b"")),
    "sequences that are no UTF-8": replaced(MASKS, "SEQUENCE", "BYTES", [3, 2, 1], texts_of(b"\xff", *[b""] * 5)),
    "fewer words than places": replaced(MASKS, "TOKEN", "BYTES", [3, 2, 1], texts_of(b"a", b"b")),
    "more words than places": replaced(MASKS, "TOKEN", "BYTES", [3, 2, 1], texts_of(*[b"a"] * 7)),
    "words of other masks": replaced(MASKS, "TOKEN", "BYTES", [3, 1, 2], texts_of(*[b"a"] * 6)),
    "a word without end": replaced(MASKS, "TOKEN", "BYTES", [3, 2, 1], b"\xff\xff\xff\xff" * 8),
    "half a length": replaced(MASKS, "TOKEN", "BYTES", [3, 2, 1], texts_of(*[b"a"] * 6)[:-3]),
    "an unknown id": replaced(MASKS, "TOKEN_ID", "INT64", [3, 2, 1], ints(5, -1, VOCABULARY, 7, 8, -1, kind="<i8")),
    "an id below 0": replaced(MASKS, "TOKEN_ID", "INT64", [3, 2, 1], ints(5, -1, 6, -7, 8, -1, kind="<i8")),
    "ids of 32 bits": replaced(MASKS, "TOKEN_ID", "INT32", [3, 2, 1], ints(5, -1, 6, 7, 8, -1)),
    "no sequences": body_of(*MASKS[:-1]),
}
VECTORS: dict[str, bytes] = {
    "more entries than there are": replaced(WEIGHTS, "TOKENS", "INT32", [3, 1], ints(1, 3, 0)),
    "entries below 0": replaced(WEIGHTS, "TOKENS", "INT32", [3, 1], ints(1, -2, 0)),
    "an unknown id": replaced(WEIGHTS, "TOKEN_ID", "INT64", [3, 2], ints(5, -1, VOCABULARY, 7, -1, -1, kind="<i8")),
    "an id below 0": replaced(WEIGHTS, "TOKEN_ID", "INT64", [3, 2], ints(-1, -1, 6, 7, -1, -1, kind="<i8")),
    "weights of other entries": replaced(WEIGHTS, "WEIGHT", "FP32", [3, 1], floats(1, 2, 3)),
    "weights of one text": replaced(WEIGHTS, "WEIGHT", "FP32", [1, 2], floats(1, 2)),
    "a name that is no UTF-8": replaced(WEIGHTS, "TOKEN", "BYTES", [3, 2], texts_of(b"\xc3", *[b""] * 5)),
}
SPANS: dict[str, bytes] = {
    "more entities than there are": replaced(ENTITIES, "ENTITIES", "INT32", [3, 1], ints(1, 2, 0)),
    "entities below 0": replaced(ENTITIES, "ENTITIES", "INT32", [3, 1], ints(1, -1, 0)),
    "places below 0": replaced(ENTITIES, "START", "INT32", [3, 1], ints(-3, 1, -1)),
    "a label that is no UTF-8": replaced(ENTITIES, "LABEL", "BYTES", [3, 1], texts_of(b"\xff", b"b", b"")),
    "two scores": replaced(ENTITIES, "SCORE", "FP32", [3, 2], floats(*range(6))),
}
TEXTS = ["a", "b", "c"]
Ask = Callable[[Client], Any]


def unscored(answer: Any) -> Any:
    return [[(item["token_str"], item["sequence"]) for item in best] for best in answer]


CALLS: dict[str, tuple[Ask, bytes, Any]] = {
    "embed": (lambda client: client.encode(TEXTS).tolist(), body_of(EMBEDDING), np.arange(12).reshape(3, 4).tolist()),
    "classify": (
        lambda client: client.predict([[text] for text in TEXTS], activation_fn=lambda logits: logits).tolist(),
        body_of(SCORE, LOGITS),
        [1, 2, 3],
    ),
    "fill-mask": (
        lambda client: [len(best) for best in client.fill_mask(TEXTS, top_k=1)],
        body_of(*MASKS),
        [1, 2, 1],
    ),
    "sparse": (lambda client: client.encode_sparse(TEXTS), body_of(*WEIGHTS), [{"a": 1}, {"c": 3, "b": 2}, {}]),
    "token-classify": (
        lambda client: [[entity["word"] for entity in text] for text in client.classify_tokens(TEXTS)],
        body_of(*ENTITIES),
        [["x"], ["y"], []],
    ),
}
WRONG = {
    f"{task}: {name}": (task, answer, BackendError)
    for task, answers in (
        ("embed", EMBEDDINGS),
        ("classify", SCORES),
        ("fill-mask", WORDS),
        ("sparse", VECTORS),
        ("token-classify", SPANS),
    )
    for name, answer in answers.items()
} | {f"embed: {name}": ("embed", answer, NonFiniteError) for name, answer in NOT_FINITE.items()}


@pytest.mark.parametrize(("task", "answer", "kind"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer(server: RawServer, task: str, answer: bytes, kind: type[Exception]):
    ask, good, expected = CALLS[task]
    server.answers["config"] = lambda: http(config_of(task))
    with Client(url_of(server), timeout_s=20) as client:
        server.answers["infer"] = lambda: good
        assert ask(client) == expected
        server.answers["infer"] = lambda: answer
        with pytest.raises(GteDeployError) as caught:
            ask(client)
        assert type(caught.value) is kind, caught.value
        if kind is NonFiniteError:
            assert "for the inputs 1;" in str(caught.value)
        server.answers["infer"] = lambda: good
        assert ask(client) == expected


def test_embeddings_of_16_bits_become_float32(server: RawServer):
    """A TensorRT plan may give them."""
    server.answers["infer"] = lambda: body_of(("EMBEDDING", "FP16", [3, 4], floats(*range(12), kind="<f2")))
    with Client(url_of(server)) as client:
        found = client.encode(TEXTS)
    assert found.dtype == np.float32 and found.tolist() == np.arange(12).reshape(3, 4).tolist()


def test_the_answer_has_a_limit_of_bytes(server: RawServer):
    server.answers["infer"] = lambda: body_of(EMBEDDING)
    size = len(body_of(EMBEDDING).partition(b"\r\n\r\n")[2])
    with Client(url_of(server), max_answer_bytes=size) as client:
        assert len(client.encode(TEXTS)) == 3
    with Client(url_of(server), max_answer_bytes=size - 1) as client:
        with pytest.raises(BackendError, match=f"sent an answer of {size} bytes; at most {size - 1} are read"):
            client.encode(TEXTS)


def test_a_stream_without_end_is_read_no_further_than_the_limit(server: RawServer):
    sent = []

    def stream() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        while True:
            sent.append(1 << 16)
            yield b"10000\r\n" + b" " * (1 << 16) + b"\r\n"

    server.answers["infer"] = stream
    with Client(url_of(server), max_answer_bytes=1 << 20, timeout_s=20) as client:
        with pytest.raises(BackendError, match="an answer of more than 1,048,576 bytes"):
            client.encode(TEXTS)
    assert sum(sent) < 16 << 20  # and what the buffers of the system hold


def test_a_chunk_below_0_is_no_way_around_the_limit(server: RawServer):
    sent = []

    def stream() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
        while True:
            sent.append(1 << 16)
            yield b" " * (1 << 16)

    server.answers["infer"] = stream
    with Client(url_of(server), max_answer_bytes=1 << 20, timeout_s=5) as client:
        with pytest.raises(UnavailableError, match="a chunk has the size -1"):
            client.encode(TEXTS)
    assert sum(sent) < 16 << 20


def dripping(start: bytes, drop: bytes) -> Callable[[], Iterator[bytes]]:
    """Each drop comes before a timeout of one read would pass, for ever."""

    def drip() -> Iterator[bytes]:
        yield start
        while True:
            time.sleep(0.1)
            yield drop

    return drip


DRIPS = {
    "status": (b"", b"H"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
    "body": (http(b"", length=1 << 20), b"a"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "error": (http(b"", status="500 X", length=1 << 10), b"a"),
}


@pytest.mark.parametrize("what", ["config", "infer"])
@pytest.mark.parametrize("drip", DRIPS.values(), ids=DRIPS)
def test_a_drip_ends_with_the_deadline(server: RawServer, drip: tuple[bytes, bytes], what: str):
    if what == "config":
        server.answers["config"] = dripping(*drip)
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="no answer within 0.5 s"):
            Client(url_of(server), timeout_s=0.5)
        assert time.monotonic() - started < 3
        return
    with Client(url_of(server), timeout_s=0.5, connections=1) as client:
        server.answers["infer"] = dripping(*drip)
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="no answer within 0.5 s"):
            client.encode(TEXTS)
        assert time.monotonic() - started < 3
        server.answers["infer"] = lambda: body_of(EMBEDDING)
        assert len(client.encode(TEXTS)) == 3  # the only connection is free again


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "chain.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no openssl here: {error}")
    return chain, key


def test_tls_has_the_same_deadline(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    chain, key = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    server = RawServer(context)
    try:
        server.answers = {"config": lambda: http(config_of()), "infer": lambda: body_of(EMBEDDING)}
        with Client(url_of(server, "https"), timeout_s=1) as client:
            assert client.encode(TEXTS).shape == (3, 4)
            server.answers["infer"] = dripping(*DRIPS["body"])
            started = time.monotonic()
            with pytest.raises(NoAnswerError):
                client.encode(TEXTS)
            assert time.monotonic() - started < 4
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            Client(url_of(server, "https"), timeout_s=5)
    finally:
        server.close()


SECRET = "tops3cret"


@pytest.mark.parametrize("scheme", ["http", "https", "grpc"])
def test_a_password_is_shown_nowhere(scheme: str, caplog: pytest.LogCaptureFixture):
    with socket.socket() as free, caplog.at_level("DEBUG"):
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UnavailableError) as caught:
            Client(f"{scheme}://user:{SECRET}@127.0.0.1:{free.getsockname()[1]}", timeout_s=5)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error) and SECRET not in repr(error)
        error = error.__cause__ or error.__context__
    assert SECRET not in caplog.text


def test_a_password_is_sent_as_authorization(server: RawServer, caplog: pytest.LogCaptureFixture):
    server.answers["infer"] = lambda: http(b'{"error": "no"}', status="401 Unauthorized")
    url = url_of(server).replace("//", f"//user:{SECRET}%21@")
    with caplog.at_level("DEBUG"), Client(url) as client:
        assert all(b"authorization: Basic dXNlcjp0b3BzM2NyZXQh" in head for head in server.requests)
        for shown in (json.dumps(client.info()), repr(client), str(client)):
            assert SECRET not in shown
        with pytest.raises(BackendError, match="failed with 401: no") as caught:
            client.encode("a")
        assert SECRET not in str(caught.value) and url_of(server) in str(caught.value)
    assert SECRET not in caplog.text and "dXNlcjp0" not in caplog.text


BAD_URLS = {
    "port": f"http://user:{SECRET}@host:port",
    "port 0": f"http://user:{SECRET}@host:0",
    "port above": f"http://user:{SECRET}@host:65536",
    "scheme": f"ftp://user:{SECRET}@host",
    "no host": f"http://user:{SECRET}@",
    "bracket": f"http://user:{SECRET}@[::1",
    "no IPv6": f"http://user:{SECRET}@[::g]:1",
    "space": f"http://user:{SECRET}@ho st:1",
    "line": f"http://user:{SECRET}@host:1\n/",
    "dots": f"http://user:{SECRET}@a..b:1",
    "long": f"http://user:{SECRET}@{'a' * 64}.example",
    "slash in the password": f"http://user:{SECRET}/x@host:1",
    "query": f"http://user:{SECRET}@host:1/?key=value",
    "fragment": f"http://user:{SECRET}@host:1/#x",
    "gRPC with a path": f"grpc://user:{SECRET}@host:1/models",
    "no scheme": f"user:{SECRET}@host:1",
    "NUL": f"http://user:{SECRET}@host\0:1",
}


@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS)
def test_a_bad_url(url: str):
    with pytest.raises(InputError, match="url must be http://HOST:PORT") as caught:
        Client(url)
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("url", [None, 3, b"http://host:1", ["http://host:1"]], ids=repr)
def test_a_url_that_is_no_text(url: Any):
    with pytest.raises(InputError, match="url must be a text"):
        Client(url)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"authorization": f"Bearer {SECRET}\r\nX: y"}, "the value of the header authorization must"),
        ({"authorization": f"Bearer {SECRET}ü"}, "the value of the header authorization must"),
        ({"a b": SECRET}, "'a b' is no name of a header"),
        ({"": SECRET}, "'' is no name of a header"),
        ({"a": 3}, "must be texts"),
        ({3: SECRET}, "must be texts"),
        ([("a", SECRET)], "headers must be a mapping"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_bad_headers(scheme: str, headers: Any, message: str):
    with pytest.raises(InputError, match=message) as caught:
        Client(f"{scheme}://localhost:1", headers=headers)
    assert SECRET not in str(caught.value)


def test_two_authorizations():
    with pytest.raises(InputError, match="give one of the two") as caught:
        Client(f"http://user:{SECRET}@localhost:1", headers={"Authorization": f"Bearer {SECRET}"})
    assert SECRET not in str(caught.value)


def test_an_unknown_length_of_time_is_no_hole(server: RawServer):
    """The connections of a pool are as many after errors as before, so nothing waits for one that is lost."""
    transport = triton_transport.open_transport(url_of(server), connections=1, timeout_s=5, headers={})
    server.answers["config"] = lambda: http(b"", length=1 << 40)
    for _ in range(3):
        with pytest.raises(BackendError, match="at most 16,777,216 are read"):
            transport.config("m")
    server.answers["config"] = lambda: http(config_of())
    assert transport.config("m")["max_batch_size"] == 8
    transport.close()


@pytest.fixture
def grpc_server() -> Iterator[Any]:
    """`.url`, and `.config` and `.infer`: functions that answer, with the arguments of a gRPC servicer."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from google.protobuf import json_format
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        url = ""

        def config(self, request: Any, context: Any) -> Any:
            parameters = json.loads(config_of())["parameters"]
            config = {"name": "gte_embed", "max_batch_size": 8, "parameters": parameters}
            return json_format.ParseDict({"config": config}, service_pb2.ModelConfigResponse())

        def infer(self, request: Any, context: Any) -> Any:
            return response_of(("EMBEDDING", "FP32", [3, 4], floats(*range(12))))

        def ModelConfig(self, request: Any, context: Any) -> Any:
            return self.config(request, context)

        def ModelInfer(self, request: Any, context: Any) -> Any:
            return self.infer(request, context)

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
    servicer = Servicer()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    servicer.url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None)


def response_of(*tensors: Tensor, raw: bool = True) -> Any:
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse(model_name="m")
    for name, kind, shape, data in tensors:
        response.outputs.add(name=name, datatype=kind, shape=shape)
        if raw:
            response.raw_output_contents.append(data)
    return response


GRPC = {
    "no outputs": (),
    "another output": (("OTHER", *EMBEDDING[1:]),),
    "the output twice": (EMBEDDING, EMBEDDING),
    "FP64": (("EMBEDDING", "FP64", [3, 4], floats(*range(12), kind="<f8")),),
    "no type": (("EMBEDDING", "FP31", [3, 4], bytes(48)),),
    "one row": (("EMBEDDING", "FP32", [1, 4], floats(1, 2, 3, 4)),),
    "wide": (("EMBEDDING", "FP32", [3, 5], floats(*range(15))),),
    "a shape below 0": (("EMBEDDING", "FP32", [-3, -4], floats(*range(12))),),
    "a shape without end": (("EMBEDDING", "FP32", [1 << 62, 1 << 62], floats(1)),),
    "too few bytes": (("EMBEDDING", "FP32", [3, 4], floats(*range(11))),),
    "BYTES": (("EMBEDDING", "BYTES", [3, 4], texts_of(*[b"a"] * 12)),),
    "texts without end": (("EMBEDDING", "BYTES", [3, 4], b"\xff" * 64),),
}


@pytest.mark.parametrize("tensors", [*GRPC.values(), None], ids=[*GRPC, "not in binary"])
def test_a_wrong_answer_of_grpc(grpc_server: Any, tensors: tuple[Tensor, ...] | None):
    good = grpc_server.infer
    with Client(grpc_server.url, timeout_s=20) as client:
        grpc_server.infer = lambda *_: response_of(EMBEDDING, raw=False) if tensors is None else response_of(*tensors)
        with pytest.raises(GteDeployError) as caught:
            client.encode(TEXTS)
        assert type(caught.value) is BackendError
        grpc_server.infer = good
        assert client.encode(TEXTS).shape == (3, 4)


@pytest.mark.parametrize("kind", ["FP16", "FP32"])
def test_numbers_of_grpc_that_are_not_finite(grpc_server: Any, kind: str):
    values = floats(*[0] * 11, np.nan, kind="<f2" if kind == "FP16" else "<f4")
    grpc_server.infer = lambda *_: response_of(("EMBEDDING", kind, [3, 4], values))
    with Client(grpc_server.url, timeout_s=20) as client, pytest.raises(NonFiniteError, match="for the inputs 2;"):
        client.encode(TEXTS)


def test_limits_of_grpc(grpc_server: Any):
    """Size, compression and time."""
    import grpc

    good = grpc_server.infer
    with Client(grpc_server.url, timeout_s=20, max_answer_bytes=1 << 16) as client:
        grpc_server.infer = lambda *_: response_of(("EMBEDDING", "FP32", [3, 1 << 20], bytes(12 << 20)))
        with pytest.raises(BackendError, match="an answer that is not read: .*larger than max"):
            client.encode(TEXTS)

        def compressed(request: Any, context: Any) -> Any:
            context.set_compression(grpc.Compression.Gzip)
            return response_of(("EMBEDDING", "FP32", [3, 1 << 20], bytes(12 << 20)))

        grpc_server.infer = compressed
        with pytest.raises(BackendError):
            client.encode(TEXTS)
        grpc_server.infer = good
        assert client.encode(TEXTS).shape == (3, 4)
    with Client(grpc_server.url, timeout_s=0.5) as client:
        grpc_server.infer = lambda *_: time.sleep(2)
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="no answer within 0.5 s"):
            client.encode(TEXTS)
        assert time.monotonic() - started < 1.9


def test_a_password_is_sent_to_grpc(grpc_server: Any):
    seen: list[Any] = []
    good = grpc_server.config
    grpc_server.config = lambda request, context: seen.append(context.invocation_metadata()) or good(request, context)
    with Client(grpc_server.url.replace("//", f"//user:{SECRET}%21@"), headers={"X-Key": "value"}) as client:
        assert client.info()["url"] == grpc_server.url
    metadata = dict(seen[0])
    assert metadata["authorization"] == "Basic dXNlcjp0b3BzM2NyZXQh" and metadata["x-key"] == "value"


def test_an_empty_configuration_of_grpc(grpc_server: Any):
    from tritonclient.grpc import service_pb2

    grpc_server.config = lambda *_: service_pb2.ModelConfigResponse()
    with pytest.raises(BackendError, match="the configuration of gte_"):
        Client(grpc_server.url)


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """A few bytes of an answer replaced, removed, put in or repeated."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        end = min(len(data), place + draw(st.integers(0, 8)))
        data[place:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[place:end]) * 3)))
    return bytes(data)


ADDRESS = parse_address("http://server:8000")
HEADER, DATA = body_of(*MASKS).partition(b"\r\n\r\n")[2].split(b"}]}", 1)
MASKS_HEADER = HEADER + b"}]}"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(header=st.one_of(st.just(MASKS_HEADER), changed(MASKS_HEADER)), data=st.one_of(st.just(DATA), changed(DATA)))
def test_any_answer_is_right_or_a_typed_error(header: bytes, data: bytes):
    spec = ModelSpec(task="fill-mask", max_length=512, vocab_size=VOCABULARY, hidden_size=4, pad_token_id=0)
    try:
        parts = triton_transport._http_outputs(header + data, str(len(header)), "m", ADDRESS)
        values = triton_transport._arrays(parts, fill_mask.SERVED.outputs, "m", ADDRESS)
        checked = checked_answer(values, forms(fill_mask.SERVED, spec, 4), 3, where="m")
    except BackendError:
        return
    found = fill_mask.from_tensors(checked)
    assert len(found) == 3 and all(1 <= len(masks) <= 2 for masks in found)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=changed(config_of()))
def test_any_description_is_read_or_a_typed_error(config: bytes):
    try:
        found = read_description(triton_transport._json_object(config, "m", ADDRESS), "m")
    except BackendError:
        return
    assert 1 <= found.max_rows <= 65_536 and found.spec.max_length >= 1

"""The client in other processes: forked, pickled, copied."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.triton import client as triton

SPEC = ModelSpec(task="embed", max_length=512, vocab_size=100, hidden_size=2, pad_token_id=0)
CONFIG = {
    "name": "gte_embed",
    "max_batch_size": 4,
    "parameters": {
        "gte_deploy_spec": {"string_value": json.dumps(asdict(SPEC))},
        "gte_deploy": {"string_value": json.dumps({"version": "1", "precision": "fp32"})},
    },
}
# A server that answers a text, which is a number, with that number; slowly, so that requests overlap.
SERVER = """
    import json, os, signal, struct, sys, threading, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    import numpy as np
    from gte_deploy.triton import Client

    callers = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(json.loads(sys.argv[1]))

        def do_POST(self):
            callers.add(self.client_address)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body, numbers = body[int(self.headers["Inference-Header-Content-Length"]):], []
            while body:
                size, = struct.unpack_from("<I", body)
                numbers.append(float(body[4:4 + size]))
                body = body[4 + size:]
            time.sleep(0.01)
            data = np.repeat(np.array(numbers, "<f4"), 2).tobytes()
            size = {"binary_data_size": len(data)}
            output = {"name": "EMBEDDING", "datatype": "FP32", "shape": [len(numbers), 2], "parameters": size}
            self.answer({"model_name": "gte_embed", "model_version": "1", "outputs": [output]}, data)

        def answer(self, content, data=b""):
            header = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(header) + len(data)))
            if data:
                self.send_header("Inference-Header-Content-Length", str(len(header)))
            self.end_headers()
            self.wfile.write(header + data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def check(start):
        numbers = np.arange(start, start + 40)
        np.testing.assert_array_equal(client.encode([str(number) for number in numbers])[:, 0], numbers)
"""
FORK = """
    with Client(f"http://127.0.0.1:{server.server_port}", connections=3) as client:
        check(0)
        before = set(callers)
        children = []
        for child in range(1, 4):
            pid = os.fork()
            if pid == 0:
                signal.alarm(30)
                for _ in range(5):
                    check(1000 * child)
                client.close()
                sys.exit(0)
            children.append(pid)
        for _ in range(5):
            check(0)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
        check(0)
        assert len(callers - before) >= 3  # connections of the children's own
"""


def test_forked_children_have_connections_of_their_own() -> None:
    pytest.importorskip("tritonclient")
    script = textwrap.dedent(SERVER) + textwrap.dedent(FORK)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(CONFIG)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


class FakeTransport:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def config(self, model: str) -> dict[str, Any]:
        return CONFIG

    def infer(self, model: str, inputs: Any, outputs: Any) -> dict[str, Any]:
        return {"EMBEDDING": np.ones((len(inputs["TEXT"]), 2), np.float32)}

    def close(self) -> None:
        self.options["closed"] = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options of every transport that was opened."""
    calls: list[dict[str, Any]] = []

    def open_transport(**options: Any) -> FakeTransport:
        calls.append(options)
        return FakeTransport(options)

    monkeypatch.setattr(triton, "open_transport", open_transport)
    yield calls


OPTIONS: dict[str, Any] = {
    "timeout_s": 3.0,
    "connections": 2,
    "max_batch_tokens": 99,
    "headers": {"a": "b"},
    "max_answer_bytes": 1 << 20,
}


@pytest.mark.parametrize("again", [lambda client: pickle.loads(pickle.dumps(client)), copy.deepcopy, copy.copy])
def test_pickled_and_copied_it_is_made_again(again: Callable[[Any], Any], opened: list[dict[str, Any]]) -> None:
    with triton.Client("http://host:8000", **OPTIONS) as client, again(client) as other:
        assert opened[0] == opened[1]
        assert opened[0] == {
            "url": "http://host:8000",
            **{name: value for name, value in OPTIONS.items() if name != "max_batch_tokens"},
        }
        assert other._max_batch_tokens == 99
        assert other.encode("1").tolist() == [1, 1]


def test_a_closed_client_is_not_pickled(opened: list[dict[str, Any]]) -> None:
    client = triton.Client()
    client.close()
    with pytest.raises(BackendError, match="closed.*create another"):
        pickle.dumps(client)


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_grpc_is_refused_after_a_fork(scheme: str, opened: list[dict[str, Any]]) -> None:
    client = triton.Client(f"{scheme}://host:8001")
    client.after_fork(idle=True)
    with pytest.raises(BackendError, match="gRPC does not survive a fork. Create the client after the fork"):
        client.encode("1")
    client.close()
    assert "closed" not in opened[0]  # the parent's channel is not touched
    with pytest.raises(BackendError, match="closed"):
        client.encode("1")


def test_wrong_arguments_are_refused_before_anything_is_opened(opened: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError):
        triton.Client(timeout_s=-1)
    assert opened == []

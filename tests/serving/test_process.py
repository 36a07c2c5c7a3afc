"""The server as a process: start, overload, deadlines, clients that go away, and the end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gte_deploy.serving.server import _listen

pytestmark = pytest.mark.reliability
SLOW = Path(__file__).with_name("slow_server.py")


@pytest.fixture
def start_slow(start):
    """`start_slow(seconds, **options)`: a server whose model takes so many seconds for each text."""

    def start_slow(seconds, **options):
        return start(command=[str(SLOW), str(seconds), *(f"{name}={value}" for name, value in options.items())])

    return start_slow


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def in_work(server):
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("gte_deploy_requests_in_work"):
            return float(line.split()[1])
    raise AssertionError("no such metric")


def test_several_models_and_the_end(start, task_bundles):
    bundles = [f"{name}={task_bundles[name]}" for name in ("embed", "rank")]
    server = start(*bundles, "--access-log", "json")
    assert httpx.get(f"{server.url}/health").json() == {"status": "alive"}
    body = {"inputs": ["the king", "a city"]}
    answer = httpx.post(f"{server.url}/embed", json=body, headers={"x-request-id": "first"})
    assert answer.status_code == 200 and "server" not in answer.headers
    ranked = httpx.post(f"{server.url}/rerank", json={"query": "a", "texts": ["b", "c"]})
    assert ranked.status_code == 200
    wait_for(lambda: any(line.startswith("gte-deploy: ready after ") for line in server.lines))
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'gte_deploy_requests_total{route="/embed",status="200"} 1.0' in metrics
    assert 'gte_deploy_tokens_total{model="embed"}' in metrics
    assert 'gte_deploy_queue_tokens{model="rank"} 0.0' in metrics
    assert server.end() == 0
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    (line,) = [line for line in lines if line["request_id"] == "first"]
    assert line["path"] == "/embed" and line["status"] == 200 and line["model"] == "embed" and line["inputs"] == 2
    assert line["ms"] >= line["compute_ms"] >= 0 and "king" not in server.log


def test_the_log_has_no_words_of_a_request(start, task_bundles):
    server = start(task_bundles["mask"])
    body = {"inputs": "a [MASK]", "parameters": {"targets": ["city", "confidential"]}}
    assert httpx.post(f"{server.url}/fill-mask", json={**body}).status_code in (200, 422)
    assert server.end() == 0 and "confidential" not in server.log


def test_ctrl_c_ends_it_too(start, task_bundles):
    server = start(task_bundles["embed"])
    assert server.end(signal.SIGINT) == 0 and "Traceback" not in server.log


def test_a_model_that_cannot_be_loaded(start, tmp_path, task_bundles):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text('{"format": "gte-deploy-bundle"}')
    server = start(f"good={task_bundles['embed']}", broken, ready=False)
    assert server.wait() == 1
    assert "gte-deploy: error: " in server.log and "Traceback" not in server.log and "ready" not in server.log


def test_a_port_that_is_taken(start, task_bundles):
    from gte_deploy import cli

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", str(task_bundles["embed"]), "--port", str(taken.getsockname()[1])]) == 2


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_headers():
    """Nagle's algorithm and delayed acknowledgements add 40 ms to each answer otherwise."""
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_it_listens_while_its_models_load(start, tmp_path):
    script = tmp_path / "loading.py"
    text = SLOW.read_text(encoding="utf-8").replace('"slow": lambda: model', '"slow": lambda: time.sleep(1.5) or model')
    script.write_text(text, encoding="utf-8")
    server = start(command=[str(script), "0.01"], ready=False)
    wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    for path in ("/ready", "/ping", "/info", "/v1/models"):
        response = httpx.get(f"{server.url}{path}")
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
    response = httpx.post(f"{server.url}/embed", json={"inputs": "a"})
    assert response.status_code == 503 and "loads slow" in response.json()["error"]
    server.wait_until_ready()
    assert httpx.post(f"{server.url}/embed", json={"inputs": "a"}).status_code == 200


def test_the_end_does_not_wait_for_a_model_that_loads(start, tmp_path):
    script = tmp_path / "loading.py"
    text = SLOW.read_text(encoding="utf-8").replace('"slow": lambda: model', '"slow": lambda: time.sleep(300) or model')
    script.write_text(text, encoding="utf-8")
    server = start(command=[str(script), "0.01"], ready=False)
    wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert server.end(seconds=30) == 0


def test_sigterm_lets_requests_in_work_end_and_refuses_new_ones(start_slow):
    server = start_slow(0.5)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{server.url}/embed", json={"inputs": ["a", "b", "c"]}, timeout=30)
        wait_for(lambda: "text 0" in server.log)
        ended = pool.submit(server.end)
        wait_for(lambda: refused(server))
        assert answer.result().status_code == 200
        assert ended.result() == 0
    assert "text 2" in server.log and "closed" in server.log


def refused(server):
    try:
        return httpx.post(f"{server.url}/embed", json={"inputs": "a"}, timeout=30).status_code == 503
    except httpx.TransportError:
        return True


def test_the_end_takes_bounded_time(start_slow):
    server = start_slow(0.2, drain_seconds=1)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{server.url}/embed", json={"inputs": ["a"] * 1000}, timeout=60, headers={})
        wait_for(lambda: "text 0" in server.log)
        begun = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begun < 15
        try:
            assert answer.result().status_code >= 500
        except httpx.TransportError:
            pass
    wait_for(lambda: "given up" in server.log)


def test_the_work_of_a_client_that_went_away_is_dropped(start_slow):
    server = start_slow(0.1)
    with httpx.Client(timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{server.url}/embed", json={"inputs": ["a"] * 1000})
    wait_for(lambda: "given up" in server.log)
    wait_for(lambda: in_work(server) == 0)
    assert server.log.count("text ") < 100 and " 499 " in server.log


def test_deadlines(start_slow):
    server = start_slow(0.2, timeout=1.0)
    begun = time.monotonic()
    response = httpx.post(f"{server.url}/embed", json={"inputs": ["a"] * 100}, timeout=30)
    assert response.status_code == 504 and response.json()["error_type"] == "Timeout"
    shorter = httpx.post(
        f"{server.url}/v1/embeddings", json={"input": ["a"] * 100}, headers={"X-Request-Timeout": "0.3"}, timeout=30
    )
    assert shorter.status_code == 504 and shorter.json()["error"]["code"] == "timeout"
    assert time.monotonic() - begun < 10
    wait_for(lambda: in_work(server) == 0)


def test_a_body_that_does_not_come(start_slow):
    server = start_slow(0.01, timeout=1.0)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head.encode())
        connection.settimeout(20)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    wait_for(lambda: in_work(server) == 0)


def test_a_body_that_is_too_large_gets_its_answer(start_slow):
    server = start_slow(0.01, max_body_bytes=1_000_000)
    for size in (1_100_000, 3_000_000):
        assert httpx.post(f"{server.url}/embed", json={"inputs": "a" * size}, timeout=30).status_code == 413
    assert httpx.post(f"{server.url}/embed", json={"inputs": "a"}).status_code == 200


def test_more_requests_than_are_allowed_are_refused(start_slow):
    server = start_slow(0.05, max_concurrent_requests=4)
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            for _ in range(4):
                response = http.post(f"{server.url}/embed", json={"inputs": ["a", "b"]})
                with lock:
                    statuses[response.status_code] += 1
                if response.status_code == 429:
                    assert int(response.headers["retry-after"]) >= 1
                    assert response.json()["error_type"] == "Overloaded"

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(client) for _ in range(16)]:
            done.result()
    assert set(statuses) == {200, 429} and sum(statuses.values()) == 64
    wait_for(lambda: in_work(server) == 0)


def test_a_full_queue_refuses_and_answers_what_it_took(start, task_bundles):
    """Many clients, and room for few tokens: every request is answered rightly, or refused."""
    server = start(f"embed={task_bundles['embed']}", "--max-queue-tokens", 32, "--threads", 1)
    body = {"inputs": ["the old man of the city " * 15]}
    expected = httpx.post(f"{server.url}/embed", json=body).json()
    outcomes: Counter[int] = Counter()
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            for _ in range(6):
                response = http.post(f"{server.url}/embed", json=body)
                if response.status_code == 200:
                    assert response.json()[0] == pytest.approx(expected[0], abs=1e-5)
                else:
                    assert int(response.headers["retry-after"]) >= 1
                with lock:
                    outcomes[response.status_code] += 1

    with ThreadPoolExecutor(32) as pool:
        for done in [pool.submit(client) for _ in range(32)]:
            done.result()
    assert set(outcomes) <= {200, 429, 503} and outcomes[200] > 0 and sum(outcomes.values()) == 192
    assert httpx.post(f"{server.url}/embed", json=body).status_code == 200
    assert server.end() == 0


def test_the_token_of_a_file_and_of_the_environment(start, task_bundles, tmp_path):
    file = tmp_path / "token"
    file.write_text("secret\n")
    for server in (
        start(task_bundles["embed"], "--token-file", file),
        start(task_bundles["embed"], GTE_DEPLOY_TOKEN="secret"),
    ):
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert "secret" not in server.log

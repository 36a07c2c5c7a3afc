"""A server under more load than it takes: each request is answered rightly, or refused with a status that says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import gte_deploy
from battery import Attempts
from http_server import ServerProcess, serve_command
from raw_clients import ask
from runtime_models import make_texts

REFUSED = {429: "Overloaded", 503: "Unhealthy"}
TOLERANCE = 1e-5  # of the same text in a batch of another shape


@pytest.fixture
def serve(
    tmp_path: Path, bundle_of: Callable[..., Path], word_checkpoints: dict[str, Path]
) -> Iterator[Callable[..., ServerProcess]]:
    """`serve(*options)`: a server of the embedding model, ready."""
    servers: list[ServerProcess] = []

    def start(*options: object) -> ServerProcess:
        bundle = bundle_of(word_checkpoints["embed"])
        servers.append(ServerProcess(serve_command(bundle, "--access-log", "off", *options), cwd=tmp_path))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def asked(bundle_of: Callable[..., Path], word_checkpoints: dict[str, Path]) -> tuple[list[bytes], list[np.ndarray]]:
    """Bodies of requests of one to four texts, and the embeddings of each as this process computes them."""
    texts = [make_texts(1 + number % 4, seed=number) for number in range(200)]
    with gte_deploy.load(bundle_of(word_checkpoints["embed"]), num_threads=1) as model:
        return [json.dumps({"inputs": each}).encode() for each in texts], [
            model.encode(each, normalize_embeddings=True) for each in texts
        ]


def answered_by(server: ServerProcess) -> dict[int, int]:
    """Status -> requests to /embed, as the server counts them."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith('gte_deploy_requests_total{route="/embed"'):
            status, _, count = line.partition('status="')[2].partition('"} ')
            found[int(status)] = round(float(count))
    return found


@pytest.mark.parametrize(
    ("clients", "requests"), [(100, 3), pytest.param(1000, 10, marks=pytest.mark.slow)], ids=["100", "1000"]
)
@pytest.mark.parametrize("options", [(), ("--max-queue-tokens", 2000), ("--max-concurrent-requests", 32)], ids=repr)
def test_every_request_of_many_clients_is_answered(
    serve: Callable[..., ServerProcess],
    asked: tuple[list[bytes], list[np.ndarray]],
    clients: int,
    requests: int,
    options: tuple[object, ...],
    attempts: Attempts,
) -> None:
    """What the server lets in gets the right answer; what it refuses gets a status, a reason and when to come back."""
    bodies, expected = asked
    count = clients * requests
    server = serve("--timeout", 300, *options)

    def check(index: int, status: int, headers: dict[str, str], answer: Any) -> None:
        if status == 200:
            np.testing.assert_allclose(answer, expected[index % len(expected)], atol=TOLERANCE)
        else:
            assert answer["error_type"] == REFUSED[status] and int(headers["retry-after"]) >= 1

    outcomes = asyncio.run(ask(server.url, "/embed", [bodies[n % len(bodies)] for n in range(count)], clients, check))
    assert outcomes.unanswered == []
    assert outcomes.statuses.total() == count and outcomes.statuses[200] > 0
    assert answered_by(server) == dict(outcomes.statuses)
    if not options:  # 512 requests in work at once, and room for all of their texts
        assert outcomes.statuses[200] >= count / 4
    assert server.end() == 0 and "Traceback" not in server.log
    attempts(f"requests of {clients:,} clients at once: answered", outcomes.statuses.pop(200))
    for status, refused in sorted(outcomes.statuses.items()):
        attempts(f"requests of {clients:,} clients at once: refused with status {status} and Retry-After", refused)


@pytest.mark.parametrize("clients", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_server_that_is_told_to_end_under_load_answers_what_it_took(
    serve: Callable[..., ServerProcess],
    asked: tuple[list[bytes], list[np.ndarray]],
    clients: int,
    attempts: Attempts,
) -> None:
    """After SIGTERM, requests in work get their answers, new ones a 503 or no connection; and no answer is cut."""
    bodies, expected = asked
    server = serve("--timeout", 300, "--max-concurrent-requests", 2000)

    def check(index: int, status: int, headers: dict[str, str], answer: Any) -> None:
        if status == 200:
            np.testing.assert_allclose(answer, expected[index % len(expected)], atol=TOLERANCE)
        else:
            assert status == 503 and answer["error_type"] == REFUSED[status]

    async def until_it_ends() -> Any:
        # More than it answers before the signal: the clients are in the middle of them.
        work = asyncio.create_task(
            ask(server.url, "/embed", [bodies[n % len(bodies)] for n in range(clients * 200)], clients, check)
        )
        await asyncio.sleep(0.5)
        ended = asyncio.create_task(asyncio.to_thread(server.end))
        outcomes = await work
        assert await ended == 0
        return outcomes

    outcomes = asyncio.run(until_it_ends())
    assert outcomes.statuses[200] > 0 and outcomes.unanswered, "the signal came too late or too early"
    attempts(f"requests of {clients:,} clients to a server that ends: answered", outcomes.statuses.total())

"""Bundles for every task, a client of an application in this process, and servers in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import gte_deploy
from gte_deploy.serving.app import create_app
from gte_deploy.serving.options import ServerOptions
from http_server import KeptOpen, ServerProcess, serve_command


@pytest.fixture(scope="session")
def served(task_bundles: dict[str, Path]) -> Iterator[dict[str, gte_deploy.Model]]:
    """The loaded bundles; their calls join."""
    models = {name: gte_deploy.load(bundle, join_calls=True) for name, bundle in task_bundles.items()}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture(scope="session")
def client_of(served: dict[str, Any]) -> Callable[..., TestClient]:
    """`client_of(models=None, token=None, **options)`: a client to use in a with block."""

    def client(models: Any = None, *, token: str | None = None, **options: Any) -> TestClient:
        models = served if models is None else models
        kept = {name: KeptOpen(model) for name, model in models.items()}
        options = {"access_log": "off", **options}
        return _Ready(create_app(kept, ServerOptions(**options), token=token), raise_server_exceptions=False)

    return client


class _Ready(TestClient):
    def __enter__(self) -> TestClient:
        entered = super().__enter__()
        until = time.monotonic() + 30
        while self.get("/ready").status_code == 503 and time.monotonic() < until:
            time.sleep(0.005)
        return entered


@pytest.fixture(scope="session")
def client(client_of: Callable[..., TestClient]) -> Iterator[TestClient]:
    """A client of an application with every model."""
    with client_of() as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """`start(*arguments, **variables)`: `gte-deploy serve` in a process, ready; ended after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: object, command: list[str] | None = None, ready: bool = True, **variables: str):
        server = ServerProcess(command or serve_command(*arguments), cwd=tmp_path, **variables)
        started.append(server)
        if ready:
            server.wait_until_ready()
        return server

    yield start
    for server in started:
        server.kill()

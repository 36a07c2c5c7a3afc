"""A real Triton for the tests: set up once, started on the repositories that the exporter writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triton_server


@pytest.fixture(scope="session")
def triton() -> Path:
    """The folder in which the server is set up; `Server(repository, folder=triton)` starts it."""
    try:
        return triton_server.install()
    except triton_server.Unavailable as error:
        pytest.skip(f"no Triton here: {error}")


@pytest.fixture(scope="session")
def repository_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`repository_of(bundle, **options)`: what the exporter makes of it. Read only; made anew at each call."""
    from gte_deploy.exporters.triton.repository import export_repository

    def repository(bundle: Path, **options: Any) -> Path:
        target = tmp_path_factory.mktemp("triton") / "repository"
        return Path(export_repository(bundle, target, threads=1, **options).path)

    return repository


@pytest.fixture(scope="session")
def connect() -> Callable[..., Any]:
    """`connect(server, "http" or "grpc", **options)`: a client, for a `with` that ends before the server's."""
    from gte_deploy.triton import Client

    def client(server: Any, protocol: str, **options: Any) -> Client:
        return Client(f"{protocol}://{getattr(server, protocol)}", **options)

    return client

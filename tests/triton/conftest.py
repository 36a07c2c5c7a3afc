"""A real Triton for the tests: set up once, started on the repositories that the exporter writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gte_deploy_triton_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def triton() -> ModuleType:
    """The module tests/triton/server.py, with the server set up; `triton.Server(repository)` starts it."""
    module = _load("server")
    try:
        module.install()
    except module.Unavailable as error:
        pytest.skip(f"no Triton here: {error}")
    return module


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

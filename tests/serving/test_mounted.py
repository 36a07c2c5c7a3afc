"""The application in another application, under a prefix: routes, open paths, forms of errors, the page."""

from __future__ import annotations

import contextlib
import re
from urllib.parse import urljoin

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

import gte_deploy
from gte_deploy.serving.app import create_app
from gte_deploy.serving.options import ServerOptions
from http_server import KeptOpen

JSON = {"authorization": "Bearer secret"}
PREFIX = "/tools/gte"


@pytest.fixture(scope="module")
def model(task_checkpoints, bundle_of):
    with gte_deploy.load(bundle_of(task_checkpoints["embed"]), join_calls=True) as model:
        yield model


@pytest.fixture(scope="module")
def mounted(model):
    """A client of an application with a server under a prefix; the outer application has a lifespan of its own."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield

    inner = create_app({"embed": KeptOpen(model)}, ServerOptions(access_log="off"), token="secret")
    with TestClient(Starlette(routes=[Mount(PREFIX, inner)], lifespan=lifespan)) as client:
        yield client


def test_it_is_ready_and_answers(mounted, task_checkpoints):
    """The outer application never starts the lifespan of the inner one."""
    assert mounted.get(f"{PREFIX}/ready").json() == {"status": "ready"}
    body = {"inputs": "the old city"}
    answer = mounted.post(f"{PREFIX}/embed", json=body, headers=JSON)
    expected = SentenceTransformer(str(task_checkpoints["embed"]), device="cpu").encode(
        ["the old city"], normalize_embeddings=True
    )
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json(), expected, rtol=1e-4, atol=1e-5)
    assert mounted.post(f"{PREFIX}/", json=body, headers=JSON).json() == answer.json()
    assert "gte_deploy_queue_rows" in mounted.get(f"{PREFIX}/metrics").text


def test_the_same_paths_stay_open(mounted):
    page = mounted.get(f"{PREFIX}/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    files = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
    assert len(files) >= 3
    for path in (*(urljoin(f"{PREFIX}/", file) for file in files), f"{PREFIX}/health", f"{PREFIX}/ping"):
        assert mounted.get(path).status_code == 200
    for path in ("/info", "/v1/models", "/openapi.json", "/nothing"):
        assert mounted.get(f"{PREFIX}{path}").status_code == 401
        assert mounted.get(f"{PREFIX}{path}", headers=JSON).status_code == (404 if path == "/nothing" else 200)
    # A path that only ends like an open one is no open one.
    assert mounted.get(f"{PREFIX}{PREFIX}/health").status_code == 401


@pytest.mark.parametrize(("headers", "status"), [({}, 401), (JSON, 422)])
def test_errors_have_the_form_of_their_route(mounted, headers, status):
    answer = mounted.post(f"{PREFIX}/v1/embeddings", json={}, headers=headers)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = mounted.post(f"{PREFIX}/embed", json={}, headers=headers)
    assert answer.status_code == status and answer.json()["error_type"] == "Validation"


def test_a_prefix_that_a_proxy_leaves_in_the_path(model):
    """`root_path` names a prefix that the path need not have."""
    app = create_app({"embed": KeptOpen(model)}, ServerOptions(access_log="off"), token="secret")
    with TestClient(app, root_path=PREFIX) as client:
        for path in ("/health", f"{PREFIX}/health"):
            assert client.get(path).status_code == 200
        for path in ("/info", f"{PREFIX}/info"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=JSON).status_code == 200

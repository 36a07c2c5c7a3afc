"""The page in headless Chromium, before servers in threads of this process."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the page at / is tested in a browser: playwright is not installed")

import uvicorn
from playwright.sync_api import Browser, ConsoleMessage
from starlette.applications import Starlette
from starlette.routing import Mount

import gte_deploy
from gte_deploy.models import builtin_path
from gte_deploy.serving.app import create_app
from gte_deploy.serving.options import ServerOptions
from headless import TIMEOUT_MS
from http_server import KeptOpen
from page_view import View

_STATUS = re.compile(r"Failed to load resource: (the server responded with a status of|net::ERR_FAILED)")


@pytest.fixture(scope="session")
def builtin(bundle_of: Callable[..., Path]) -> Iterator[gte_deploy.Model]:
    """The bundle of the built-in model."""
    with gte_deploy.load(bundle_of(builtin_path(), max_length=64)) as model:
        yield model


@pytest.fixture(scope="session")
def site() -> Iterator[Callable[..., str]]:
    """`site(models, token=None, prefix="")`: the address of a server of loaded models, by their names.

    With a prefix, the server is mounted there in another application.
    """
    running = []

    def start(models: dict[str, Any], *, token: str | None = None, prefix: str = "") -> str:
        app = create_app(
            {name: KeptOpen(model) for name, model in models.items()}, ServerOptions(access_log="off"), token=token
        )
        app = Starlette(routes=[Mount(prefix, app)]) if prefix else app
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def view(chromium: Browser) -> Iterator[Callable[..., View]]:
    """`view(address, **context)`: a new window on the page; options are those of Playwright's `new_context`.

    After the test: no request went to another host, no script failed, and the policy forbade nothing.
    """
    views = []

    def make(address: str, **context: Any) -> View:
        page = chromium.new_context(**context).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        made = View(page, address)
        page.on("request", lambda request: made.requests.append(request))  # playwright takes no built-in method
        page.on("pageerror", lambda error: made.faults.append(str(error)))

        def on_console(message: ConsoleMessage) -> None:
            if message.type == "error" and not _STATUS.match(message.text):
                made.faults.append(message.text)

        page.on("console", on_console)
        page.on("dialog", lambda dialog: made.faults.append(f"dialog: {dialog.message}"))
        views.append(made)
        return made

    yield make
    for made in views:
        made.page.context.close()
        elsewhere = [request.url for request in made.requests if not request.url.startswith(made.address)]
        assert elsewhere == []
        assert made.faults == []

"""Runs the scripts of this folder in Node.js and in headless Chromium."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from environments import Unavailable
from javascript import SOURCES, browser, installed

_TIMEOUT_S = 300
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    "": "application/octet-stream",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = _TYPES

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="session")
def scripts() -> Iterator[Path]:
    """A copy of the scripts beside node_modules, where Node.js looks for packages."""
    try:
        environment = installed()
    except Unavailable as error:
        pytest.skip(f"bundles in JavaScript: {error}")
    with tempfile.TemporaryDirectory(prefix="scripts-", dir=environment) as folder:
        for script in (*SOURCES.glob("*.mjs"), SOURCES / "index.html"):
            shutil.copy(script, folder)
        yield Path(folder)


@pytest.fixture(scope="session")
def address(scripts: Path, bundle_for: Callable[[str], Path]) -> Callable[[str | Path], str]:
    """`address(subject or bundle)`: the bundle as the scripts call it, by a path or URL relative to themselves."""

    def linked(subject: str | Path) -> str:
        bundle = subject if isinstance(subject, Path) else bundle_for(subject)
        link = scripts / bundle.name
        if not link.is_symlink():
            link.symlink_to(bundle)
        return f"./{bundle.name}"

    return linked


@pytest.fixture(scope="session")
def in_node(scripts: Path) -> Callable[..., Any]:
    """`in_node(script, *arguments)`: what the script's function returns in Node.js."""
    return lambda script, *arguments: _node(scripts, ["node.mjs", f"./{script}"], arguments)


@pytest.fixture(scope="session")
def in_chromium(scripts: Path) -> Iterator[Callable[..., Any]]:
    """`in_chromium(script, *arguments)`: what the script's function returns in a page, which asks no other host."""
    try:
        chromium = browser()
    except Unavailable as error:
        pytest.skip(f"bundles in a browser: {error}")
    handler = functools.partial(_Handler, directory=str(scripts.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}/"
        page = f"{host}{scripts.name}/index.html"

        def run(script: str, *arguments: Any) -> Any:
            answer = _node(scripts, ["chromium.mjs", chromium, page, f"./{script}"], arguments)
            assert [url for url in answer["requests"] if not url.startswith((host, f"blob:{host}", "data:"))] == []
            return answer["result"]

        yield run
        server.shutdown()


@pytest.fixture(params=["node", "chromium"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs the same script in Node.js and in Chromium."""
    return request.getfixturevalue(f"in_{request.param}")


def _node(folder: Path, command: list[str], arguments: tuple[Any, ...]) -> Any:
    ended = subprocess.run(
        ["node", *command],
        cwd=folder,
        input=json.dumps(arguments),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=_TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout)

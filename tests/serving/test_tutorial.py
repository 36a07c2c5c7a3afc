"""The client of docs/tutorials/application.md that is no Python: Node.js runs its block against a server."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pages

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "application.md"


def test_the_client_of_the_page_gets_embeddings(start, tmp_path):
    if (node := shutil.which("node")) is None:
        pytest.skip("Node.js is not installed")
    (code,) = (block.text for block in pages.blocks(PAGE.read_text(encoding="utf-8")) if block.kind == "js")
    server = start("embed=gte-en-mlm-tiny")
    code, replaced = re.subn(r"http://127\.0\.0\.1:\d+", server.url, code)
    assert replaced == 1
    (tmp_path / "client.mjs").write_text(code, encoding="utf-8")
    done = subprocess.run([node, "client.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "256"]

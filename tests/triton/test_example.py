"""examples/triton_client.py against a real server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gte_deploy.models import builtin_path
from triton_server import Server

pytestmark = pytest.mark.xdist_group("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_asks_a_server(
    triton: Path, repository_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    repository = repository_of(bundle_of(builtin_path(), max_length=128))
    with Server(repository, folder=triton) as server:
        command = [sys.executable, ROOT / "examples" / "triton_client.py", f"http://{server.http}"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    first, cosine, best, *_ = run.stdout.splitlines()
    assert first == "fill-mask: 2 embeddings of 256 numbers"
    assert 0 < float(cosine.split()[-1]) <= 1
    assert best.endswith("the president of the united states of america.")

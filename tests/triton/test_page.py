"""Every Python block of the pages that show the client runs as it stands against a real server, but for the ports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gte_deploy.models import builtin_path
from pages import ROOT, blocks
from triton_server import Server

pytestmark = pytest.mark.xdist_group("triton")

PAGE = ROOT / "docs" / "triton-client.md"
TUTORIAL = ROOT / "docs" / "tutorials" / "operations.md"


def test_the_blocks_run(
    triton: Path,
    repository_of: Callable[..., Path],
    bundle_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = bundle_of(builtin_path(), max_length=128)
    (tmp_path / "my-bundle").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    code = [
        (page.name, block)
        for page in (TUTORIAL, PAGE)
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.kind == "python"
    ]
    with Server(repository_of(bundle), folder=triton) as server:
        space: dict[str, object] = {"__name__": "block"}
        answers = []
        for name, block in code:
            text = block.text.replace("localhost:8000", server.http).replace("localhost:8001", server.grpc)
            assert text != block.text, "the block asks another server"
            # What a block computes and does not print is its last line.
            lines = text.rstrip().splitlines()
            lines[-1] = lines[-1].replace("model.", "answer = model.", 1)
            exec(compile("\n" * block.line + "\n".join(lines), name, "exec"), space)
            answers.append(space["answer"])
    embeddings, masks, *_, last = answers
    assert embeddings.shape == last.shape == (2, 256)  # type: ignore[attr-defined]
    assert masks[0]["token_str"] == "states"  # type: ignore[index]

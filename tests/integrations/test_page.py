"""Every block of docs/integrations.md runs as it stands, with the real package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
PACKAGES = {
    "sentence-transformers": "sentence_transformers",
    "LangChain": "langchain_core",
    "LlamaIndex": "llama_index.core",
    "Haystack": "haystack",
    "MTEB": "mteb",
    "Chroma": "chromadb",
    "Qdrant": "qdrant_client",
    "FAISS": "faiss",
    "usearch": "usearch",
    "LanceDB": "lancedb",
}
BLOCKS = re.findall(r"^## (.+?)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_every_framework_has_a_block():
    assert [title for title, _ in BLOCKS] == list(PACKAGES)


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_block_runs(title, block, embedder, reranker, sparse_encoder, tmp_path, monkeypatch, capsys):
    pytest.importorskip(PACKAGES[title], reason=f"needs {PACKAGES[title]}: make test-consumers")
    for name, both in (("my-bundle", embedder), ("my-reranker", reranker), ("my-sparse", sparse_encoder)):
        (tmp_path / name).symlink_to(both.path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, title, "exec"), {"__name__": "block"})
    shown = capsys.readouterr().out
    wanted = {"MTEB": "MockRetrievalTask", "sentence-transformers": "cosine_accuracy"}
    assert wanted.get(title, "Paris is the capital of France.") in shown

"""Bulk runs with the real packages: Ray on two nodes, Lance, polars, and the recipes of docs/bulk.md for indexes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bulk.md"
CAPITAL = "paris is the capital of france"


@pytest.mark.consumers
@pytest.mark.parametrize("environment", ["bulk"])
def test_files_on_a_cluster_and_in_indexes(
    bundle_for: Callable[[str], Path], run_script: Callable[..., Path], tmp_path: Path
) -> None:
    words = "river house water light king queen world time year day man woman old new".split()
    texts = [" ".join(words[i % 5 : i % 13 + 1]) + f" {i}" for i in range(300)]
    texts[123] = CAPITAL
    rows = [{"id": i, "text": text if i % 50 else None} for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = run_script("bulk_files.py", bundle_for("embed"), PAGE, tmp_path / "texts.jsonl", bundle_for("sparse"))
    found = json.loads((folder / "found.json").read_text())
    assert found["lance"] and found["metadata"]
    assert found["polars"] == ["Array(Float32, shape=(256,))", True]
    assert found["sparse"] == [True, "List(Struct({'index': Int32, 'token': String, 'weight': Float32}))"]
    assert found["nodes"] == 2 and found["ray"] and found["failures"] and found["share"] == 1.0
    local, there = found["summaries"]
    assert local == there and local[:2] == [294, 6]
    assert found["command"] == [0, 294]
    assert found["resumed"] == [True, True]
    assert found["killed"][:2] == [True, True] and found["killed"][2] < 2e-6, "float32 sums in other batches"
    assert found["argument"][0] == "InputError" and "truncate_dim" in found["argument"][1]
    assert found["prompt"][0] == "InputError" and "nothing" in found["prompt"][1]
    faiss, usearch, lance = found["recipes"]
    assert faiss.endswith(CAPITAL) and CAPITAL in lance
    assert usearch == "120", "the third of the rows before it failed"

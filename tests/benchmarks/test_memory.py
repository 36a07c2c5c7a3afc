"""The memory benchmark runs, writes its curve, and tells growth from none."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def memory() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))  # workers are spawned with it, too
    try:
        yield importlib.import_module("memory")
    finally:
        sys.path.remove(str(FOLDER))


def test_a_run_writes_its_curve(
    memory: ModuleType, word_checkpoints: dict[str, Path], bundle_of: Callable[..., Path], tmp_path: Path, capsys: Any
):
    bundle, output = bundle_of(word_checkpoints["embed"]), tmp_path / "results" / "memory.csv"
    options = "--calls 45 --longest 100 --threads 1 --engines onnx".split()
    assert memory.main([*options, "--bundle", str(bundle), "--output", str(output)]) == 0
    rows = list(csv.DictReader(output.open()))
    assert [int(row["calls"]) for row in rows] == list(range(1, 46))
    assert all(20 < float(row["onnx MB"]) < 500 for row in rows)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "45 calls" in capsys.readouterr().out


def test_an_engine_that_cannot_run_is_told(memory: ModuleType, word_checkpoints: dict[str, Path], tmp_path: Path):
    with pytest.raises(SystemExit, match="no engine ran"):
        memory.main(["--bundle", str(word_checkpoints["embed"]), "--engines", "onnx", "--calls", "2"])


def test_growth_is_told(memory: ModuleType):
    text = memory.summary({"flat": [9.0] + [100.0] * 19, "growing": [float(i) for i in range(100, 300, 10)]})
    assert "| flat | 100 | 100 | 100 | +0.0% |" in text and "| growing | 125 | 285 | 290 | +128.0% |" in text

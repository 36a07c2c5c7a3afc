"""The benchmark of late chunking runs, and its rows are what was asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_run_prints_a_row_for_each_length(monkeypatch: pytest.MonkeyPatch, word_checkpoints: Any, capsys: Any):
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark = importlib.import_module("late_chunking")
    options = ["--model", str(word_checkpoints["embed"]), "--tokens", "34", "128", "--chunk", "16", "--runs", "1"]
    assert benchmark.main(options) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [["34", "2"], ["128", "8"]]
    assert all(float(cell) >= 0 for row in rows for cell in row[2:4])

"""The benchmark of the time outside the engine runs, and its stages add up."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def overhead() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("overhead")
    finally:
        sys.path.remove(str(FOLDER))


def test_a_run_writes_its_results(
    overhead: ModuleType, word_checkpoints: dict[str, Path], bundle_of: Callable[..., Path], tmp_path: Path, capsys: Any
):
    bundles = [str(bundle_of(word_checkpoints[task])) for task in ("fill-mask", "classify")]
    output = tmp_path / "results" / "overhead.json"
    options = ["--bundle", *bundles, "--texts", "600", "--seconds", "0.1", "--json", "--output", str(output)]
    assert overhead.main(options) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == report
    rows = {row["workload"]: row for row in report["rows"]}
    assert list(rows) == [
        "encode, one text",
        "encode, 600 texts",
        "fill_mask, one text",
        "fill_mask, 600 texts",
        "predict, one pair",
        "predict, 600 pairs",
    ]
    for name, row in rows.items():
        assert row["calls"] >= 3 and row["engine"] > 0
        assert all(row[stage] > 0 for stage in ("check", "tokenize", "batch", "answer", "other"))
        assert (row["tokenize ahead"] > 0) == ("600" in name)  # a list of more than one window
    table = output.with_suffix(".md").read_text(encoding="utf-8")
    assert all(name in table for name in rows)


def test_a_stage_inside_another_interrupts_it(overhead: ModuleType):
    clock = overhead.Clock()
    inner = clock.timed("inner", lambda: time.sleep(0.05))
    outer = clock.timed("outer", lambda: (inner(), inner()))
    begin = time.perf_counter()
    outer()
    whole = time.perf_counter() - begin
    assert clock.times["inner"] >= 0.1
    assert clock.times["outer"] == pytest.approx(whole - clock.times["inner"], abs=0.02)


def test_functions_are_as_before_a_measurement(overhead: ModuleType):
    from gte_deploy.tasks import interface

    before = interface.as_texts
    with overhead.stages(overhead.Clock()):
        assert interface.as_texts is not before
    assert interface.as_texts is before

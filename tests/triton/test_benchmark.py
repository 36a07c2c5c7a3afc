"""The serving benchmark runs on a real Triton and writes what it promises."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gte_deploy.core.errors import UnavailableError

pytestmark = pytest.mark.xdist_group("triton")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def serving() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("serving")
    finally:
        sys.path.remove(str(FOLDER))


def test_a_run_writes_its_numbers_and_its_chart(
    triton: Path,
    serving: ModuleType,
    word_checkpoints: dict[str, Path],
    bundle_of: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
):
    bundle, output = bundle_of(word_checkpoints["embed"]), tmp_path / "results" / "serving.json"
    options = "--callers 1 3 --seconds 0.3 --lengths 4 40 --threads 1".split()
    assert serving.main([*options, "--bundle", str(bundle), "--work", str(tmp_path), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    loads, ways = report["loads"], ("in process", "joined calls", "gte-deploy serve", "Triton gRPC", "Triton HTTP")
    assert {(load["way"], load["callers"]) for load in loads} == {(way, number) for way in ways for number in (1, 3)}
    # These need a checkpoint.
    assert report["left_out"].keys() == {"ST behind FastAPI", "infinity"}
    for load in loads:
        assert load["answers"] > 0
        assert 0 < load["latency_ms"]["p50"] <= load["latency_ms"]["p90"] <= load["latency_ms"]["p99"]
    shares = {(each["way"], each["share"]) for each in report["arrivals"]}
    assert shares == {*((way, 0.8) for way in ways), ("gte-deploy serve", 2.0)}
    for each in report["arrivals"]:
        assert each["arrived"] == each["answered"] + each["refused"] and each["lost"] == 0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "stand-in" in capsys.readouterr().out


def test_the_tokenizer_alone(
    triton: Path,
    serving: ModuleType,
    word_checkpoints: dict[str, Path],
    bundle_of: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
):
    alone = importlib.import_module("serving_tokenizer")
    bundle, output = bundle_of(word_checkpoints["embed"]), tmp_path / "results" / "tokenizer.json"
    options = "--rows 1 4 --concurrency 2 --seconds 0.3 --lengths 4 40".split()
    assert alone.main([*options, "--bundle", str(bundle), "--work", str(tmp_path), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [(load["rows"], load["concurrency"]) for load in report["loads"]] == [(1, 2), (4, 2)]
    for load in report["loads"]:
        assert load["texts_per_second"] > 0 and load["median_ms"] > 0 and load["requests_per_execution"] >= 1
        assert min(load["server_us"], load["client_us"]) > 0 and load["tokenizer_us"] > 0
    assert report["library_us"] > 0
    assert "us CPU a text: tokenizer" in capsys.readouterr().out


def test_calls_become_a_rate_and_percentiles(serving: ModuleType):
    calls = [serving.Call(0.1, True, True), serving.Call(0.3, True, False), serving.Call(9.0, False, True)]
    load = serving._load("Triton HTTP", 2, calls, 4.0)
    assert (load.answers, load.refused, load.texts_per_second) == (2, 1, 0.25)
    assert load.latency_ms["p50"] == pytest.approx(200)
    assert "| Triton HTTP | 2 | 0.2 | 200.0 |" in serving.summary([load])
    with pytest.raises(SystemExit, match="answered none of 1 calls"):
        serving._load("Triton HTTP", 2, calls[2:], 4.0)


def test_a_caller_that_is_refused_asks_on(serving: ModuleType):
    asked: list[str] = []

    def ask(text: str) -> None:
        asked.append(text)
        if len(asked) % 2:
            raise UnavailableError("full")

    calls = serving._turn(ask, ["a", "b"], 1, 0.05)
    assert len(calls) == len(asked) >= 2
    assert [call.answered for call in calls[:2]] == [False, True]


def test_what_arrives_is_answered_refused_or_lost(serving: ModuleType):
    asked: list[str] = []

    def ask(text: str) -> None:
        asked.append(text)
        if text == "full":
            raise UnavailableError("full")
        if text == "broken":
            raise ConnectionResetError

    found = serving.arrive("a way", ask, ["good", "full", "broken", "good"], 2.0, 100.0, 0.2)
    assert found.per_second == 200 and found.arrived == len(asked) == 40
    assert (found.answered, found.refused, found.lost) == (20, 10, 10)
    assert found.latency_ms["p50"] >= 0 and found.refusal_ms["p99"] >= 0
    assert "| a way | 200% | 200.0 |" in serving.summary_of_arrivals([found])

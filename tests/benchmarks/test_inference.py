"""The inference benchmark runs end to end, goes on where it stopped, and computes its bars from the numbers."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gte_deploy.models import builtin_path
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.tuning.measure import WorkerError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def inference() -> ModuleType:
    # Workers are spawned with this process's sys.path, and find the package there too.
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("inference")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def parts(inference: ModuleType) -> ModuleType:
    class Parts:
        workloads = importlib.import_module("side_by_side.workloads")
        report = importlib.import_module("side_by_side.report")
        accuracy = importlib.import_module("side_by_side.accuracy")
        artefacts = importlib.import_module("side_by_side.artefacts")
        contestants = importlib.import_module("side_by_side.contestants")
        chart = importlib.import_module("side_by_side.chart")

    return Parts


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(builtin_path())


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inference")
    options = "--subjects tiny --threads 1 --max-length 64 --corpus-texts 3 --accuracy-texts 2 --repeats 2"
    contestants = ["torch eager", "gte-deploy onnx fp32", "light-embed"]
    paths = ["--work", str(folder / "work"), "--output", str(folder / "result.json")]
    return [*options.split(), *paths, "--contestants", *contestants]


@pytest.fixture(scope="module")
def report(inference: ModuleType, arguments: list[str]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "SIZE", 64)
        assert inference.main([*arguments, "--shapes", "2x8", "short-corpus", "--json"]) == 0
    return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text())


def rows_of(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["workload"], row["contestant"]): row for row in report["measurements"]}


def test_contestants_are_timed_on_what_they_take(report: dict[str, Any]):
    rows = rows_of(report)
    assert len([name for workload, name in rows if workload == "2x8"]) == 3
    assert {name for workload, name in rows if workload == "short-corpus"} == {"gte-deploy onnx fp32", "light-embed"}
    assert os.cpu_count() == 1 or rows["2x8", "light-embed"]["error"]  # it cannot be held to one thread
    ours = rows["2x8", "gte-deploy onnx fp32"]
    assert len(ours["seconds"]) == len(ours["reference_seconds"]) == 2 and min(ours["seconds"]) > 0
    assert ours["reference_seconds"] == rows["2x8", "torch eager fp32"]["seconds"]
    assert (ours["tokens"], ours["padded_tokens"], ours["ours"], ours["error"]) == (16, 16, True, None)
    assert 2e7 < ours["peak_bytes"] < rows["2x8", "torch eager fp32"]["peak_bytes"]


def test_flops_are_those_of_real_tokens(report: dict[str, Any]):
    # gte-en-mlm-tiny: 4 layers of 256, 768 wide
    dense, attention = 16 * (4 * 256 * 256 + 3 * 256 * 768), 2 * 256 * 2 * 64
    assert rows_of(report)["2x8", "gte-deploy onnx fp32"]["flops"] == 2 * 4 * (dense + attention)
    assert set(report["gemm_peak"]) == {"method", "fp32", "16-bit", "int8"}


def test_answers_are_compared_with_torch(report: dict[str, Any]):
    accuracy = {row["contestant"]: row for row in report["accuracy"]}
    ours = accuracy["gte-deploy onnx fp32"]
    assert ours["token_embeddings"]["min"] > 0.99999 and 0 < ours["embed"]["max_abs"] < 1e-4


def test_a_number_comes_with_date_hardware_versions_and_command(report: dict[str, Any]):
    assert report["date"].startswith("20") and report["hardware"]["cpu"] and report["hardware"]["threads"] == 1
    assert report["versions"]["onnxruntime"][0].isdigit() and len(report["commands"]) == 1


def test_tables_name_every_contestant_and_reason(report: dict[str, Any], arguments: list[str], parts: Any):
    text = Path(arguments[arguments.index("--output") + 1]).with_suffix(".md").read_text()
    assert text == parts.report.markdown(report)
    assert "| 2x8, gte-deploy onnx fp32 |" in text and "## Bars" in text and "not measured" in text
    for row in report["measurements"]:
        assert row["contestant"] in text and (row["error"] is None or row["error"] in text)


def test_it_goes_on_where_it_stopped(
    inference: ModuleType, arguments: list[str], report: dict[str, Any], tmp_path: Path, capsys: Any
):
    file = tmp_path / "result.json"
    kept = [row for row in report["measurements"] if row["contestant"] == "torch eager fp32"]
    file.write_text(json.dumps({**report, "measurements": kept}))
    options = [*arguments[:-1], "--resume", str(file), "--output", str(file)]
    assert inference.main([*options, "--shapes", "2x8", "short-corpus"]) == 0
    captured = capsys.readouterr()
    resumed = json.loads(file.read_text())
    before, after = rows_of(report), rows_of(resumed)
    ours = after["2x8", "gte-deploy onnx fp32"]
    assert ours["seconds"] != before["2x8", "gte-deploy onnx fp32"]["seconds"] and len(ours["seconds"]) == 2
    assert ours["reference_seconds"] == after["2x8", "torch eager fp32"]["seconds"]
    assert len(resumed["commands"]) == 2 and "| 2x8, gte-deploy onnx fp32 |" in captured.out
    assert inference.main([*options, "--shapes", "2x8", "short-corpus"]) == 0
    assert rows_of(json.loads(file.read_text())) == after and "inference: tiny 2x8" not in capsys.readouterr().err

    file.write_text(json.dumps({**report, "versions": {}}))
    with pytest.raises(SystemExit, match="cannot be resumed: its versions"):
        inference.main(options)


def test_what_time_does_not_allow_is_named(
    inference: ModuleType, arguments: list[str], report: dict[str, Any], tmp_path: Path, capsys: Any
):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({**report, "measurements": []}))
    options = ["--shapes", "1x8", "--minutes", "0", "--resume", str(file), "--output", str(file)]
    assert inference.main([*arguments[:-1], *options]) == 0
    rows = json.loads(file.read_text())["measurements"]
    assert len(rows) == 2 and all(row["error"].startswith("left out") for row in rows)
    assert "left out: the 0 minutes were over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--shapes", "8"], "neither ROWSxTOKENS"), (["--contestants", "nobody"], "no name has such a part")],
)
def test_wrong_options(inference: ModuleType, options: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit):
        inference.main(options)
    assert message in capsys.readouterr().err


# --- workloads ------------------------------------------------------------------------------------------------------


def test_workloads_have_the_lengths_they_are_named_for(parts: Any, tokenizer: Any):
    mixed = parts.workloads.make_workload("mixed")
    assert len(mixed.lengths) == 32 and (min(mixed.lengths), max(mixed.lengths)) == (16, 512)
    assert 0.55 < mixed.tokens / mixed.padded_tokens < 0.57
    assert list(mixed.lengths) != sorted(mixed.lengths)
    short, corpus = (parts.workloads.make_workload(name) for name in ("short-corpus", "corpus"))
    assert len(short.lengths) == 256 and max(short.lengths) <= 32 and short.is_corpus
    assert len(corpus.lengths) == 2000 and max(corpus.lengths) <= 512 and 25 < np.median(corpus.lengths) < 40
    long, rows = parts.workloads.make_workload("1x8192"), parts.workloads.make_workload("8x128")
    assert long.is_alone and not rows.is_alone and not mixed.is_alone

    job = parts.workloads.make_workload("3x9").job(tokenizer)
    assert job.input_ids.shape == (3, 9) and job.attention_mask.all()
    job = mixed.job(tokenizer, texts=5)
    assert job.attention_mask.sum(axis=1).tolist() == list(mixed.lengths[:5])
    assert [len(row) for row in tokenizer.encode_texts(job.texts, max_length=512, truncation=False)] == list(
        mixed.lengths[:5]
    )


def test_held_out_text_and_its_masks(parts: Any, tokenizer: Any):
    job = parts.workloads.heldout_job(tokenizer, texts=6, longest=64)
    assert len(job.texts) == 6 and 40 < job.input_ids.shape[1] <= 64
    hidden = parts.workloads.masked(job, tokenizer.mask_token_id)
    rows, tokens = hidden.mask_positions.T
    assert (hidden.input_ids[rows, tokens] == tokenizer.mask_token_id).all() and (tokens > 0).all()
    assert (job.input_ids[rows, tokens] == hidden.labels).all() and hidden.attention_mask[rows, tokens].all()
    assert (hidden.input_ids != job.input_ids).sum() == len(hidden.labels) > 5


# --- accuracy and artefacts -----------------------------------------------------------------------------------------


def test_cosines_and_agreement(parts: Any):
    expected = np.eye(8, dtype=np.float32)[:4]
    found = expected.copy()
    found[0, :2] = [0.0, 2.0]  # another direction, another best token
    result = parts.accuracy.cosines(expected, found)
    assert (result["mean"], result["min"], result["max_abs"]) == (0.75, 0.0, 2.0)
    job = parts.workloads.Job([], expected, expected, None, np.array([0, 1, 2, 7]))
    result = parts.accuracy.agreement(expected, found, job)
    assert (result["top1_agreement"], result["right"], result["reference_right"]) == (0.75, 0.5, 0.75)
    assert parts.accuracy.agreement(expected, expected, job)["top5_overlap"] == 1.0
    with pytest.raises(WorkerError, match=r"\(4, 8\), and the contestant \(3, 8\)"):
        parts.accuracy.cosines(expected, found[:3])
    with pytest.raises(WorkerError, match="not finite"):
        parts.accuracy.cosines(expected, found * np.nan)


def test_what_other_sources_made_is_made_again(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    class Process:
        def __init__(self, recipe: Any, *values: Any) -> None:
            made.append(recipe.__name__)
            if recipe.__name__ == "make_plain":
                raise WorkerError("no trace")

        def close(self) -> None:
            pass

    monkeypatch.setattr(parts.artefacts, "Worker", Process)

    def artefacts(length: int = 8) -> Any:
        subject = parts.artefacts.Subject("s", "gte-en-mlm-tiny", "embed")
        return parts.artefacts.Artefacts(tmp_path, subject, max_length=length, progress=lambda line: None)

    first = artefacts()
    assert first.path("checkpoint") == first.path("checkpoint") and made == ["make_checkpoint"]
    for _ in range(2):  # tried once, told each time
        with pytest.raises(WorkerError, match="no trace"):
            first.path("nncf")
    assert made == ["make_checkpoint", "make_plain"]
    artefacts().path("checkpoint")
    assert len(made) == 2
    artefacts(length=16).path("checkpoint")
    monkeypatch.setattr(parts.artefacts, "sources_digest", lambda bundle: "another")
    artefacts(length=16).path("checkpoint")
    assert made[2:] == ["make_checkpoint"] * 2


# --- the report -----------------------------------------------------------------------------------------------------


def made_up(parts: Any) -> dict[str, Any]:
    """Base size: torch takes 1 s for everything, and each contestant 1 / its speed."""
    by_name = {one.name: one for one in parts.contestants.CONTESTANTS}
    speeds = {
        "torch eager fp32": 1.0,
        "ORT plain graph": 0.8,
        "OpenVINO direct fp32": 1.25,
        "gte-deploy onnx fp32": 1.5,
        "torch bf16": 2.0,
        "gte-deploy openvino bf16": 2.5,
        "OpenVINO direct NNCF int8": 5.0,
        "gte-deploy openvino int8": 4.0,
    }
    measurements = []
    for workload in ("1x512", "8x128", "mixed", "1x8192"):
        for name, speed in speeds.items():
            speed = 4 * speed if workload == "mixed" and name.startswith("gte") else speed
            one = by_name[name]
            measurements.append(
                {
                    "subject": "base",
                    "workload": workload,
                    "contestant": name,
                    "precision": one.precision,
                    "ours": one.is_ours,
                    "tokens": 100,
                    "flops": 5e9,
                    "alone": workload == "1x8192",
                    "seconds": [1 / speed] * 3,
                    "reference_seconds": [] if workload == "1x8192" else [1.0] * 3,
                    "peak_bytes": 1e9 if one.is_ours else 11e9,
                    "error": None,
                }
            )
    slow = next(
        row for row in measurements if row["workload"] == "mixed" and row["contestant"] == "gte-deploy onnx fp32"
    )
    measurements.append({**slow, "workload": "mixed-padded", "seconds": [0.5]})
    measurements.append({**slow, "contestant": "FastEmbed", "ours": False, "seconds": [], "error": "not installed"})
    cosine = {"mean": 0.99995, "min": 0.9, "max_abs": 0.1}
    return {
        "date": "2026-01-31T00:00:00+00:00",
        "commands": ["python benchmarks/inference.py"],
        "hardware": {"cpu": "A CPU", "threads": 2, "instructions": ["avx2"]},
        "versions": {"torch": "2"},
        "gemm_peak": {"method": "by hand", "fp32": 1e10, "16-bit": 2e10, "int8": 4e10},
        "accuracy": [
            {"subject": "base", "contestant": "gte-deploy openvino bf16", "error": None, "token_embeddings": cosine}
        ],
        "measurements": measurements,
    }


def test_bars_are_computed_from_the_numbers(parts: Any):
    bars = {bar.name: bar for bar in parts.report.bars(made_up(parts))}

    def of(name: str) -> tuple[Any, ...]:
        bar = bars[name]
        return (bar.reached and pytest.approx(bar.reached), bar.met, bar.stretch_met)

    assert of("ORT fp32 against torch fp32, 1x512") == (1.5, True, True)
    assert of("fused against the plain graph at 8,192 tokens, times as fast") == (1.875, False, None)
    assert of("fused against the plain graph at 8,192 tokens, share of memory") == (1 / 11, True, None)
    assert of("peak resident GB at 8,192 tokens, fp32") == (1.0, True, None)
    assert of("mixed batch against one padded batch") == (3.0, True, True)
    assert of("best int8 of ours against torch fp32, 1x512") == (4.0, True, True)
    assert of("best int8 of ours against torch fp32, 8x128") == (4.0, False, False)
    assert of("best 16-bit of ours against torch fp32, 8x128") == (2.5, True, False)
    assert of("cosine of the best 16-bit of ours") == (0.99995, True, None)
    assert of("ours against the best peer, fp32, dense shapes") == (1.2, True, None)
    assert of("ours against the best peer, int8, dense shapes") == (0.8, False, None)
    assert of("ours against the best peer, fp32, mixed lengths") == (4.8, True, None)
    assert "OpenVINO direct NNCF int8" in bars["ours against the best peer, int8, dense shapes"].by

    empty = {**made_up(parts), "measurements": [], "accuracy": []}
    assert all((bar.reached, bar.met) == (None, None) for bar in parts.report.bars(empty))


def test_share_of_peak_and_tables(parts: Any):
    report = made_up(parts)
    row = parts.report.find(report, "gte-deploy openvino int8", "1x512")
    assert parts.report.share_of_peak(row, report) == pytest.approx(0.5)
    text = parts.report.markdown(report)
    assert "| gte-deploy openvino bf16 | 2.50 | 2.50 | 10.00 |" in text
    assert "- FastEmbed (base mixed): not installed" in text
    assert "| ours against the best peer, int8, dense shapes | ≥ 1 | 0.80 | no |" in text


def test_the_chart(parts: Any, tmp_path: Path):
    parts.chart.draw(made_up(parts), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    parts.chart.draw({**made_up(parts), "measurements": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()

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

import environments
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
        machine = importlib.import_module("side_by_side.machine")
        environments = importlib.import_module("side_by_side.environments")

    return Parts


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(builtin_path())


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inference")
    options = (
        "--allow-noise --subjects tiny --threads 1 --max-length 64 --corpus-texts 3 --accuracy-texts 2 --repeats 2"
    )
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


@pytest.mark.slow
def test_contestants_are_timed_on_what_they_take(report: dict[str, Any]):
    rows = rows_of(report)
    assert len([name for workload, name in rows if workload == "2x8"]) == 3
    assert len([name for workload, name in rows if workload == "short-corpus"]) == 3
    assert os.cpu_count() == 1 or rows["2x8", "light-embed"]["error"]  # it cannot be held to one thread
    ours = rows["2x8", "gte-deploy onnx fp32"]
    assert len(ours["seconds"]) == len(ours["reference_seconds"]) == 2 and min(ours["seconds"]) > 0
    assert ours["reference_seconds"] == rows["2x8", "torch eager fp32"]["seconds"]
    assert (ours["tokens"], ours["padded_tokens"], ours["ours"], ours["error"]) == (16, 16, True, None)
    assert 2e7 < ours["peak_bytes"] < rows["2x8", "torch eager fp32"]["peak_bytes"]


@pytest.mark.slow
def test_flops_are_those_of_real_tokens(report: dict[str, Any]):
    # gte-en-mlm-tiny: 4 layers of 256, 768 wide
    dense, attention = 16 * (4 * 256 * 256 + 3 * 256 * 768), 2 * 256 * 2 * 64
    assert rows_of(report)["2x8", "gte-deploy onnx fp32"]["flops"] == 2 * 4 * (dense + attention)
    assert set(report["gemm_peak"]) - {"16-bit"} == {"method", "fp32", "int8"}


@pytest.mark.slow
def test_answers_are_compared_with_torch(report: dict[str, Any]):
    accuracy = {row["contestant"]: row for row in report["accuracy"]}
    ours = accuracy["gte-deploy onnx fp32"]
    assert ours["token_embeddings"]["min"] > 0.99999 and 0 < ours["embed"]["max_abs"] < 1e-4


@pytest.mark.slow
def test_a_number_comes_with_date_hardware_versions_and_command(report: dict[str, Any]):
    assert report["date"].startswith("20") and report["hardware"]["cpu"] and report["hardware"]["threads"] == 1
    assert report["versions"]["onnxruntime"][0].isdigit() and len(report["commands"]) == 1


@pytest.mark.slow
def test_tables_name_every_contestant_and_reason(report: dict[str, Any], arguments: list[str], parts: Any):
    text = Path(arguments[arguments.index("--output") + 1]).with_suffix(".md").read_text()
    assert text == parts.report.markdown(report)
    assert "| 2x8, gte-deploy onnx fp32 |" in text and text.rindex("\n## ") == text.index("\n## Bars")
    for row in report["measurements"]:
        assert row["contestant"] in text and (row["error"] is None or row["error"] in text)


@pytest.mark.slow
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
    inference: ModuleType, arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    """The whole way to a report with one contestant, for every run of the tests; the others here are slow."""
    monkeypatch.setattr(inference, "SIZE", 64)
    file = tmp_path / "result.json"
    assert inference.main([*arguments[:-2], "--shapes", "1x8", "--minutes", "0", "--output", str(file)]) == 0
    report = json.loads(file.read_text())
    (row,) = report["measurements"]
    assert row["contestant"] == "torch eager fp32" and row["error"].startswith("left out")
    assert report["hardware"]["cpu"] and report["accuracy"]
    shown = capsys.readouterr().out
    assert "left out: the 0 minutes were over" in shown and file.with_suffix(".md").read_text() in shown


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
    assert len(short.lengths) == 256 and max(short.lengths) <= 32 and short.is_list
    assert len(corpus.lengths) == 2000 and max(corpus.lengths) <= 512 and 25 < np.median(corpus.lengths) < 40
    long, rows = parts.workloads.make_workload("1x8192"), parts.workloads.make_workload("8x128")
    assert long.is_alone and not rows.is_alone and not mixed.is_alone

    equal, list_mixed = (parts.workloads.make_workload(name) for name in ("list-256x32", "list-mixed"))
    assert equal.lengths == (32,) * 256 and equal.is_list and not equal.is_alone and not rows.is_list
    assert len(list_mixed.lengths) == 128 and max(list_mixed.lengths) <= 512 and list_mixed.is_list
    assert parts.workloads.make_workload("1x4096").is_alone

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


# --- the machine ----------------------------------------------------------------------------------------------------

X86 = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu {}\nbugs\t\t: avx2_bug\n"


@pytest.mark.parametrize(
    ("cpuinfo", "names", "best"),
    [
        (X86.format("avx avx2"), ["AVX2"], ("AVX2", None, "AVX2")),
        (
            X86.format("avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"),
            ["AVX2", "AVX-512", "VNNI", "AVX512-BF16", "AMX-BF16", "AMX-INT8"],
            ("AVX-512", "AMX-BF16", "AMX-INT8"),
        ),
        (
            X86.format("avx2 avx512f avx512_bf16"),
            ["AVX2", "AVX-512", "AVX512-BF16"],
            ("AVX-512", "AVX512-BF16", "AVX-512"),
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16\n",
            ["NEON", "dotprod", "i8mm", "SVE", "bf16"],
            ("SVE", "bf16", "i8mm"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd\n", ["NEON"], ("NEON", None, "NEON")),
        ("processor\t: 0\n", [], (None, None, None)),
    ],
)
def test_kernels_of_a_cpu(parts: Any, cpuinfo: str, names: list[str], best: tuple[str | None, ...]):
    machine = parts.machine
    assert machine.kernels(cpuinfo) == names
    assert tuple(machine.kernel_of(name, names) for name in ("fp32", "16-bit", "int8")) == best
    assert machine.kernel_of("int8-weight", names) == best[0]


def test_contestants_of_a_precision_that_the_cpu_lacks_have_the_reason(inference: ModuleType, parts: Any):
    without = {one.name for one in parts.contestants.CONTESTANTS if one.what_lacks(["AVX2", "VNNI"])}
    assert without == {
        "torch bf16",
        "OpenVINO direct bf16",
        "sentence-transformers openvino bf16",
        "sentence-transformers openvino bf16, batches of 8",
        "optimum-intel bf16",
        "gte-deploy openvino bf16",
        "OpenVINO direct NNCF int8, rest bf16",
        "gte-deploy openvino int8, rest bf16",
    }
    one = next(one for one in parts.contestants.CONTESTANTS if one.name == "torch bf16")
    assert "no bf16 kernels" in one.what_lacks(["AVX2"]) and one.what_lacks(["AVX2"]).endswith("it has AVX2")
    assert one.what_lacks(["AVX-512", "AVX512-BF16"]) is None and one.what_lacks(["bf16"]) is None
    run = inference.Run(None, {"hardware": {"kernels": ["AVX2"]}}, 0.0, None, None)
    with pytest.raises(WorkerError, match="no bf16 kernels"):
        run.require(one)


def test_noise_is_what_others_do(parts: Any, tmp_path: Path):
    noise = parts.machine.Noise
    assert noise.of([1.0, 1.1, 1.12], busy=0.01, steal=0.01).reason() is None
    reason = noise.of([1.0, 1.2, 1.3], busy=0.5, steal=0.03).reason()
    assert reason == (
        "the calibration product's median is above its least time by 20% (limit 15%); "
        "other programs keep the CPUs busy for 50% (limit 5%); the hypervisor takes 3% (limit 2%)"
    )
    assert "hypervisor" in noise.of([], busy=0.0, steal=0.03).reason()

    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 100 20 0 0 0 7 7\ncpu0 1 1 1 1\n")
    before = parts.machine.CpuTimes.now(stat)
    stat.write_text("cpu  30 0 20 140 40 0 0 10 9 9\ncpu0 1 1 1 1\n")
    assert parts.machine.CpuTimes.now(stat).shares_since(before) == pytest.approx((0.4, 0.1))


def test_it_refuses_a_noisy_machine(
    inference: ModuleType, parts: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts.machine, "SPREAD_LIMIT", -1)
    options = [name for name in arguments if name != "--allow-noise"]
    with pytest.raises(SystemExit, match="too noisy to compare: the calibration product.*--allow-noise"):
        inference.main([*options, "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_a_disturbed_measurement_is_marked_or_has_no_result(
    inference: ModuleType,
    parts: Any,
    arguments: list[str],
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    file = tmp_path / "result.json"
    monkeypatch.setattr(parts.machine, "SPREAD_LIMIT", -1)
    monkeypatch.setattr(inference, "_refuse_noise", lambda arguments, calibration: None)
    options = [name for name in arguments if name != "--allow-noise"][:-1]
    options += ["--shapes", "2x8", "--repeats", "1", "--resume", str(file), "--output", str(file)]
    file.write_text(json.dumps({**report, "measurements": []}))
    assert inference.main(options) == 0
    rows = json.loads(file.read_text())["measurements"]
    assert rows and all("too noisy" in row["error"] and not row["seconds"] for row in rows)
    assert inference.main([*options, "--allow-noise"]) == 0
    rows = json.loads(file.read_text())["measurements"]
    assert rows and all("calibration" in row["noise"] and row["seconds"] and not row["error"] for row in rows)
    assert "marked ≈" in file.with_suffix(".md").read_text()


def test_energy_is_the_sum_of_the_packages(parts: Any, tmp_path: Path):
    def write(zone: str, value: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")

    for zone, value in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 0)):
        write(zone, value)
    (tmp_path / "intel-rapl").mkdir()
    energy = parts.machine.Energy(tmp_path)
    write("intel-rapl:0", 3_500_000)
    write("intel-rapl:1", 500_000)  # wrapped
    write("intel-rapl:0:0", 5_000_000)  # a part of package 0
    assert energy.reason is None and energy.joules() == pytest.approx(2.5 + 1.5)
    assert energy.joules() == 0


def test_no_energy_has_a_reason(parts: Any, tmp_path: Path):
    assert "has no intel-rapl" in parts.machine.Energy(tmp_path).reason
    (tmp_path / "intel-rapl:0").mkdir()
    assert "cannot be read" in parts.machine.Energy(tmp_path).reason


def test_a_whole_name_is_one_contestant_and_a_part_all_that_have_it(inference: ModuleType):
    def chosen(*given: str) -> list[str]:
        return [one.name for one in inference._parse(["--contestants", *given]).contestants]

    assert chosen("gte-deploy onnx int8") == ["gte-deploy onnx int8"]
    assert {"gte-deploy onnx int8", "gte-deploy openvino int8"} < set(chosen("int8"))
    assert chosen("infinity", "torch eager fp32") == ["torch eager fp32", "infinity"]


# --- environments of peers ------------------------------------------------------------------------------------------


def test_a_peer_without_an_environment_has_the_reason(parts: Any):
    with pytest.raises(WorkerError, match=r"python tests/support/environments.py one"):
        parts.environments.interpreter("one")
    assert parts.environments.versions("one", ["pip"]) == {}


def test_a_peer_answers_from_its_own_environment(parts: Any, tmp_path: Path):
    python = environments.make("empty", ["pip"], folder=tmp_path)
    limits = {"cpus": 1, "timeout_s": 120}
    job = parts.workloads.Job(["b", "a"], np.zeros((2, 1), np.int64), np.ones((2, 1), np.int64))
    with parts.environments.EnvironmentWorker(python, list, (["first"],), {}, **limits) as worker:
        answer = worker.call("__add__", job)  # the texts of the job
        assert answer.value == ["first", "b", "a"] and answer.seconds > 0 and worker.peak_bytes > 1e6
        with pytest.raises(WorkerError, match="ValueError"):
            worker.call("index", job)
    with pytest.raises(WorkerError, match="ended with exit code 1"):  # the class needs numpy, which is not there
        parts.environments.EnvironmentWorker(python, parts.contestants.Infinity, (tmp_path, 1), {}, **limits)


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
                    "kernel": "AVX2",
                    "ours": one.is_ours,
                    "tokens": 100,
                    "flops": 5e9,
                    "alone": workload == "1x8192",
                    "seconds": [1 / speed] * 3,
                    "reference_seconds": [] if workload == "1x8192" else [1.0] * 3,
                    "peak_bytes": 1e9 if one.is_ours else 11e9,
                    "joules": [3.0] if name == "torch bf16" else None,
                    "noise": "the hypervisor takes 9%" if workload == "mixed" else None,
                    "error": None,
                }
            )
    slow = measurements[0]
    measurements.append(
        {**slow, "workload": "mixed", "contestant": "FastEmbed", "ours": False, "seconds": [], "error": "not installed"}
    )
    cosines = dict.fromkeys(speeds, 0.99995) | {"gte-deploy openvino int8": 0.9990, "OpenVINO direct NNCF int8": 0.9994}
    return {
        "date": "2026-01-31T00:00:00+00:00",
        "commands": ["python benchmarks/inference.py"],
        "hardware": {"cpu": "A CPU", "threads": 2, "kernels": ["AVX2"]},
        "versions": {"torch": "2"},
        "environments": {"onnx": {"transformers": "4"}, "infinity": {}},
        "no_energy": "no counters",
        "gemm_peak": {"method": "by hand", "fp32": 1e10, "16-bit": 2e10, "int8": 4e10},
        "accuracy": [
            {
                "subject": "base",
                "contestant": name,
                "error": None,
                "token_embeddings": {"mean": mean, "min": 0, "max_abs": 1},
            }
            for name, mean in cosines.items()
        ],
        "measurements": measurements,
    }


def test_bars_are_computed_from_the_numbers(parts: Any):
    report = made_up(parts)
    bars = {(bar.workload, bar.precision): bar for bar in parts.report.bars(report)}

    def of(workload: str, precision: str) -> tuple[Any, ...]:
        bar = bars[f"base {workload}", precision]
        return (bar.bar, bar.reached and pytest.approx(bar.reached), bar.met)

    assert of("1x512", "fp32") == (1.05, 1.2, True)
    assert of("8x128", "int8") == (1.05, 0.8, False)
    assert of("mixed", "fp32") == (1.3, 4.8, True) and bars["base mixed", "fp32"].is_noisy
    assert of("1x8192", "16-bit") == (1.2, 1.25, True) and not bars["base 1x8192", "16-bit"].is_noisy
    assert bars["base 1x512", "int8"].by == "gte-deploy openvino int8 (0.99900), OpenVINO direct NNCF int8 (0.99940)"
    assert parts.report.bars({**report, "measurements": []}) == []


def test_a_bar_needs_a_contestant_as_accurate_as_the_peer(parts: Any):
    def bar(**cosines: float | None) -> Any:
        report = made_up(parts)
        report["accuracy"] = [row for row in report["accuracy"] if cosines.get(row["contestant"][:4], 1) is not None]
        for row in report["accuracy"]:
            row["token_embeddings"]["mean"] = cosines.get(row["contestant"][:4], 0.9999)
        return next(one for one in parts.report.bars(report) if (one.workload, one.precision) == ("base 1x512", "int8"))

    assert bar(Open=0.9990, **{"gte-": 0.99851}).reached == pytest.approx(0.8)
    assert bar(Open=0.9990, **{"gte-": 0.99849}).by.startswith(
        "nothing of gte-deploy is as accurate as OpenVINO direct"
    )
    assert "accuracy of OpenVINO direct NNCF int8 was not measured" in bar(Open=None).by
    report = made_up(parts)
    report["measurements"] = [row for row in report["measurements"] if row["ours"]]
    found = {(one.by, one.met) for one in parts.report.bars(report) if one.workload != "base 1x8192"}
    assert found == {("no result of a peer", None)}


def test_share_of_peak_and_tables(parts: Any):
    report = made_up(parts)
    row = parts.report.find(report, "gte-deploy openvino int8", "1x512")
    assert parts.report.share_of_peak(row, report) == pytest.approx(0.5)
    text = parts.report.markdown(report)
    assert "| gte-deploy openvino bf16 | AVX2 | 2.50 | 2.50 | ≈ 10.00 |" in text
    assert "- FastEmbed (base mixed): not installed" in text
    assert "A CPU (AVX2), 2 threads; torch 2; onnx's environment: transformers 4." in text
    assert "noisy in 8 of 32 measurements" in text and "Energy was not measured: no counters." in text
    assert "| 1x512, torch bf16 | 500.0 | 500.0 – 500.0 | 3 | 200 | 50% |  | 3.0 |" in text
    assert "| base 1x512 | int8 | ≥ 1.05 | 0.80 | missed |" in text and text.index("## Bars") > text.index("## base")


def test_the_chart(parts: Any, tmp_path: Path):
    parts.chart.draw(made_up(parts), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    parts.chart.draw({**made_up(parts), "measurements": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()

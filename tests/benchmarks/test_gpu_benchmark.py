"""The GPU benchmark: rehearsed on the CPU, and its groups and tables computed from made-up numbers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    # Workers are spawned with this process's sys.path, and find the package there too.
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def report(gpu: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("gpu")
    options = "--device cpu --subjects tiny --shapes 2x8 1x16 --repeats 2 --accuracy-texts 2 --max-length 64 --json"
    paths = ["--work", str(folder / "work"), "--output", str(folder / "result.json")]
    # The plain graph runs anywhere; what is made for CUDA is a row with its reason on a CPU.
    assert gpu.main([*options.split(), *paths, "--contestants", "plain graph", "gte-deploy TensorRT fp16"]) == 0
    return json.loads((folder / "result.json").read_text()), folder


@pytest.mark.slow
def test_rehearsal_on_the_cpu_measures_what_runs_there(gpu: ModuleType, report: Any):
    data, folder = report
    rows = {(row["workload"], row["contestant"]): row for row in data["measurements"]}
    assert {name for _, name in rows} == {
        gpu.EXACT,
        gpu.REFERENCE,
        "ORT CUDA plain graph",
        "gte-deploy TensorRT fp16",
    }
    plain = rows["2x8", "ORT CUDA plain graph"]
    assert len(plain["seconds"]) == len(plain["reference_seconds"]) == 2 and min(plain["seconds"]) > 0
    assert plain["reference_seconds"] == rows["2x8", gpu.REFERENCE]["seconds"]
    assert (plain["tokens"], plain["ours"], plain["error"]) == (16, False, None)
    accuracy = {row["contestant"]: row for row in data["accuracy"]}
    assert accuracy["ORT CUDA plain graph"]["token_embeddings"]["min"] > 0.99999
    assert 0.99 < accuracy[gpu.REFERENCE]["embed"]["min"] < 1
    assert data["memory"] == [], "a GPU's memory cannot be told without one"
    assert data["hardware"]["device"] == "cpu" and data["versions"]["torch"] and len(data["commands"]) == 1
    assert (folder / "result-tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_cannot_run_is_a_row_with_its_reason(report: Any):
    data, folder = report
    text = (folder / "result.md").read_text()
    failed = [row for row in data["measurements"] if row["contestant"] == "gte-deploy TensorRT fp16"]
    assert len(failed) == 2 and all(row["error"] and not row["seconds"] for row in failed)
    assert failed[0]["error"] in text and "## Not measured" in text
    (claim,) = data["claims"]
    assert (claim["contestant"], claim["precision"]) == ("gte-deploy TensorRT fp16", "fp16") and claim["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(gpu: ModuleType, tmp_path: Path, capsys: Any):
    assert gpu.main(["--work", str(tmp_path), "--output", str(tmp_path / "result.json")]) == 1
    assert "nothing was measured: RuntimeError: there is no NVIDIA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "8"], "neither ROWSxTOKENS"),
        (["--shapes", "1x64", "--max-length", "32"], "texts of 64 tokens, and --max-length is 32"),
        (["--contestants", "nobody"], "no name has such a part"),
    ],
)
def test_wrong_options(gpu: ModuleType, options: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit):
        gpu.main(options)
    assert message in capsys.readouterr().err


def test_the_grid_is_one_to_64_rows_and_16_to_8192_tokens(gpu: ModuleType):
    arguments = gpu._parse([])
    assert {"1x16", "64x16", "1x8192", "64x8192", "mixed"} <= set(arguments.shapes)
    assert [one.name for one in arguments.contestants] == [one.name for one in gpu.CONTESTANTS]
    few = gpu._parse(["--contestants", "TensorRT-RTX"]).contestants
    assert [one.name for one in few[:2]] == [gpu.EXACT, gpu.REFERENCE] and len(few) == 6


def test_contestants_of_cls_are_held_against_first_tokens(gpu: ModuleType, word_checkpoints: Any):
    """An engine of answers has no token embeddings, and beside it is one of all outputs."""
    cls = {one.name: one for one in gpu._parse(["--contestants", "TensorRT fp16 CLS"]).contestants[2:]}
    assert list(cls) == ["gte-deploy TensorRT fp16 CLS", "gte-deploy TensorRT fp16 CLS, answer alone"]
    assert [one.gives_states for one in cls.values()] == [True, False]
    assert {one.right_answer for one in cls.values()} == {"first_tokens"}
    exact = next(one for one in gpu.CONTESTANTS if one.name == gpu.EXACT)
    run = SimpleNamespace(arguments=SimpleNamespace(max_length=32, accuracy_texts=2))
    subject, expected = gpu.SUBJECTS["base"], {}
    tokenizer = gpu.load_tokenizer(word_checkpoints["embed"])
    with gpu.Worker(exact.factory, word_checkpoints["embed"], "cpu") as worker:
        gpu._accuracy(run, worker, subject, exact, tokenizer, expected)
    one = cls["gte-deploy TensorRT fp16 CLS, answer alone"]
    with gpu.Worker(one.factory, word_checkpoints["embed"], "cpu", "torch") as worker:
        row = gpu._accuracy(run, worker, subject, one, tokenizer, expected)
    assert row["embed"]["min"] > 0.99999 and "token_embeddings" not in row


# --- from made-up numbers -------------------------------------------------------------------------------------------


def made_up_run(gpu: ModuleType, free: int, taken: dict[str, int], failed: dict[str, str]) -> Any:
    memory = [
        {"subject": "base", "contestant": name, "workload": "8x128", "error": None, "peak_bytes": size}
        for name, size in taken.items()
    ]
    memory += [
        {"subject": "base", "contestant": name, "workload": workload, "error": "out of memory", "peak_bytes": None}
        for name, workload in failed.items()
    ]
    meter = SimpleNamespace(call=lambda name: SimpleNamespace(value=free))
    return SimpleNamespace(report={"memory": memory, "measurements": []}, meter=meter)


def test_contestants_are_together_as_far_as_they_fit(gpu: ModuleType):
    names = [gpu.REFERENCE, "torch.compile fp16", "torch.compile bf16", "ORT CUDA plain graph"]
    usable = [one for one in gpu.CONTESTANTS if one.name in names]
    run = made_up_run(gpu, 100, dict.fromkeys(names, 30), {"ORT CUDA plain graph": "8x128"})
    groups = list(gpu._groups(run, gpu.SUBJECTS["base"], gpu.make_workload("8x128"), usable))
    assert [[one.name for one in group] for group in groups] == [names[:3]]
    (row,) = run.report["measurements"]
    assert (row["contestant"], row["error"]) == ("ORT CUDA plain graph", "out of memory")

    run = made_up_run(gpu, 80, dict.fromkeys(names, 30), {})
    groups = list(gpu._groups(run, gpu.SUBJECTS["base"], gpu.make_workload("8x128"), usable))
    assert [[one.name for one in group] for group in groups] == [[names[0], name] for name in names[1:]]


def test_who_failed_alone_is_not_tried_with_more(gpu: ModuleType):
    failure = {"workload": "8x512"}
    beyond = {name: gpu._is_beyond(gpu.make_workload(name), failure) for name in ("8x128", "8x512", "64x128", "1x8192")}
    assert beyond == {"8x128": False, "8x512": True, "64x128": True, "1x8192": True}
    assert not gpu._is_beyond(gpu.make_workload("64x8192"), None)


def test_tables_from_numbers(gpu: ModuleType, tmp_path: Path):
    def row(name: str, seconds: list[float], **more: Any) -> dict[str, Any]:
        one = next(each for each in gpu.CONTESTANTS if each.name == name)
        row = gpu._row(gpu.SUBJECTS["base"], gpu.make_workload("8x128"), one)
        return {**row, "seconds": seconds, "reference_seconds": [0.004] * 3, **more}

    report = {
        "date": "2026-01-31T00:00:00+00:00",
        "commands": ["python benchmarks/gpu.py"],
        "hardware": {"device": "cuda", "cpu": "A CPU", "gpu": "A GPU"},
        "versions": {"torch": "2"},
        "claims": [
            {
                "subject": "base",
                "contestant": "gte-deploy TensorRT-RTX fp8",
                "precision": "fp8",
                "error": None,
                "finite": True,
                "cosine_min": 0.9987,
                "hit_rate": 0.996,
                "replay_rate": 0.75,
                "contexts": 5,
                "cold": {"open_s": 1.5, "first_run_s": 20.0},
                "warm": {"open_s": 1.5, "first_run_s": 0.5},
                "kept_bytes": 3_400_000,
            },
            {
                "subject": "base",
                "contestant": "gte-deploy TensorRT int8",
                "precision": "int8",
                "error": None,
                "finite": False,
                "cold": {"open_s": 1, "first_run_s": 1},
                "warm": {"open_s": 1, "first_run_s": 1},
                "kept_bytes": 0,
            },
        ],
        "accuracy": [],
        "memory": [
            {"subject": "base", "workload": "8x128", "contestant": "torch eager bf16", "peak_bytes": 2e9, "error": None}
        ],
        "measurements": [
            row("gte-deploy ORT CUDA fp16", [0.001, 0.002, 0.003]),
            row("gte-deploy TensorRT fp8", [], error="this GPU has no FP8"),
        ],
    }
    text = gpu.markdown(report)
    assert "| base: gte-deploy TensorRT-RTX fp8 | yes | 0.99870 | 99.6% | 75.0% | 5 | 21.50 | 2.00 | 3.4 |" in text
    assert "| base: gte-deploy TensorRT int8 | **no** |  |  |  |  | 2.00 | 2.00 | 0.0 |" in text
    assert "| gte-deploy ORT CUDA fp16 | 2.00 |" in text
    assert "| gte-deploy ORT CUDA fp16 | 2.00 (1.50 – 2.50) |" in text
    assert "| torch eager bf16 | 2,000 |" in text
    assert "- gte-deploy TensorRT fp8 (base 8x128): this GPU has no FP8" in text
    assert gpu.draw(report, "base", tmp_path / "chart.png") and not gpu.draw(report, "tiny", tmp_path / "none.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_claims_of_an_engine_without_counts(gpu: ModuleType, tmp_path: Path, word_checkpoints: Any):
    """On the CPU and torch, as far as it goes: answers, times, and no hit rate."""
    contestant = gpu.Contestant("gte-deploy torch", "fp32", type("GteDeploy", (), {}), "", {"backend": "torch"})
    checkpoint = word_checkpoints["embed"]
    jobs = gpu.claims.jobs_of(gpu.load_tokenizer(checkpoint), 32)
    assert [job.input_ids.shape for job in jobs] == [(1, 1), (1, 2), (1, 17)]
    with gpu.Worker(gpu.claims.open_checked, checkpoint, "cpu", tmp_path, {"backend": "torch"}) as worker:
        expected = [worker.call("embed", job).value for job in jobs]
    row = gpu.claims.check(contestant, checkpoint, "cpu", jobs, expected, tmp_path / "cache")
    assert row["finite"] and row["cosine_min"] > 0.99999 and row["kept_bytes"] == 0 and "hit_rate" not in row
    assert min(row[name]["first_run_s"] for name in ("cold", "warm")) > 0


def test_counts_of_traffic(gpu: ModuleType):
    from gte_deploy.core.spec import TensorSpec
    from tensorrt_doubles import HostRuntime, backend_over, engine_of, plan_of

    outputs = (TensorSpec("sentence_embedding", "float32", ("batch", 4)),)
    backend = backend_over(HostRuntime(), plan_of(inputs=plan_of().inputs[:2], outputs=outputs))
    engine_of(backend).compute = lambda shapes, addresses: None
    backend.spec = SimpleNamespace(vocab_size=1000, max_length=64, pad_token_id=0, token_types=False)
    model = SimpleNamespace(_model=SimpleNamespace(_backend=backend))
    model._run_text = lambda length: gpu.claims.Checked._run_text(model, length)
    found = gpu.claims.Checked.traffic(model, 200, 64)
    assert found["hit_rate"] > 0.95 and found["replay_rate"] > 0.8 and 2 <= found["contexts"] <= 10


@pytest.mark.gpu
def test_the_meter_sees_memory_being_taken(gpu: ModuleType):
    meter = gpu.Meter()
    assert meter.describe()["memory_bytes"] >= meter.free_bytes() > 0
    meter.start()
    taken = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert meter.stop() >= taken.nbytes

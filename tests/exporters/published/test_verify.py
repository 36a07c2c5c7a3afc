"""`gte-export verify-published` as a process, against a stand-in of the hub that serves checkpoints of these tests."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from factories import make_checkpoint
from family_checkpoints import make_family_checkpoint
from gte_deploy.core.errors import InputError
from gte_deploy.exporters.published import verify
from gte_deploy.exporters.published.results import PublishedResult, read_result, read_results, summary, write_result
from gte_deploy.models.published import PUBLISHED, published
from hub import Hub, running_hub

BERT, GTE, WRONG = "google-bert/bert-base-uncased", "Alibaba-NLP/gte-base-en-v1.5", "Alibaba-NLP/gte-multilingual-base"
INCOMPLETE, GATED = "answerdotai/ModernBERT-large", "naver/splade-cocondenser-ensembledistil"
CHANGED, MISSING = "Alibaba-NLP/gte-modernbert-base", "intfloat/e5-small-v2"
MODELS = (BERT, GTE, WRONG, INCOMPLETE, GATED, CHANGED, MISSING)
IDS = ((2, 20, 21, 22, 3),)
NTK = {"type": "ntk", "factor": 2.0}

# The table of recorded values is replaced with one for the weights of these tests.
_RUN = """
import json, sys
from gte_deploy.exporters.published import recorded
values = json.loads(sys.argv[1])
recorded.RECORDED.clear()
recorded.RECORDED.update({model: tuple(recorded.Recorded(**each) for each in rows) for model, rows in values.items()})
from gte_deploy.exporters.cli import main
sys.exit(main(["verify-published", *sys.argv[2:]]))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(model: Any, rows: int = 3) -> list[Any]:
    with torch.inference_mode():
        found: list[Any] = model(torch.tensor(IDS)).last_hidden_state[:, 1:4, :rows].tolist()
    return found


def recorded(values: list[Any]) -> list[dict[str, Any]]:
    fields = {"source": "a test", "quantity": "last_hidden_state", "token_ids": IDS, "select": "[:, 1:4, :3]"}
    return [{**fields, "values": values}]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def values(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fill the hub, and return the values that transformers computes from the same weights."""
    base = tmp_path_factory.mktemp("published")
    bert = make_family_checkpoint(base / "bert", "bert")
    # The same function in both layouts: transformers reads the native one, and the hub has the original one.
    common: dict[str, Any] = {"task": "embed", "pooling": "cls", "rope_scaling": NTK, "max_positions": 64}
    native = make_checkpoint(base / "native", layout="native", **common)
    original = make_checkpoint(base / "original", layout="original", **common)
    hub.add(BERT, {**files_of(bert), "pytorch_model.bin": b"a pickle", "modeling.py": b"code"})
    for name in (GTE, WRONG):
        repository = hub.add(name, files_of(original))
        pinned = PUBLISHED[name].revision
        assert pinned is not None
        repository.commits[pinned] = repository.commits[repository.refs["main"]]
    hub.add(INCOMPLETE, {"config.json": (bert / "config.json").read_bytes()})
    hub.add(GATED, files_of(bert), gated=True)
    hub.add(CHANGED, files_of(bert))  # its pinned commit is gone
    gte = hidden(transformers.AutoModel.from_pretrained(native))
    wrong = json.loads(json.dumps(gte))
    wrong[0][1][2] += 0.01
    return {
        BERT: recorded(hidden(transformers.AutoModelForMaskedLM.from_pretrained(bert).bert)),
        GTE: recorded(gte),
        WRONG: recorded(wrong),
    }


def command(hub: Hub, values: dict[str, Any], folder: Path, *words: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, json.dumps(values), *words, "--results", str(folder / "results")],
        env={**kept, **hub.environment(folder / "home")},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def interrupted(hub: Hub, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Interrupt a run when its first result is there; return its folder, its exit code and its messages."""
    folder = tmp_path_factory.mktemp("run")
    process = command(hub, values, folder, *MODELS, "--progress")
    while process.poll() is None and not list((folder / "results").glob("google-bert*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=900)
    return folder, process.returncode, said


@pytest.fixture(scope="module")
def resumed(interrupted: Any, hub: Hub, values: dict[str, Any]) -> tuple[Path, int, dict[str, Any], str]:
    """Run the same command again; return the folder, the exit code, its JSON and its messages."""
    folder = interrupted[0]
    process = command(hub, values, folder, *MODELS, "--json", "--remove-downloads", "--progress")
    printed, said = process.communicate(timeout=900)
    return folder, process.returncode, json.loads(printed), said


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_results(interrupted):
    folder, code, said = interrupted
    assert code == 130 and "the same command goes on after them" in said, said
    assert read_results(folder / "results")[BERT][0].verdict == "verified"
    # Told before the work. The hub does not show two of the seven.
    assert (
        "5 to verify, 0 with a result already, 2 not to be had; downloads " in said and "disk needed at a time" in said
    )


@pytest.mark.slow
def test_the_next_run_goes_on_and_one_failure_does_not_stop_the_others(resumed, values):
    folder, code, printed, said = resumed
    results = {result["model"]: result for result in printed["results"]}
    assert list(results) == list(MODELS) and code == 1
    assert printed["counts"] == {"verified": 2, "differs": 1, "failed": 4}
    assert f"of 4: {BERT}" not in said and "1 with a result already" in said
    assert {result.model for found in read_results(folder / "results").values() for result in found} == set(MODELS)

    gte = results[GTE]
    assert gte["commit"] == PUBLISHED[GTE].revision == gte["revision"] and gte["verdict"] == "verified"
    (agreed,) = gte["expected"]
    assert agreed["passed"] and agreed["count"] == 9 and agreed["largest"] < 1e-4
    assert gte["parity"] and any(line.startswith("answers: passed") for line in gte["checks"])
    assert gte["machine"]["cpu"] and gte["versions"]["transformers"] == transformers.__version__

    wrong = results[WRONG]  # the same weights, of which one recorded value is wrong
    (found,) = wrong["expected"]
    assert wrong["verdict"] == "differs" and wrong["error"] is None
    assert not found["passed"] and found["largest"] == pytest.approx(0.01, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (INCOMPLETE, f"^CheckpointError: {INCOMPLETE} has no file with a vocabulary"),
        (GATED, "is gated on the hub: accept its terms"),
        (CHANGED, f"has no branch, tag or commit '{PUBLISHED[CHANGED].revision}'"),
        (MISSING, "the hub at .* shows no such model"),
    ],
)
def test_a_failed_model_says_why(resumed, model, said):
    (result,) = [result for result in resumed[2]["results"] if result["model"] == model]
    assert result["verdict"] == "failed" and not result["expected"]
    assert re.search(said, result["error"]), result["error"]


@pytest.mark.slow
def test_downloads_are_data_alone_and_are_removed(resumed, hub):
    folder = resumed[0]
    assert not (folder / "results" / "work").exists() and not list(folder.glob("results/**/*.safetensors"))
    got = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert any(request.endswith("model.safetensors") for request in got)
    assert not [request for request in got if request.endswith((".bin", ".py"))]


@pytest.mark.slow
def test_a_new_commit_is_verified_again(resumed, hub, values):
    folder = resumed[0]
    repository = hub.repositories[BERT]
    before = repository.refs["main"]
    repository.commit("main", {**repository.commits[before], "README.md": b"# A new card"})
    process = command(hub, values, folder, BERT, GTE, "--quiet")
    printed, said = process.communicate(timeout=900)
    assert process.returncode == 0 and not said, said
    assert "2 verified, 0 differs, 0 failed" in printed
    commit = read_results(folder / "results")[BERT][0].commit
    assert commit == repository.refs["main"] != before


# The rest needs no process.


def result(model: str = BERT, **known: Any) -> PublishedResult:
    fields: dict[str, Any] = {
        **{"model": model, "revision": None, "commit": "a" * 40, "target": "cpu", "precision": "fp32"},
        **{"verdict": "verified", "date": "2026-01-02T03:04:05+00:00", "versions": {}, "machine": {}},
        **known,
    }
    return PublishedResult(**fields)


def outcome(**known: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("largest", "bound", "found", "error"))
    return {"source": "S", "quantity": "logits", "passed": True, "count": 6, **empty, **known}


def test_a_result_is_read_as_it_was_written(tmp_path):
    written = result(expected=(outcome(largest=0.5, bound=0.1, passed=False), outcome()), checks=("answers: passed",))
    assert read_result(write_result(tmp_path, written)) == written and written.agreed == (6, 12)
    assert read_results(tmp_path) == {BERT: [written]} and read_results(tmp_path / "none") == {}
    other = result(precision="int8")
    write_result(tmp_path, other)
    assert read_results(tmp_path)[BERT] == [written, other]


@pytest.mark.parametrize("change", [{"format": 2}, {"verdict": "fine"}, {"more": 1}])
def test_a_file_of_another_kind_is_refused(tmp_path, change):
    file = write_result(tmp_path, result())
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=str(file)):
        read_results(tmp_path)


def test_the_summary_names_each_difference():
    wrong = outcome(passed=False, largest=0.0123, bound=0.001)
    text = summary([result(), result(GTE, verdict="differs", expected=(wrong,)), result(CHANGED, error="why\nhow")])
    assert "logits: differs by 0.012, bound 0.001; S" in text and "0 of 6 agree" in text
    assert "  why\n  how" in text and text.endswith("2 verified, 1 differs, 0 failed")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> verify.Found:
    """What a hub that has every model at one commit says."""
    found = verify.Found("a" * 40, {"model.safetensors": 1_000, "config.json": 10})
    monkeypatch.setattr(verify, "look_up", lambda entry: found)
    return found


@pytest.mark.parametrize(
    ("earlier", "is_kept"),
    [
        ({}, True),
        ({"verdict": "differs"}, True),
        ({"verdict": "failed"}, False),
        ({"commit": "b" * 40}, False),
        ({"expected": (outcome(source="an older table"),)}, False),
    ],
)
def test_a_result_is_kept_while_commit_and_values_are_the_same(tmp_path, found, earlier, is_kept):
    write_result(tmp_path, result(**earlier))
    options = verify.PublishedOptions(results=tmp_path)
    plan = verify.make_plan([published(BERT)], options, target="cpu", precision="fp32")
    assert (len(plan.kept), len(plan.todo)) == ((1, 0) if is_kept else (0, 1))
    assert plan.disk == (0 if is_kept else int(1010 * 3.2))
    forced = verify.PublishedOptions(results=tmp_path, force=True)
    assert len(verify.make_plan([published(BERT)], forced, target="cpu", precision="fp32").todo) == 1


def test_a_full_disk_is_told_before_a_download(tmp_path, found, monkeypatch):
    monkeypatch.setattr(verify, "_verify", lambda *a: pytest.fail("no work without room"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 5_000))
    both = [published(BERT), published(GTE)]
    lines: list[str] = []
    with pytest.raises(InputError, match=r"needs 0\.0 MB .* --remove-downloads"):
        verify.verify_published([*both, published(MISSING)], verify.PublishedOptions(results=tmp_path), lines.append)
    assert lines[0].startswith("3 to verify, 0 with a result already")
    room = verify.make_plan(both, verify.PublishedOptions(results=tmp_path), target="cpu", precision="fp32").disk
    alone = verify.PublishedOptions(results=tmp_path, remove_downloads=True)
    assert room - verify.make_plan(both, alone, target="cpu", precision="fp32").disk == 1010


def test_an_unreachable_hub_does_not_replace_a_result(tmp_path, monkeypatch):
    def unreachable(entry: Any) -> Any:
        raise verify.CheckpointError("no network")

    monkeypatch.setattr(verify, "look_up", unreachable)
    write_result(tmp_path, result())
    options = verify.PublishedOptions(results=tmp_path)
    found = verify.verify_published([published(BERT), published(GTE)], options)
    assert [each.verdict for each in found] == ["failed", "failed"]
    assert read_results(tmp_path)[BERT][0].verdict == "verified" and read_results(tmp_path)[GTE][0].verdict == "failed"


def test_values_are_not_judged_in_other_precisions(tmp_path, found, monkeypatch):
    """A value that differs makes an FP32 bundle "differs"; INT8 rounds more than the sources allow."""

    class Bundle:
        path = tmp_path
        parity = type("Parity", (), {"engines": (), "checks": ()})
        manifest = type("Manifest", (), {"files": {}})

    wrong = verify.Outcome("a test", "logits", False, 3, largest=1.0, bound=0.1)
    monkeypatch.setattr(verify.HubModel, "download", lambda self, patterns: tmp_path)
    monkeypatch.setattr(verify, "export", lambda *a, **k: Bundle())
    monkeypatch.setattr(verify, "_compare", lambda bundle, expected: ("onnx", [wrong]))
    for precision, verdict in (("fp32", "differs"), ("int8", "verified")):
        options = verify.PublishedOptions(results=tmp_path / precision, precision=precision)
        (got,) = verify.verify_published([published(BERT)], options)
        assert (got.verdict, got.agreed) == (verdict, (0, 3))


def test_a_checkpoint_without_a_tokenizer_gets_that_of_another(tmp_path, monkeypatch):
    sources = {"mosaicml/mosaic-bert-base": ["config.json", "model.safetensors"]}
    sources["google-bert/bert-base-uncased"] = ["tokenizer.json", "vocab.txt"]
    for name, files in sources.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text(name)
    monkeypatch.setattr(verify.HubModel, "download", lambda self, patterns: tmp_path / self.id)
    entry = published("mosaic-bert-base")
    for _ in range(2):  # also after an interruption
        folder = verify._download(entry, verify.Found("a" * 40, {}), None, tmp_path)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        file: name for name, files in sources.items() for file in files
    }


def test_two_runs_share_a_folder_of_results(tmp_path, found, monkeypatch):
    """Two runs at once: the end of one takes nothing from the other, and no model is verified twice."""
    both, done, works = threading.Barrier(2, timeout=30), threading.Event(), []

    def verified(entry: Any, _found: Any, work: Path, *rest: Any) -> PublishedResult:
        works.append((entry.id, work.name))
        (work / "download").write_text(entry.id)
        if len(works) < 3:
            both.wait()
            assert entry.id == BERT or done.wait(30)  # the other run has ended, and removed its work
        assert (work / "download").read_text() == entry.id
        return dataclasses.replace(result(), model=entry.id)

    monkeypatch.setattr(verify, "_verify", verified)
    monkeypatch.setattr(verify, "RECORDED", {})
    options = verify.PublishedOptions(results=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(verify.verify_published, [published(BERT)], options)
        first.add_done_callback(lambda future: done.set())
        second = pool.submit(verify.verify_published, [published(GTE), published(BERT), published(WRONG)], options)
        assert [each.model for each in first.result(60)] == [BERT]
        assert [each.model for each in second.result(60)] == [GTE, BERT, WRONG]
    assert sorted(name for name, _ in works) == sorted([BERT, GTE, WRONG])
    assert {folder for _, folder in works} == {"work", "work-2"}
    assert read_results(tmp_path).keys() == {BERT, GTE, WRONG}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3


def test_an_error_of_a_library_is_the_result_of_one_model(tmp_path, found, monkeypatch):
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("something in torch")

    monkeypatch.setattr(verify.HubModel, "download", lambda self, patterns: tmp_path)
    monkeypatch.setattr(verify, "export", broken)
    lines: list[str] = []
    options = verify.PublishedOptions(results=tmp_path / "results")
    results = verify.verify_published([published(BERT), published(GTE)], options, lines.append)
    assert [each.error for each in results] == ["RuntimeError of a library: something in torch"] * 2
    assert not (tmp_path / "results" / "work").exists()

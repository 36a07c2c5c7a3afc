"""The recorded choice of engine: found again for the same bundle and machine, never a reason to fail."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from gte_deploy.backends import picks
from gte_deploy.backends.picks import Pick
from gte_deploy.backends.stream_plan import ListPick

CHECKSUM = "a" * 64
PICK = Pick(
    backend="onnx",
    precision=None,
    measured={"onnx fp32": {"1x16": 0.001}},
    date="2026-11-23T10:00:00+00:00",
    versions={"onnxruntime": "1.32.0"},
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gte-deploy"


def test_a_pick_is_found_again(cache, caplog):
    assert picks.lookup(CHECKSUM) is None
    file = picks.save(CHECKSUM, PICK)
    assert picks.lookup(CHECKSUM) == PICK
    assert file.is_relative_to(cache) and file.stat().st_mode & 0o777 == 0o644
    assert picks.lookup("b" * 64) is None
    assert not caplog.records


def test_a_later_pick_replaces_it():
    file = picks.save(CHECKSUM, Pick("openvino", "bf16", {}, PICK.date, {}))
    assert picks.save(CHECKSUM, PICK) == file
    assert picks.lookup(CHECKSUM) == PICK
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_model", "another CPU"), ("available_cpus", 64), ("engine_versions", {"onnxruntime": "99"})],
)
def test_another_machine_or_engine_has_no_pick(monkeypatch, caplog, name, value):
    picks.save(CHECKSUM, PICK)
    monkeypatch.setattr(picks, name, lambda: value)
    assert picks.lookup(CHECKSUM) is None
    assert not caplog.records


def test_lists_are_recorded_too_and_older_files_have_none():
    pick = dataclasses.replace(PICK, lists=ListPick(streams=4, batch_tokens=512))
    file = picks.save(CHECKSUM, pick)
    assert picks.lookup(CHECKSUM) == pick
    content = json.loads(file.read_bytes())
    del content["pick"]["lists"]
    file.write_text(json.dumps(content))
    assert picks.lookup(CHECKSUM) == PICK


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\xff not JSON",
        lambda content: b"[" * 100_000,
        lambda content: b"null",
        lambda content: b" " * (2 << 20),
        lambda content: json.dumps({**content, "format": "another"}).encode(),
        lambda content: json.dumps({**content, "key": {}}).encode(),
        lambda content: json.dumps({**content, "pick": {}}).encode(),
        lambda content: json.dumps({**content, "pick": {**content["pick"], "backend": 7}}).encode(),
        lambda content: json.dumps({**content, "pick": {**content["pick"], "more": 1}}).encode(),
        lambda content: json.dumps({**content, "pick": {**content["pick"], "lists": [2]}}).encode(),
        lambda content: json.dumps({**content, "pick": {**content["pick"], "lists": {"streams": 2}}}).encode(),
        lambda content: json.dumps(
            {**content, "pick": {**content["pick"], "lists": {"streams": -2, "batch_tokens": 1}}}
        ).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning(caplog, damage):
    file = picks.save(CHECKSUM, PICK)
    file.write_bytes(damage(json.loads(file.read_bytes())))
    with caplog.at_level(logging.WARNING):
        assert picks.lookup(CHECKSUM) is None
    assert "ignoring a recorded pick" in caplog.text
    picks.save(CHECKSUM, PICK)
    assert picks.lookup(CHECKSUM) == PICK


def test_a_folder_in_the_files_place_is_ignored_with_a_warning(caplog):
    file = picks.save(CHECKSUM, PICK)
    file.unlink()
    file.mkdir()
    assert picks.lookup(CHECKSUM) is None
    assert "ignoring a recorded pick" in caplog.text


def test_the_cache_is_in_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert picks.save(CHECKSUM, PICK).is_relative_to(tmp_path / "home" / ".cache" / "gte-deploy")


def test_a_user_without_a_home_has_no_pick(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    assert picks.lookup(CHECKSUM) is None
    assert [record for record in caplog.records if record.name.startswith("gte_deploy")] == []
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        picks.save(CHECKSUM, PICK)


def test_versions_and_cpu_are_told_without_importing_an_engine():
    script = (
        "import sys; from gte_deploy.backends import picks; print(picks.engine_versions(), picks.cpu_model())\n"
        "assert not {'onnxruntime', 'openvino', 'numpy', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "'gte-deploy'" in done.stdout and "'onnxruntime'" in done.stdout

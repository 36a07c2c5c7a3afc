"""The clock goes back or ahead by years: durations are of the monotonic clock, and nothing that is kept is lost."""

import ast
import json
import random
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

import gte_deploy
from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.core.locks import try_lock
from http_server import ServerProcess
from runtime_models import make_texts

ROOT = Path(__file__).resolve().parents[2]
SLOW_SERVER = ROOT / "tests" / "serving" / "slow_server.py"
YEAR = 31_557_600
# What may ask the clock for the date: stamps for people, from which nothing is computed.
STAMPS = {"gte_deploy/serving/registry.py", "gte_deploy/serving/facts.py"}
# Before a server starts: each look at the clock is some years off, to both sides.
JUMPING = """
import random, time
_now, _random = time.time, random.Random(0)
time.time = lambda: _now() + _random.choice([-30, -1, 0, 1, 30]) * 31_557_600
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is some years off, to both sides."""
    now, rng = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: now() + rng.choice([-30, -1, 0, 1, 30]) * YEAR)


def test_no_duration_is_computed_from_the_clock():
    """`time.time` is called where it is a stamp alone."""
    found = set()
    for folder in ("gte_deploy", "models", "training", "exporters"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("time", "time_ns"):
                    if isinstance(node.value, ast.Name) and node.value.id == "time":
                        found.add(file.resolve().relative_to(ROOT).as_posix())
    assert found == STAMPS


def test_a_run_over_files(clock, bundle_of, word_checkpoints, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(make_texts(60, seed=4)))
    states = []
    with gte_deploy.load(bundle_of(word_checkpoints["embed"]), num_threads=1) as model:
        options = BulkOptions(shard_rows=10)
        begun = time.monotonic()
        summary = encode_files(
            tmp_path / "in.txt", tmp_path / "out.npy", model=model, options=options, report=states.append
        )
        assert 0 <= summary.seconds <= time.monotonic() - begun + 0.001  # it is rounded
        found = model.encode((tmp_path / "in.txt").read_text().split("\n"))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), found, atol=1e-5)
    for state in states:
        assert state.seconds >= 0 and state.rows_per_second >= 0
        assert state.seconds_left is None or 0 <= state.seconds_left < 3600


def test_a_run_goes_on_years_before_it_began(bundle_of, word_checkpoints, tmp_path, monkeypatch):
    """The files of the cache and the parts have times; only those of the input tell it from another one."""
    from gte_deploy.bulk.parts import PartsFolder

    (tmp_path / "in.txt").write_text("\n".join(make_texts(60, seed=4)))
    write, options = PartsFolder.write, BulkOptions(shard_rows=10)

    def interrupted(self, shard, *rest):
        if shard.cursor.number == 3:
            raise KeyboardInterrupt
        return write(self, shard, *rest)

    with gte_deploy.load(bundle_of(word_checkpoints["embed"]), num_threads=1) as model:
        monkeypatch.setattr(PartsFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=model, options=options)
        monkeypatch.undo()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 40 * YEAR)
        summary = encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=model, options=options)
    assert summary.resumed_rows == 30 and summary.rows == 60 and 0 <= summary.seconds < 600


def test_locks(clock, tmp_path):
    release = try_lock(tmp_path / "lock")
    assert release is not None
    for _ in range(20):
        assert try_lock(tmp_path / "lock") is None, "a lock that looks old is held all the same"
    release()
    again = try_lock(tmp_path / "lock")
    assert again is not None
    again()


def test_joined_calls_and_their_deadlines(clock, bundle_of, word_checkpoints):
    from gte_deploy.core.calls import Call
    from gte_deploy.core.errors import DeadlineError

    with gte_deploy.load(bundle_of(word_checkpoints["embed"]), num_threads=1, join_calls=True) as model:
        expected = model.encode("a king")
        for _ in range(10):
            with Call(deadline=time.monotonic() + 60):
                np.testing.assert_allclose(model.encode("a king"), expected, atol=1e-6)
        with Call(deadline=time.monotonic() - 0.001), pytest.raises(DeadlineError):
            model.encode("a king")


@pytest.fixture
def slow(tmp_path):
    """A server whose clock jumps, and whose model takes 0.1 s for each text."""
    script = tmp_path / "server.py"
    text = SLOW_SERVER.read_text(encoding="utf-8")
    script.write_text(text.replace("import logging\n", f"import logging\n{JUMPING}\n", 1), encoding="utf-8")
    server = ServerProcess([str(script), "0.1", "timeout=2.0", "drain_seconds=1"], cwd=tmp_path)
    server.wait_until_ready()
    yield server
    server.kill()


def test_deadlines_of_a_server(slow):
    with httpx.Client(base_url=slow.url, timeout=30) as client:
        for _ in range(5):
            answer = client.post("/embed", json={"inputs": "a"}, headers={"X-Request-Timeout": "20"})
            assert answer.status_code == 200
        begun = time.monotonic()
        assert client.post("/embed", json={"inputs": ["a"] * 200}).status_code == 504
        assert 1.5 < time.monotonic() - begun < 15
        lines = client.get("/metrics").text.splitlines()
    sums = [float(line.split()[-1]) for line in lines if "_seconds_sum" in line]
    assert len(sums) > 1 and all(0 <= seconds < 600 for seconds in sums), sums
    assert slow.end(seconds=30) == 0 and "Traceback" not in slow.log


def test_an_export_is_stamped_and_no_more(clock, tmp_path):
    from gte_deploy.bundle.manifest import GraphEntry, Manifest, open_bundle
    from gte_deploy.core.spec import ModelSpec
    from gte_deploy.exporters.bundle import writer

    spec = ModelSpec(task="embed", max_length=64, vocab_size=256, hidden_size=32, pad_token_id=0)
    checksums = set()
    for _ in range(3):
        with writer.staging(tmp_path / "bundle", force=True) as folder:
            (folder / "onnx").mkdir()
            (folder / "onnx/model.onnx").write_bytes(b"\x12\x01m")
            graphs = {"onnxruntime": GraphEntry("onnx/model.onnx", 20, (), (), {})}
            writer.seal(folder, Manifest(spec, "fp32", graphs, files={}, versions={}, source={}))
            writer.publish(folder, tmp_path / "bundle", force=True)
        open_bundle(tmp_path / "bundle")
        checksums.add(json.loads((tmp_path / "bundle" / "manifest.json").read_text())["checksum"])
    assert len(checksums) == 1

"""Two exports to one target at once: the bundle is wholly that of one, and the other has written its own or is refused.

With --force each replaces what it finds, so the last one stays. Without, the first one stays, and the other is refused.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest

from fork_server import ForkServer
from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.core.exit_codes import EXISTS, FAILURE, OK

RACES = pytest.mark.parametrize("races", [10, pytest.param(100, marks=pytest.mark.slow)])
# Both begin when the file `go` is there, and keep writing for a while, so that their steps meet in many orders.
SERVER = """
import os, random, sys, time, traceback
from pathlib import Path
from fork_server import serve
from gte_deploy.bundle.manifest import GraphEntry, Manifest
from gte_deploy.core.errors import OutputExistsError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.bundle import writer

def work(target, mark, force, go, exchange):
    target, rng = Path(target), random.Random(mark)
    if not exchange:
        writer._exchange = lambda first, second: False
    spec = ModelSpec(task="embed", max_length=64, vocab_size=256, hidden_size=32, pad_token_id=0)
    while not os.path.exists(go):
        time.sleep(0.0002)
    try:
        with writer.staging(target, force=force) as folder:
            (folder / "onnx").mkdir()
            (folder / "onnx/model.onnx").write_bytes(b"\\x12" + bytes([len(mark)]) + mark.encode())  # producer_name
            for number in range(3):
                (folder / f"{mark}-{number}").write_text(mark)
            time.sleep(rng.random() / 200)
            graphs = {"onnxruntime": GraphEntry("onnx/model.onnx", 20, (), (), {})}
            writer.seal(folder, Manifest(spec, "fp32", graphs, files={}, versions={}, source={"name": mark}))
            writer.publish(folder, target, force=force)
    except OutputExistsError:
        return int(sys.argv[1])
    except OSError:
        traceback.print_exc()
        return int(sys.argv[2])

serve(work)
"""


@pytest.fixture(scope="module")
def writers():
    both = ForkServer(SERVER, EXISTS, FAILURE), ForkServer(SERVER, EXISTS, FAILURE)
    yield both
    for server in both:
        server.close()


def race(writers, tmp_path, number, **options):
    """Both write at once; returns their exit codes, and whose bundle is there."""
    target, go = tmp_path / "bundle", tmp_path / f"go-{number}"
    marks = [f"{side}{number}" for side in "ab"]
    for server, mark in zip(writers, marks, strict=True):
        server.start(target=target, mark=mark, go=go, **options)
    go.touch()
    codes = [int(server.read()) for server in writers]
    go.unlink()
    name = open_bundle(target).source["name"]
    files = {path.name for path in target.iterdir() if path.is_file()}
    assert files == {"manifest.json", *(f"{name}-{count}" for count in range(3))}, "no file of the other"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "and nothing beside it"
    return dict(zip(marks, codes, strict=True)), name


@RACES
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename"])
def test_with_force_one_of_them_stays(writers, tmp_path, exchange, races, attempts):
    attempts("two exports to one target at once", races)
    outcomes = Counter()
    for number in range(races):
        codes, name = race(writers, tmp_path, number, force=True, exchange=exchange)
        assert codes[name] == OK, "what is there was reported as written"
        outcomes[tuple(sorted(codes.values()))] += 1
    assert set(outcomes) <= {(OK, OK), (OK, EXISTS), (OK, FAILURE)} and outcomes[OK, OK] > 0, outcomes
    if exchange:
        assert outcomes[OK, FAILURE] == 0, outcomes


@RACES
def test_without_force_the_first_one_stays(writers, tmp_path, races, attempts):
    attempts("two exports to one target at once", 2 * races)
    for number in range(races):
        codes, name = race(writers, tmp_path, number, force=False, exchange=True)
        assert sorted(codes.values()) == [OK, EXISTS] and codes[name] == OK, codes
        again, kept = race(writers, tmp_path, number + 1000, force=False, exchange=True)
        assert set(again.values()) == {EXISTS} and kept == name
        for path in sorted((tmp_path / "bundle").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "bundle").rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_two_real_exports(force, tmp_path):
    command = [sys.executable, "-m", "gte_deploy.exporters.cli", "-o", "bundle", "--max-length", "64", "--quiet"]
    command += ["--force"] if force else []
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "here").mkdir()
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path / "here", env=environment, **streams) for _ in range(2)]
    errors = [process.communicate(timeout=550)[1] for process in both]
    assert "Traceback" not in "".join(errors), errors
    codes = sorted(process.returncode for process in both)
    assert codes in ([[OK, OK], [OK, EXISTS]] if force else [[OK, EXISTS]]), (codes, errors)
    open_bundle(tmp_path / "here" / "bundle")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["bundle"]

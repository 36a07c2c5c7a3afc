"""The wheel in every Python that it names and that is here, as pip installs it: 3.10 has an older ONNX Runtime."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gte_deploy
from packages import build, packaged_tree

pytestmark = pytest.mark.consumers

MINORS = (10, 11, 12, 13, 14)
TEXT = "The president of the united [MASK] of America."


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", packaged_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel"))


def _interpreter(minor: int) -> str:
    found = shutil.which(f"python3.{minor}")
    # A version manager may have a command for a version that it does not have.
    if found is None or subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"Python 3.{minor} is not installed")
    return found


@pytest.mark.parametrize("minor", MINORS)
def test_the_runtime_answers(wheel, tmp_path, minor):
    environment = tmp_path / "environment"
    subprocess.run([_interpreter(minor), "-m", "venv", environment], check=True, timeout=300)
    binaries = environment / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"]
    subprocess.run(pip, check=True, capture_output=True, timeout=900)

    def run(*arguments: str) -> str:
        command = [binaries / "python", "-I", "-m", "gte_deploy", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=300).stdout

    answers, vector = (json.loads(run(*command)) for command in (["fill-mask", TEXT, "--json"], ["encode", "a text"]))
    with gte_deploy.load(backend="onnx") as here:
        assert [one["token"] for one in answers] == [one["token"] for one in here.fill_mask(TEXT)]
        assert vector == pytest.approx(here.encode("a text").tolist(), abs=1e-5)
    assert "all as the manifest says" in run("verify", "gte-en-mlm-tiny")

"""The first minute of somebody new: a wheel, ONNX Runtime, one command in an empty folder; no torch, no network."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from environments import Unavailable, interpreter
from packages import build, packaged_tree

NOBODY = 65534
WHEEL_LIMIT = 37_000_000  # 25 MB without the embedding model
SENTENCE = "The [MASK] sat."
OFFLINE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", packaged_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel) -> Iterator[Path]:
    """The folder that pip installed the wheel to. Every user can read it; pytest's own folders are for one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "packages"]
        subprocess.run([*command, wheel], check=True, capture_output=True, timeout=300)
        yield folder / "packages"


@pytest.fixture(scope="module")
def light() -> Path:
    try:
        return interpreter("light")  # ONNX Runtime without torch
    except Unavailable as reason:
        pytest.skip(str(reason))


def run(python: Path, installed: Path, *arguments: str, cwd: Path, more: str = "", **options) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": f"{installed}{more}", **OFFLINE}
    command = [str(python), "-B", "-m", "gte_deploy", *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False, **options
    )
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    return ended.stdout


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size <= WHEEL_LIMIT


def test_the_first_command_answers_in_an_empty_folder(light, installed, tmp_path):
    out = run(light, installed, "fill-mask", SENTENCE, cwd=tmp_path)
    assert out.splitlines()[0] == SENTENCE and len(out.splitlines()) == 6
    assert list(tmp_path.iterdir()) == [], "nothing is written to the home folder, which is this one"
    answers = json.loads(run(light, installed, "fill-mask", "--json", "The united [MASK] of America.", cwd=tmp_path))
    assert answers[0]["token_str"] == "states"
    code = "import sys, gte_deploy; gte_deploy.load().encode('a'); assert 'torch' not in sys.modules"
    subprocess.run([light, "-c", code], env={"PYTHONPATH": str(installed)}, cwd=tmp_path, check=True, timeout=300)


def test_another_user_whose_home_is_read_only_gets_the_answer(light, installed, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can run a command as another user")
    empty = installed.parent / "home"
    empty.mkdir(mode=0o555)
    # The interpreter of the environment may be a link into a folder of root's.
    python, more = next((choice for choice in _interpreters(light) if _may_run(choice[0])), (None, ""))
    if python is None:
        pytest.skip("no other user may run this Python")
    out = run(
        python, installed, "fill-mask", SENTENCE, cwd=empty, more=more, user=NOBODY, group=NOBODY, extra_groups=[]
    )
    assert len(out.splitlines()) == 6


def _interpreters(light: Path) -> list[tuple[Path, str]]:
    (packages,) = light.parent.parent.glob("lib/python*/site-packages")
    system = shutil.which(packages.parent.name, path="/usr/bin:/bin")
    return [(light, ""), *([(Path(system), f"{os.pathsep}{packages}")] if system else [])]


def _may_run(python: Path) -> bool:
    try:
        return subprocess.run([python, "-c", ""], user=NOBODY, cwd="/", check=False, timeout=60).returncode == 0
    except PermissionError:
        return False

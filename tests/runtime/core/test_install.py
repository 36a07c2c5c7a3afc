"""The command that a message gives works from where the package came from: pip itself installs by it."""

import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gte_deploy import MissingDependencyError
from gte_deploy.core import install
from gte_deploy.core.install import install_command

ROOT = Path(__file__).resolve().parents[3]
REQUIRES = [
    "numpy>=1.26",
    'onnxruntime>=1.31; python_version >= "3.11" and extra == "cpu"',
    'onnxruntime>=1.23; python_version < "3.11" and extra == "cpu"',
    'gte-deploy[cpu]; extra == "export"',
    'onnx>=1.22; extra == "export"',
]


class Distribution:
    def __init__(self, origin):
        self.origin, self.requires = origin, REQUIRES

    def read_text(self, name):
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """`installed(origin)` makes the package one that was installed from there."""

    def make(origin):
        monkeypatch.setattr(install, "_PACKAGE", tmp_path / "site-packages" / "gte_deploy")
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution(origin))

    return make


def arguments(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("install") + 1 :]


def test_a_checkout_is_installed_from_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert arguments(install_command("cpu")) == ["--editable", f"{ROOT}[cpu]"]
    monkeypatch.chdir(ROOT)
    assert arguments(install_command("export,rtx", "a==1")) == ["--editable", ".[export,rtx]", "a==1"]
    assert str(MissingDependencyError("onnxruntime", "cpu")).endswith(f"this needs it: {install_command('cpu')}")


def test_a_wheel_is_installed_from_its_file(installed, tmp_path):
    wheel = tmp_path / "a folder" / "gte_deploy-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert arguments(install_command("cpu")) == [f"{wheel}[cpu]"]


def test_without_the_file_the_packages_of_the_extra_are_named(installed, tmp_path):
    installed({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}})
    for extra, names in (("cpu", ["onnxruntime"] * 2), ("export", ["onnxruntime", "onnxruntime", "onnx"])):
        found = [Requirement(argument) for argument in arguments(install_command(extra))]
        assert [one.name for one in found] == names
        applies = [one.marker is None or one.marker.evaluate({"python_version": "3.10"}) for one in found]
        assert applies.count(False) == 1, "one onnxruntime is for other versions of Python"


def test_a_repository_and_an_index_are_named(installed):
    installed({"url": "https://host.example/g.git", "vcs_info": {"vcs": "git", "commit_id": "0"}})
    assert arguments(install_command("cpu")) == ["gte-deploy[cpu] @ git+https://host.example/g.git"]
    installed(None)
    assert arguments(install_command("cpu")) == ["gte-deploy[cpu]"]


def test_pip_is_the_one_of_this_python(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install_command("cpu").startswith("pip install ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_command("cpu").startswith(f"{sys.executable} -m pip install ")
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install_command("cpu").startswith(f"uv pip install --python {sys.executable} ")


def test_pip_understands_the_command():
    command = [*shlex.split(install_command("cpu")), "--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
    if command[0] == "pip":
        command = [sys.executable, "-m", *command]
    ended = subprocess.run([*command, "--no-index"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr

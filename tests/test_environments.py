"""The environments of other libraries: made once, and what could not be made keeps its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import javascript
from environments import Unavailable, interpreter, make, requirements_of, versions


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    python = make("empty", ["pip"], folder=tmp_path)
    made = python.lstat().st_mtime_ns
    assert make("empty", ["pip"], folder=tmp_path) == python == interpreter("empty", folder=tmp_path)
    assert python.lstat().st_mtime_ns == made
    assert list(versions("empty", ["pip", "torch"], folder=tmp_path)) == ["pip"]
    make("empty", ["pip>=20"], folder=tmp_path)  # other requirements
    assert python.lstat().st_mtime_ns != made


def test_an_environment_that_pip_cannot_make_has_pips_reason(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"python tests/support/environments.py one"):
        interpreter("one", folder=tmp_path)
    for _ in range(2):  # nothing is kept that looks whole
        with pytest.raises(Unavailable, match="ERROR: .*(No such file|Invalid requirement|does not exist)"):
            make("one", ["./no-such-package"], folder=tmp_path)
    with pytest.raises(Unavailable, match="pip could not install it: ERROR"):
        interpreter("one", folder=tmp_path)
    assert versions("one", ["pip"], folder=tmp_path) == {}


def test_torch_has_the_version_of_this_environment() -> None:
    torch = pytest.importorskip("torch")
    (requirement,) = set(requirements_of("onnx")) - {"sentence-transformers[onnx]"}
    assert requirement == f"torch=={torch.__version__.partition('+')[0]}"


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_packages_that_npm_cannot_install_have_npms_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package.json").write_text('{"dependencies": {"one": "file:./missing"}}')
    (tmp_path / "package-lock.json").write_text('{"lockfileVersion": 3, "packages": {}}')  # lacks the package
    monkeypatch.setattr(javascript, "SOURCES", tmp_path)
    monkeypatch.setattr(javascript, "ENVIRONMENT", tmp_path / "installed")
    with pytest.raises(Unavailable, match=r"python tests/support/javascript.py"):
        javascript.installed()
    with pytest.raises(Unavailable, match="npm error .*lock file"):
        javascript.install()
    with pytest.raises(Unavailable, match="npm could not install the packages: npm error"):
        javascript.installed()


def test_the_packages_of_javascript_have_the_documented_versions_and_no_addresses() -> None:
    packages = json.loads((javascript.SOURCES / "package.json").read_text(encoding="utf-8"))["dependencies"]
    page = (javascript.SOURCES.parents[2] / "docs" / "runtimes.md").read_text(encoding="utf-8").replace("\n", " ")
    for name, version in packages.items():
        # An alias names the real package after "npm:".
        name, _, version = f"{name}@{version}".rpartition("npm:")[2].rpartition("@")
        assert name in ("axe-core", "playwright-core") or f"`{name}` {version}" in page  # two are tools of the tests
    assert '"resolved"' not in (javascript.SOURCES / "package-lock.json").read_text(encoding="utf-8")

"""The download of packages by the scripts of the built-in models: what fails is tried again, named, and left out."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from loading import load_file

archives = load_file(Path(__file__).resolve().parents[2] / "tools" / "package_archives.py", "package_archives")
Package = archives.Package


@pytest.fixture
def apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`apt_get(script)` puts a command of that name before all others; the log of its calls is in calls.txt."""

    def make(script: str) -> Path:
        command = tmp_path / "bin" / "apt-get"
        command.parent.mkdir(exist_ok=True)
        calls = tmp_path / "calls.txt"
        command.write_text(f'#!/bin/sh\necho "$2" >> {calls}\n{script}\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
        return calls

    return make


def test_a_failed_fetch_is_tried_again_and_told_with_its_reason(tmp_path: Path, apt_get) -> None:
    calls = apt_get(
        'case "$2" in\n'
        'bad) echo "half" > bad_1_all.deb; echo "E: cannot authenticate bad" >&2; exit 100;;\n'
        f'shaky) [ "$(grep -c shaky {tmp_path}/calls.txt)" -gt 1 ] || exit 7;;\n'
        "esac\n"
        'echo "$2" > "$2_1_all.deb"'.replace("$2_", "${2}_")
    )
    folder = tmp_path / "packages"
    wanted = [Package("bad", "debian"), Package("shaky", "debian"), Package("good", "debian")]
    found, missing = archives.fetch_packages(wanted, folder, pauses=(0.0, 0.0))
    assert calls.read_text().split() == ["bad"] * 3 + ["shaky"] * 2 + ["good"]
    assert {name: path.read_text() for name, path in found.items()} == {"shaky": "shaky\n", "good": "good\n"}
    assert missing == [archives.Missing(wanted[0], "E: cannot authenticate bad")]
    assert sorted(path.name for path in folder.iterdir()) == ["good_1_all.deb", "shaky_1_all.deb"]
    message = archives.explain_missing(missing, folder)
    assert (
        "1 package(s)" in message and "bad (debian): E: cannot authenticate bad" in message and str(folder) in message
    )

    # A second call fetches only the rest.
    calls = apt_get('echo "$2" > "${2}_1_all.deb"')
    calls.write_text("")
    found, missing = archives.fetch_packages(wanted, folder, pauses=())
    assert calls.read_text().split() == ["bad"] and not missing and set(found) == {"bad", "shaky", "good"}


def test_a_command_that_says_or_leaves_nothing_is_no_success(tmp_path: Path, apt_get) -> None:
    apt_get('[ "$2" = silent ] && exit 5\nexit 0')
    wanted = [Package("silent", "debian"), Package("empty", "debian")]
    found, (silent, empty) = archives.fetch_packages(wanted, tmp_path / "packages", pauses=())
    assert not found
    assert silent.reason == "apt-get ended with exit code 5"
    assert empty.reason == "`apt-get download empty` succeeded, but left no archive of that name"


def test_a_missing_package_manager_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    _, (missing,) = archives.fetch_packages([Package("any", "debian")], tmp_path / "packages", pauses=())
    assert "apt-get" in missing.reason


def test_members_of_wheels_and_source_distributions_come_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.mkdir("a")
        wheel.writestr("a/two", "2")
        wheel.writestr("a/one", "1")
    with tarfile.open(tmp_path / "b-1.tar.gz", "w:gz") as tar:
        for name in ("b/two", "b/one"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    assert list(archives.read_members(tmp_path / "a-1-py3-none-any.whl")) == [("a/one", b"1"), ("a/two", b"2")]
    assert [name for name, _ in archives.read_members(tmp_path / "b-1.tar.gz")] == ["b/one", "b/two"]

"""The emulated machine itself: what is refused without it, and how its log of instructions is read."""

from __future__ import annotations

from pathlib import Path

import pytest

import arm64

LOG = """----------------
IN: Py_InitializeFromConfig
0x550081be40:  d503201f  nop
0x550081be44:  6fa6e294  .byte    0x94, 0xe2, 0xa6, 0x6f

OBJD-T: 0e20c000
"""


def test_a_machine_that_is_not_set_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(arm64.Unavailable, match="make test-arm64"):
        arm64.installed(tmp_path)


def test_a_machine_of_other_versions_or_without_qemu_is_set_up_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    (tmp_path / "done").write_text(arm64._stamp())
    with pytest.raises(arm64.Unavailable):
        arm64.installed(tmp_path)
    (tmp_path / "qemu-aarch64-static").touch()
    assert arm64.installed(tmp_path) == tmp_path
    (tmp_path / "done").write_text(arm64._stamp().replace("numpy==", "numpy==0."))
    with pytest.raises(arm64.Unavailable):
        arm64.installed(tmp_path)


def test_without_apt_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(arm64.Unavailable, match="apt-get is missing here"):
        arm64.install(tmp_path / "arm64")
    with pytest.raises(arm64.Unavailable, match="not set up"):
        arm64.installed(tmp_path / "arm64")


def test_a_failed_download_is_named_and_leaves_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"dpkg": "echo amd64", "dpkg-deb": "true", "apt-get": "echo no network >&2; exit 100"}
    for name, command in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(arm64.Unavailable, match=r"apt-get failed \(100\): no network"):
        arm64.install(tmp_path / "arm64")
    with pytest.raises(arm64.Unavailable, match="not set up"):
        arm64.installed(tmp_path / "arm64")


def test_instructions_are_found_by_their_opcode(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    products = {name: arm64.reaches(log, *cpu.int8_products) for name, cpu in arm64.CPUS.items()}
    assert {name for name, found in products.items() if found} == {"raspberry-pi-5", "graviton-2"}

"""A disk with little room, or that is read only: a tmpfs, which root can mount."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = 4096  # bytes; a tmpfs counts in these
_MANY = 1 << 16


class SmallDisk:
    """A mounted tmpfs. Without a call it has room for 256 MB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, *, pages: int = _MANY, files: int = _MANY) -> None:
        """Leave room for so many more pages and files."""
        found = os.statvfs(self.folder)
        size = (found.f_blocks - found.f_bfree + pages) * PAGE
        # Of no pages or files at all, a tmpfs would have no bound.
        self._remount(f"rw,size={max(PAGE, size)},nr_inodes={found.f_files - found.f_ffree + files}")

    def be_read_only(self) -> None:
        """Refuse every write, root's too."""
        self._remount("ro")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[SmallDisk]:
    """Mount a disk over an empty folder; skip the test where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={_MANY * PAGE}", "tmpfs", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small disk: there is no `mount`")
    if done.returncode:
        pytest.skip(f"a small disk: only root mounts one ({done.stderr.strip()})")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)

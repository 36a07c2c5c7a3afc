"""/dev/null under another name, so that a test that fails costs the machine nothing."""

import os
import stat
from pathlib import Path

import pytest


def make_null_device(path: Path) -> Path:
    """Make the device at `path`, and return the path; skips the test by name where that is not allowed."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        path.open("wb").close()
    except OSError as error:
        pytest.skip(f"needs root, and a container that makes and opens devices: {error}")
    return path

"""The installer of `make`: what it shows while pip works, and what it says when pip fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loading import load_file

ROOT = Path(__file__).resolve().parents[2]
PIP = """\
WARNING: Location 'file:///a/' is ignored: it is neither a file nor a directory.
Collecting numpy>=1.26 (from gte-deploy==0.1.0)
  Downloading numpy-2.4.6-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl (16.8 MB)
Collecting torch
  Using cached torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (0.5 GB)
Collecting tqdm
  Downloading tqdm-4.67.1-py3-none-any.whl.metadata (57 kB)
Installing collected packages: numpy, torch, tqdm
Successfully installed numpy-2.4.6 torch-2.13.0 tqdm-4.67.1
"""


@pytest.fixture
def tool(tmp_path):
    module = load_file(ROOT / "tools" / "install.py", "install")
    module.LOG = tmp_path / "install.log"
    return module


def test_it_counts_packages_and_megabytes(tool):
    shown = list(tool.progress(PIP.splitlines(keepends=True)))
    assert shown[0] == "0 packages, 0 MB, looking up packages"
    assert shown[4] == "2 packages, 517 MB, looking up packages"
    assert shown[-1] == "3 packages, 517 MB, done"


def test_nothing_of_pip_is_shown_but_its_failure(tool, capfd):
    package = str(ROOT / "tests")  # a folder that is no package
    assert tool.main("nothing", package) != 0
    said = capfd.readouterr()
    assert said.out == "" and "pyproject.toml' found" in said.err
    assert said.err.endswith(f"pip could not install {package}\n")


def test_make_says_what_it_will_install():
    environment = {**os.environ, "MAKEFLAGS": ""}
    said = subprocess.run(
        ["make", "--dry-run", f"PYTHON={sys.executable}", "VENV=/nowhere/.venv", "test"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=60,
    ).stdout
    assert "tools/install.py" in said and "GB" in said and "'.[dev]'" in said

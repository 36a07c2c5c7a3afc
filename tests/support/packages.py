"""Builds the project's distributions, for the tests of what is packaged."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "gte_deploy": "gte_deploy",
    "exporters": "gte_deploy.exporters",
    "models": "gte_deploy.models",
    "training": "gte_deploy.training",
}
"""The folders of the tree that are packaged -> the packages that they become."""


def packaged_tree(copy: Path) -> Path:
    """Copy what is packaged to a folder, apart from what earlier builds left beside it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "optimum", copy / "optimum", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a "wheel" or an "sdist" of a tree without a network, and return it."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    # The tag of a wheel without compiled code: one file for every system.
    (built,) = out.glob("*-py3-none-any.whl" if kind == "wheel" else "*.tar.gz")
    return built

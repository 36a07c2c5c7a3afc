"""Parsers of data of strangers take any bytes: they refuse them with a message, and nothing else is raised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import environments
from battery import Attempts
from loading import load_file

FOLDER = Path(__file__).with_name("fuzz")
# What atheris found, as few files as reach all that it reached; and inputs that once broke a parser, named after them.
CORPUS = Path(__file__).with_name("corpus") / "fuzz"
targets = load_file(FOLDER / "targets.py", "fuzz_targets")


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus(name: str, attempts: Attempts) -> None:
    files, refused = sorted((CORPUS / name).iterdir()), 0
    for file in files:
        try:
            targets.TARGETS[name](file.read_bytes())
        except targets.Refused:
            refused += 1
    assert 0 < refused < len(files), "a corpus has what is accepted, and what is not"
    attempts(f"files of the corpus of the parser: {name}", len(files))


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_minute_of_atheris(name: str, tmp_path: Path, attempts: Attempts) -> None:
    """Coverage-guided, from the corpus on. A file `crash-...` belongs into the corpus, under a name that says why."""
    try:
        python = environments.interpreter("fuzz")
    except environments.Unavailable as error:
        pytest.skip(f"atheris: {error}")
    corpus = shutil.copytree(CORPUS / name, tmp_path / "corpus")
    limits = ("-max_total_time=60", "-max_len=8192", "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [python, FOLDER / "run.py", name, corpus, *limits, f"-artifact_prefix={tmp_path}/"],
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (units,) = re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    attempts(f"inputs that atheris made for the parser: {name}", int(units))

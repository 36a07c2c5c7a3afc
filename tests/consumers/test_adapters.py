"""The tests of the adapters run where the frameworks are: tests/integrations, in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from environments import Unavailable, interpreter

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.consumers
def test_adapters_pass_with_the_real_frameworks() -> None:
    try:
        python = interpreter("adapters")
    except Unavailable as error:
        pytest.skip(f"adapters of frameworks: {error}")
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/integrations"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout[-2000:]

"""The counts of the reliability battery, and the page that is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loading import load_file

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "[pytest]\npythonpath = {support}\naddopts = --strict-markers\n"
TESTS = '''
"""What holds, in
one sentence.

And more of it.
"""
import pytest
from hypothesis import given, settings, strategies

def test_outside():
    pass

class TestInside:
    pytestmark = pytest.mark.reliability

    @pytest.mark.parametrize("number", range(3))
    def test_plain(self, number):
        pass

    def test_that_fails(self):
        assert False

    def test_that_does_not_start(self, no_such_fixture):
        pass

    @settings(max_examples=20)
    @given(strategies.text())
    def test_examples(self, text):
        pass

    def test_counts(self, attempts):
        attempts("calls | requests", 1000)
        attempts("files", 20, lost=2)

    def test_counts_and_fails(self, attempts):
        attempts("files", 30)
        assert False

    def test_of_elsewhere(self):
        pytest.skip("no such machine")
'''
HOLDS = "What holds, in one sentence"
ROWS = {HOLDS: (6, 3 + 1 + 1 + 20, 2), "calls | requests": (1, 1000, 0), "files": (2, 50, 3)}


@pytest.mark.parametrize("options", [[], ["-n", "1"]], ids=["one process", "a worker"])
def test_what_a_run_counts(tmp_path, options):
    (tmp_path / "pytest.ini").write_text(SETTINGS.format(support=ROOT / "tests" / "support"))
    (tmp_path / "conftest.py").write_text("from battery import attempts, pytest_addoption, pytest_configure\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    arguments = [*options, "--battery-results", "to/results.json"]
    command = [sys.executable, "-m", "pytest", *arguments]
    # Other plugins that happen to be installed take seconds to load.
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin,_hypothesis_pytestplugin"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((tmp_path / "to" / "results.json").read_text())
    assert {row["source"] for row in result["rows"]} == {"test_it.py"}
    assert {row["kind"]: (row["tests"], row["attempts"], row["lost"]) for row in result["rows"]} == ROWS
    assert result["skipped"] == [{"source": "test_it.py", "reason": "no such machine", "tests": 1}]
    assert result["command"] == " ".join(["pytest", *arguments])

    page = load_file(ROOT / "tools" / "reliability_page.py", "reliability_page").reliability_page
    (tmp_path / "to" / "results.json").rename(tmp_path / "to" / "quick.json")
    text = page(tmp_path / "to")
    assert "1,075 attempts, 5 lost" in text and "## The long part" not in text
    assert "| calls \\| requests | 1,000 | 0 | `test_it.py` |" in text
    assert f"| {HOLDS} | 25 | 2 | `test_it.py` |" in text
    assert "- 1 of `test_it.py`: no such machine" in text

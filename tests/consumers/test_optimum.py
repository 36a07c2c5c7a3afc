"""`optimum-cli export gte` in an environment with the real optimum: the options, table and bundles of gte-export."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from environments import Unavailable, interpreter

pytestmark = pytest.mark.consumers

ROOT = Path(__file__).resolve().parents[2]
GTE_EXPORT = ("-c", "import sys; from gte_deploy.exporters.cli import main; sys.exit(main(sys.argv[1:]))")


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return interpreter("optimum")
    except Unavailable as error:
        pytest.skip(f"optimum-cli: {error}")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    # The repository on the path is the package and its part of optimum's namespace, as an installation has them.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def optimum_cli(python: Path) -> Path:
    return python.with_name("optimum-cli")


def options_of_help(text: str) -> set[str]:
    return {word.strip("[],") for word in text.split() if word.strip("[],").startswith("--")}


def test_it_has_all_options_of_gte_export(python, optimum_cli):
    listed = run(optimum_cli, "export", "--help")
    assert listed.returncode == 0 and "gte" in listed.stdout, listed.stderr
    for words in ([], ["--format", "trt"], ["--format", "triton"]):
        ours, theirs = run(python, *GTE_EXPORT, *words, "--help"), run(optimum_cli, "export", "gte", *words, "--help")
        assert ours.returncode == theirs.returncode == 0, theirs.stderr
        assert options_of_help(theirs.stdout) == options_of_help(ours.stdout)
        assert len(options_of_help(theirs.stdout)) > 10


def test_it_writes_the_bundle_of_gte_export_and_prints_its_table(python, optimum_cli, word_checkpoints, tmp_path):
    words = ["--model", word_checkpoints["embed"], "--max-len", "32", "--pooling", "mean", "--quiet"]
    ours = run(python, *GTE_EXPORT, *words, "--output", tmp_path / "ours")
    theirs = run(optimum_cli, "export", "gte", *words, "--output", tmp_path / "theirs")
    assert ours.returncode == theirs.returncode == 0, theirs.stderr

    def verdicts(printed: str) -> list[str]:
        return [line for line in printed.splitlines() if ": parity passed" in line]

    assert verdicts(theirs.stdout) == verdicts(ours.stdout) != []
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("ours", "theirs")]
    kept = [{**m, "checksum": None, "files": sorted(m["files"])} for m in manifests]
    assert kept[0] == kept[1] and kept[0]["spec"]["pooling"] == "mean" and kept[0]["spec"]["max_length"] == 32
    for name in manifests[0]["files"]:
        if not name.startswith("report."):  # they have times
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_its_exit_code_and_error_are_those_of_gte_export(optimum_cli, tmp_path):
    refused = run(optimum_cli, "export", "gte", "--model", tmp_path / "missing", "--quiet")
    assert refused.returncode == 1 and "no folder" in refused.stderr and "Traceback" not in refused.stderr
    refused = run(optimum_cli, "export", "gte", "--precision", "fp8")
    assert refused.returncode == 2 and "--format trt" in refused.stderr

"""The files that a repository is expected to have say what is so: workflows, the citation, the images of README.md."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gte_deploy import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RESULT = "benchmarks/results/2026-11-29-inference-amd-epyc.md"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def check_schema(schema: str, file: Path) -> subprocess.CompletedProcess[str]:
    """Judge a file by the schema that its readers publish, which check-jsonschema has in it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", file]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("schema", "file"),
    [*(("github-workflows", file) for file in WORKFLOWS), ("citation-file-format", ROOT / "CITATION.cff")],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_its_readers_accept_a_file(schema, file, tmp_path):
    run = check_schema(schema, file)
    assert run.returncode == 0, run.stdout + run.stderr
    broken = tmp_path / file.name
    broken.write_text("name: only\n", encoding="utf-8")
    assert check_schema(schema, broken).returncode == 1


def jobs() -> list[tuple[str, dict[str, Any]]]:
    found = [(file.name, yaml.safe_load(file.read_text(encoding="utf-8"))) for file in WORKFLOWS]
    return [(f"{name}: {job}", content) for name, workflow in found for job, content in workflow["jobs"].items()]


def test_workflows_run_the_scripts_that_everybody_can_run():
    commands = {command["run"] for _, job in jobs() for command in job["steps"] if "run" in command}
    scripts = {f".ci/{file.name}" for file in (ROOT / ".ci").iterdir()}
    assert commands - scripts == {"git config --global core.symlinks true"}
    assert scripts <= commands


def test_workflows_name_four_systems_and_pythons_that_the_package_takes():
    images = " ".join(str(job["strategy"]["matrix"]) for _, job in jobs())
    assert all(image in images for image in ("ubuntu-24.04'", "ubuntu-24.04-arm", "macos-", "windows-"))
    minors = [int(minor) for minor in re.findall(r"'3\.(\d+)'", images)]
    assert minors and {f"Programming Language :: Python :: 3.{minor}" for minor in minors} <= {*PROJECT["classifiers"]}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_have_pinned_actions_and_read_only_rights(file):
    text = file.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    used = re.findall(r"uses: (.+)", text)
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 120
        checkouts = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout")]
        assert [step["with"]["persist-credentials"] for step in checkouts] == [False]


def test_the_tests_of_other_systems_are_there():
    script = (ROOT / ".ci" / "run-runtime").read_text(encoding="utf-8")
    paths = re.findall(r"tests/[\w/.]+", script)
    assert len(paths) > 5 and [path for path in paths if not (ROOT / path).exists()] == []
    # No file of theirs imports a module that Python for Windows has not.
    files = [file for path in paths for file in [*(ROOT / path).rglob("*.py"), ROOT / path] if file.suffix == ".py"]
    files += [ROOT / "tests/conftest.py", ROOT / "tests/support/runtime_models.py", ROOT / "tests/support/factories.py"]
    unix = re.compile(r"^(?:import|from) (?:fcntl|resource|pwd|grp|termios|pty)\b", re.MULTILINE)
    assert [file.name for file in files if unix.search(file.read_text(encoding="utf-8"))] == []


def test_the_citation_has_the_version_and_the_license_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["version"], citation["license"]) == (
        PROJECT["name"],
        __version__,
        PROJECT["license"],
    )


def test_the_images_of_the_readme_are_those_of_the_results():
    run = subprocess.run(
        [sys.executable, "tools/readme_images.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_figures_of_the_readme_are_those_of_the_result():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    measured = json.loads((ROOT / RESULT.replace(".md", ".json")).read_text(encoding="utf-8"))["measurements"]
    mixed: dict[tuple[str, bool], list[float]] = {}  # (precision, ours) -> seconds
    for row in measured:
        if row["workload"] == "list-mixed":
            mixed.setdefault((row["precision"], row["ours"]), []).append(statistics.median(row["seconds"]))
    ours, ours_int8 = min(mixed["fp32", True]), min(mixed["int8", True])
    peers = sorted(mixed["fp32", False])
    assert f"takes {ours:.1f} in FP32 and {ours_int8:.1f} in INT8; the best peer takes {peers[0]:.1f} in FP32" in text
    assert len(peers) == 10 and f"The best of ten peers in FP32 takes {peers[0] / ours:.1f} times as long" in text
    equal = {
        row["contestant"]: statistics.median(row["seconds"])
        for row in measured
        if row["workload"] == "list-256x32" and row["precision"] == "fp32"
    }
    default = equal["gte-deploy onnx fp32"]
    best = min(seconds for name, seconds in equal.items() if not name.startswith("gte-deploy"))
    assert f"a list of equal lengths {best / default:.2f} times" in text
    # The other ratios of the paragraph are in the tables of bars of this result and of the one of a newer CPU.
    bars = {name: table_of_bars(ROOT / name) for name in (RESULT, RESULT.replace("epyc", "epyc-zen4"))}
    here, newer = bars.values()
    even = [here[shape, "fp32"] for shape in ("1x16", "1x512", "8x128")]
    assert f"a single text or batch is {min(even):.2f} to {max(even):.2f} times as fast as the best peer here" in text
    assert f"a short text on a newer CPU {newer['1x16', 'fp32']:.2f} times" in text
    assert all(1.9 <= here[shape, "int8"] < 2.1 for shape in ("1x16", "1x512", "8x128"))
    assert "INT8 is about twice as fast" in text
    assert all(0.95 <= newer[shape, "int8"] <= 1.05 for shape in ("1x128", "1x512", "8x128"))


def table_of_bars(result: Path) -> dict[tuple[str, str], float]:
    pattern = r"^\| base ([\w-]+) \| ([\w-]+) \| ≥ [\d.]+ \| ([\d.]+) "
    rows = re.findall(pattern, result.read_text(encoding="utf-8"), re.MULTILINE)
    return {(shape, precision): float(ratio) for shape, precision, ratio in rows}


def test_no_image_of_a_document_is_on_another_host():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    pattern = re.compile(r"!\[[^\]]*\]\(https?:|<img[^>]+src=\"https?:")
    assert [file.name for file in documents if pattern.search(file.read_text(encoding="utf-8"))] == []

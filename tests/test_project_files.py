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
RESULTS = "benchmarks/results"
LISTS = "2026-12-01-inference-amd-epyc-zen4-lists.json"
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
    images = " ".join(str(job["strategy"]["matrix"]) for _, job in jobs() if "strategy" in job)
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


def test_the_figures_of_the_readme_are_those_of_the_results():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lists = seconds_of(LISTS, "list-mixed")
    ours = {name: lists[f"gte-deploy openvino {name}"] for name in ("fp32", "bf16", "int8")}
    default, tuned = lists["sentence-transformers openvino"], lists["sentence-transformers openvino, batches of 8"]
    peers = {name: seconds for name, seconds in lists.items() if not name.startswith("gte-deploy")}
    assert min(peers[name] for name in peers if "batches" not in name and "bf16" not in name) == default
    assert min(peers[name] for name in peers if "bf16" not in name) == tuned
    assert (
        f"gte-deploy takes {ours['fp32']:.1f} in FP32, {ours['bf16']:.1f} in BF16 and {ours['int8']:.1f} in INT8; "
        f"sentence-transformers on OpenVINO takes {default:.1f} in FP32, {tuned:.1f} with batches of 8 and "
        f"{min(peers.values()):.1f} so in BF16, and on torch {peers['sentence-transformers']:.1f} in FP32, "
        f"{peers['sentence-transformers, batches of 8']:.1f} with batches of 8" in text
    )
    assert f"the best peer takes {default / ours['fp32']:.1f} times as long in FP32" in text
    best = min(peers.values())
    told = f"it takes {tuned / ours['fp32']:.2f} times as long, in BF16 {best / ours['bf16']:.2f} times"
    assert told in text
    eight = f"the best one in FP32 takes {tuned / ours['int8']:.1f} times as long as INT8"
    assert f"{eight}, in BF16 {best / ours['int8']:.1f} times" in text
    other = {name: lists[f"gte-deploy onnx {name}"] for name in ("fp32", "int8")}
    assert f"it takes {other['fp32']:.1f} s in FP32 and {other['int8']:.1f} in INT8" in text
    # The table is from the bars of two other results, and one row from the numbers of the default engine.
    here, newer = (table_of_bars(ROOT / RESULTS / f"2026-11-29-inference-amd-epyc{cpu}.md") for cpu in ("", "-zen4"))
    even = ("1x16", "1x512", "8x128")
    assert f"one length, Zen 3 | {span(here, even, 'fp32')} | {span(here, even, 'int8')} |" in text
    longer = ("1x128", "1x512", "8x128")
    assert f"(VNNI) | {span(newer, longer, 'fp32')} | {span(newer, longer, 'int8')} |" in text
    assert f"16 tokens, the same CPU | {newer['1x16', 'fp32']:.2f} | {newer['1x16', 'int8']:.2f} |" in text
    equal = seconds_of("2026-11-29-inference-amd-epyc.json", "list-256x32")
    fastest = min(seconds for name, seconds in equal.items() if not name.startswith("gte-deploy"))
    row = f"{fastest / equal['gte-deploy onnx fp32']:.2f} | {here['list-256x32', 'int8']:.2f} |"
    assert f"a list of texts of one length, Zen 3 | {row}" in text


def seconds_of(result: str, workload: str) -> dict[str, float]:
    """The median seconds of each contestant of a workload."""
    measured = json.loads((ROOT / RESULTS / result).read_text(encoding="utf-8"))["measurements"]
    return {
        row["contestant"]: statistics.median(row["seconds"])
        for row in measured
        if row["workload"] == workload and row["seconds"]
    }


def span(bars: dict[tuple[str, str], float], workloads: tuple[str, ...], precision: str) -> str:
    found = [bars[workload, precision] for workload in workloads]
    return f"{min(found):.2f} to {max(found):.2f}"


def table_of_bars(result: Path) -> dict[tuple[str, str], float]:
    pattern = r"^\| base ([\w-]+) \| ([\w-]+) \| ≥ [\d.]+ \| ([\d.]+) "
    rows = re.findall(pattern, result.read_text(encoding="utf-8"), re.MULTILINE)
    return {(shape, precision): float(ratio) for shape, precision, ratio in rows}


def test_no_image_of_a_document_is_on_another_host():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    pattern = re.compile(r"!\[[^\]]*\]\(https?:|<img[^>]+src=\"https?:")
    assert [file.name for file in documents if pattern.search(file.read_text(encoding="utf-8"))] == []

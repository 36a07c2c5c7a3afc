"""The lowest versions that pyproject.toml declares work: the runtime's here, export and training as `consumers`."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import gte_deploy
from environments import LOWEST, Unavailable, interpreter, versions
from gte_deploy.models import builtin_path
from http_server import ServerProcess, serve_command

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXT = "The president of the united [MASK] of America."
# Tests without torch, with the built-in model. They read and write bundles, sign, load, answer, and refuse.
OF_THE_RUNTIME = (
    "tests/reliability/test_hub_layout.py",
    "tests/runtime/bundle/test_manifest.py",
    "tests/runtime/bundle/test_signature.py",
    "tests/runtime/core/test_files.py",
    "tests/runtime/core/test_lanes.py",
)


def python_of(name: str) -> Path:
    try:
        return interpreter(name)
    except Unavailable as reason:
        pytest.skip(str(reason))


def declared(extras: tuple[str, ...]) -> Iterator[Requirement]:
    """Yield the requirements of the package and of extras, those of other extras in them too."""
    options = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *(line for extra in extras for line in options[extra])):
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            yield from declared(tuple(requirement.extras))
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def lowest_of(requirement: Requirement) -> Version:
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return Version(bound)


@pytest.mark.parametrize("name", ["lowest", pytest.param("lowest-export", marks=pytest.mark.consumers)])
def test_the_environment_has_the_lowest_versions(name):
    python_of(name)
    wanted = {
        requirement.name.lower().replace("_", "-"): lowest_of(requirement) for requirement in declared(LOWEST[name])
    }
    found = {package: Version(text) for package, text in versions(name, list(wanted)).items()}
    assert found.keys() == wanted.keys()
    higher = {package: str(version) for package, version in found.items() if version != wanted[package]}
    assert all(found[package] > wanted[package] for package in higher)
    # A package that is declared for more than one reason may be held higher by another.
    assert higher.keys() <= ({"huggingface-hub", "safetensors", "tokenizers"} if name == "lowest-export" else set())


def run(python: Path, code: str, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ANSWER = """
import json, sys, gte_deploy
with gte_deploy.load(backend=sys.argv[1], num_threads=1) as model:
    print(json.dumps([model.fill_mask(sys.argv[2]), model.encode(["a text", sys.argv[2]]).tolist()]))
"""


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_the_lowest_versions_answer_as_those_of_this_environment(engine, tmp_path):
    words, embeddings = json.loads(run(python_of("lowest"), ANSWER, engine, TEXT, cwd=tmp_path))
    with gte_deploy.load(backend=engine, num_threads=1) as model:
        expected = model.fill_mask(TEXT)
        np.testing.assert_allclose(embeddings, model.encode(["a text", TEXT]), atol=1e-5)
    assert [one["token_str"] for one in words] == [one["token_str"] for one in expected]
    np.testing.assert_allclose([one["score"] for one in words], [one["score"] for one in expected], atol=1e-5)


def test_the_lowest_versions_pass_the_tests_of_the_runtime(tmp_path):
    command = [python_of("lowest"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *OF_THE_RUNTIME]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*map(str, command), "--basetemp", str(tmp_path / "tests")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    last = done.stdout.splitlines()[-1]
    assert "passed" in last and "skipped" not in last, last


def test_the_lowest_versions_serve(tmp_path):
    server = ServerProcess(serve_command("gte-en-mlm-tiny"), cwd=tmp_path, python=python_of("lowest"))
    try:
        server.wait_until_ready()
        answer = httpx.post(f"{server.url}/embed", json={"inputs": [TEXT], "normalize": False})
        metrics = httpx.get(f"{server.url}/metrics")
        assert server.end() == 0, server.log
    finally:
        server.kill()
    with gte_deploy.load() as model:
        np.testing.assert_allclose(answer.json(), model.encode([TEXT]), atol=1e-5)
    assert metrics.status_code == 200 and "# TYPE" in metrics.text


@pytest.mark.consumers
def test_the_lowest_versions_export(tmp_path):
    code = "import sys; from gte_deploy.exporters.cli import main; sys.exit(main())"
    options = ["--max-len", 32, "--output", "bundle", "--reference-cache", tmp_path / "cache"]
    printed = run(python_of("lowest-export"), code, *options, cwd=tmp_path)
    assert "parity passed" in printed and "answers: passed" in printed
    with gte_deploy.load(tmp_path / "bundle", backend="onnx") as there, gte_deploy.load(backend="onnx") as here:
        np.testing.assert_allclose(there.encode(["a text"]), here.encode(["a text"]), atol=1e-5)


@pytest.mark.consumers
def test_the_lowest_versions_train(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"The house number {i} is old and small." for i in range(99)))
    stage = {"name": "one", "max_length": 32, "rope_theta": 160_000, "steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    recipe = {"name": "test", "model": str(builtin_path()), "stages": [stage], "seed": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    python, code = python_of("lowest-export"), "import sys; from gte_deploy.training.cli import main; sys.exit(main())"
    prepare = ["prepare", "text.txt", "--output", "data", "--tokenizer", builtin_path(), "--workers=1"]
    assert "99 documents" in run(python, code, *prepare, cwd=tmp_path)
    run(python, code, "run", "recipe.yaml", "--data", "data", "--output", "run", "--device=cpu", cwd=tmp_path)
    with gte_deploy.load(tmp_path / "run" / "model", backend="torch") as trained:
        assert np.isfinite(trained.encode("a text")).all()

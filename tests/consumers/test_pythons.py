"""The wheel in every Python that it names and that is here, as pip installs it: 3.10 has an older ONNX Runtime.

`python tests/support/pythons.py 3.14` gets the newest of them on a Debian that has it not.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import environments
import gte_deploy
from gte_deploy.models import builtin_path
from packages import build, packaged_tree
from pythons import Unavailable, environment, find

pytestmark = pytest.mark.consumers

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OLDEST = VERSIONS[0]
TEXT = "The president of the united [MASK] of America."


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", packaged_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel"))


def _interpreter(version: str) -> Path:
    try:
        return find(version)
    except Unavailable as error:
        pytest.skip(str(error))


def _run(python: Path, code: str, *arguments: object, cwd: Path) -> str:
    command = [python, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _main(module: str) -> str:
    return f"import sys; from {module} import main; sys.exit(main())"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_runtime_answers(wheel, tmp_path, version):
    python = environment(_interpreter(version), tmp_path / "environment", [f"{wheel}[cpu]"])

    def run(*arguments: str) -> str:
        return _run(python, _main("gte_deploy.cli"), *arguments, cwd=tmp_path)

    answers, vector = (json.loads(run(*command)) for command in (["fill-mask", TEXT, "--json"], ["encode", "a text"]))
    with gte_deploy.load(backend="onnx") as here, gte_deploy.load(task="embed", backend="onnx") as embedder:
        assert [one["token"] for one in answers] == [one["token"] for one in here.fill_mask(TEXT)]
        assert float(embedder.encode("a text") @ vector) > 0.9999  # of length 1; INT8 kernels differ by version
    assert "all as the manifest says" in run("verify", "gte-en-mlm-tiny")


@pytest.fixture(scope="module")
def oldest(wheel) -> Path:
    """The oldest Python with all that exports and trains; pip downloads some 3 GB once, with an older transformers."""
    folder = environments.FOLDER / f"python{OLDEST}"
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "export,train"
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        environment(_interpreter(OLDEST), folder, [f"{wheel}[{wanted}]"])
        done.write_text(wanted, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True, timeout=300)
    return python


@pytest.mark.slow  # for the download
def test_the_oldest_python_exports(oldest, tmp_path):
    options = ["--max-len", 32, "--output", "bundle", "--reference-cache", tmp_path / "cache"]
    printed = _run(oldest, _main("gte_deploy.exporters.cli"), *options, cwd=tmp_path)
    assert "parity passed" in printed and "answers: passed" in printed
    with gte_deploy.load(tmp_path / "bundle", backend="onnx") as there, gte_deploy.load(backend="onnx") as here:
        np.testing.assert_allclose(there.encode(["a text"]), here.encode(["a text"]), atol=1e-5)


@pytest.mark.slow  # for the download
def test_the_oldest_python_trains(oldest, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"The house number {i} is old and small." for i in range(99)))
    stage = {"name": "one", "max_length": 32, "rope_theta": 160_000, "steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    recipe = {"name": "test", "model": str(builtin_path()), "stages": [stage], "seed": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = _main("gte_deploy.training.cli")
    prepare = ["prepare", "text.txt", "--output", "data", "--tokenizer", builtin_path(), "--workers=1"]
    assert "99 documents" in _run(oldest, train, *prepare, cwd=tmp_path)
    _run(oldest, train, "run", "recipe.yaml", "--data", "data", "--output", "run", "--device=cpu", cwd=tmp_path)
    with gte_deploy.load(tmp_path / "run" / "model", backend="torch") as trained:
        assert np.isfinite(trained.encode("a text")).all()

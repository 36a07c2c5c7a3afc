"""The code runs without what Linux alone has. Nothing here ran on Windows or macOS: the names are taken away.

`tests/support/other_systems.py` says what a process of these tests has not.
"""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import httpx
import numpy as np
import pytest
import yaml

import gte_deploy
from factories import write_tokenizer
from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import is_below
from gte_deploy.models import resolve_checkpoint
from http_server import ServerProcess
from other_systems import MODULES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("gte_deploy", "models", "exporters", "training")
START = "from other_systems import become_windows; become_windows(); "


def program(code: str) -> list[str]:
    """Return the arguments of Python that run this code without what Windows lacks."""
    return ["-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests/support')!r}); {START}{code}"]


def run(code: str, *arguments: object, cwd: Path) -> str:
    """Run Python code in a process that lacks what Windows lacks; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program(code), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_mlm) -> Path:
    """A small model, exported by a process that lacks what Windows lacks, and exported again over itself."""
    folder = tmp_path_factory.mktemp("exported")
    code = "from gte_deploy.exporters.cli import main; sys.exit(main(sys.argv[1:]) or main([*sys.argv[1:], '--force']))"
    run(code, tiny_mlm, "bundle", "--max-len", 32, "--reference-cache", folder / "cache", cwd=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["bundle"]  # no lock, no staging folder, no cache
    return folder / "bundle"


ANSWERS = """
import json
import gte_deploy
with gte_deploy.load(sys.argv[1], backend=sys.argv[2]) as model:
    print(json.dumps([model.fill_mask("w7 [MASK] w9", top_k=2), model.encode(["w7 w8", "w9"]).tolist()]))
"""


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_exported_models_answer(bundle, backend, tmp_path):
    answers_alike(bundle, backend, tmp_path)


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_the_built_in_model_answers(backend, tmp_path):
    answers_alike("gte-en-mlm-tiny", backend, tmp_path)


def answers_alike(source, backend, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    printed = run(ANSWERS, source, backend, cwd=tmp_path)
    fills, vectors = json.loads(printed)
    with gte_deploy.load(source, backend=backend) as model:
        np.testing.assert_allclose(vectors, model.encode(["w7 w8", "w9"]), atol=1e-5)
        assert [fill["token"] for fill in fills] == [fill["token"] for fill in model.fill_mask("w7 [MASK] w9", top_k=2)]


def test_the_command_line(bundle, tmp_path):
    code = "from gte_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "texts.txt").write_text("w7\nw8 w9\n")
    run(code, "encode", "-m", bundle, "--input", "texts.txt", "--output", "out.npy", cwd=tmp_path)
    assert np.load(tmp_path / "out.npy").shape[0] == 2
    assert "onnx" in run(code, "info", bundle, cwd=tmp_path)
    run(code, "verify", bundle, cwd=tmp_path)


def test_the_first_command(tmp_path):
    code = "from gte_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    assert "the united states of america" in run(code, "fill-mask", "The united [MASK] of America.", cwd=tmp_path)
    assert ": a bundle" in run(code, "info", cwd=tmp_path) and list(tmp_path.iterdir()) == []


def test_the_server(tmp_path):
    code = "from gte_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    server = ServerProcess(
        [*program(code), "serve", "gte-en-mlm-tiny", "--port", "0"], cwd=tmp_path, OMP_NUM_THREADS="1"
    )
    try:
        server.wait_until_ready()
        (vector,) = httpx.post(f"{server.url}/embed", json={"inputs": "a text", "normalize": False}).json()
        with gte_deploy.load() as model:
            np.testing.assert_allclose(vector, model.encode("a text"), atol=1e-5)
        assert server.end(signal.SIGINT) == 0  # Ctrl-C, which Windows has, too
    finally:
        server.kill()


def test_training(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1} w{i + 2} w7" for i in range(5, 100)))
    stage = {"name": "one", "max_length": 32, "rope_theta": 10_000, "steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    recipe = {"name": "test", "model": "architecture", "stages": [stage], "seed": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((ROOT / "models/builtin/gte_en_mlm_tiny/config.json").read_text())
    config |= {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    (tmp_path / "architecture").mkdir()
    (tmp_path / "architecture/config.json").write_text(json.dumps(config))
    prepare = ["prepare", "text.txt", "--output", "data", "--tokenizer", "tokenizer", "--workers=1"]
    train = ["run", "recipe.yaml", "--data", "data", "--output", "run", "--device=cpu"]
    # One process, because each of them would import torch.
    code = "import json; from gte_deploy.training.cli import main; sys.exit(any(map(main, json.loads(sys.argv[1]))))"
    printed = run(code, json.dumps([prepare, [*prepare, "--force"], train]), cwd=tmp_path)
    assert printed.count("95 documents") == 2
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("a/b.json", True),
        ("C:/a", False),
        ("C:a", False),
        ("a\\..\\b", False),
        ("\\\\host\\a", False),
        ("a/../b", False),
    ],
)
def test_paths_in_files_stay_in_their_folder_on_every_system(name, below):
    assert is_below(name) is below
    windows = PureWindowsPath("D:/bundle")
    # `is_below` must never be wider than Windows itself is.
    assert not below or ((windows / name).is_relative_to(windows) and ".." not in (windows / name).parts)


@pytest.mark.parametrize("name", ["C:\\models\\gte", "C:/gte", "models\\gte"])
def test_a_missing_folder_of_windows_is_no_hub_id(name):
    with pytest.raises(CheckpointError, match="it is not a hub id"):
        resolve_checkpoint(name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_what_linux_alone_has(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(MODULES), file


def test_the_lack_is_real(tmp_path):
    """The process of these tests refuses what they say it refuses."""
    code = """
import types
from pathlib import Path, PureWindowsPath
ours = types.ModuleType("gte_deploy.imagined")
source = '''
import os, signal
try:
    import fcntl
except ModuleNotFoundError as error:
    print(error)
print(hasattr(os, "fork"), hasattr(os, "getpid"), hasattr(signal, "SIGHUP"), hasattr(signal, "SIGTERM"))
for path in ("/proc/cpuinfo", "."):
    try:
        os.open(path, os.O_RDONLY)
    except OSError as error:
        print(type(error).__name__)
Path("folder").mkdir()
with open("folder/file", "w"):
    try:
        Path("folder").rename("other")
    except PermissionError as error:
        print("open:", "folder/file" in str(error))
'''
exec(compile(source, "imagined", "exec"), vars(ours) | {"__name__": "gte_deploy.imagined", "Path": Path})
"""
    assert run(code, cwd=tmp_path).splitlines() == [
        "No module named 'fcntl'",
        "False True False True",
        "FileNotFoundError",
        "PermissionError",
        "open: True",
    ]

"""One distribution over four top-level folders: what is built of them, and what may import what."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from packages import FOLDERS, ROOT, build, packaged_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return packaged_tree(tmp_path_factory.mktemp("tree"))


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_linters_and_type_checkers_hold_the_code_to_the_oldest_python():
    """Mypy and pyright find what its library lacks, and ruff what its grammar lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=")
    tools = project["tool"]
    assert oldest == tools["mypy"]["python_version"] == tools["pyright"]["pythonVersion"]
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert not tools["ruff"]["per-file-target-version"].keys() & {f"{folder}/**" for folder in FOLDERS}
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    assert named[0] == oldest


def test_every_package_has_an_init():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), file


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "gte_deploy"])
def test_a_link_shows_each_folder_where_it_is_installed(folder):
    link = ROOT / "gte_deploy" / folder
    assert link.is_symlink() and link.readlink() == Path("..") / folder


@pytest.fixture(scope="module")
def wheel_names(tree, tmp_path_factory) -> set[str]:
    return names_in(build("wheel", tree, tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_every_module_and_data_file(wheel_names):
    for folder, package in FOLDERS.items():
        prefix = package.replace(".", "/")
        for file in (ROOT / folder).rglob("*"):
            if file.is_dir() or "__pycache__" in file.parts or file.name.startswith("."):
                continue
            assert f"{prefix}/{file.relative_to(ROOT / folder).as_posix()}" in wheel_names


OPTIMUM_COMMAND = "optimum/commands/register/register_gte_deploy.py"


def test_wheel_takes_no_other_top_level_name(wheel_names):
    names = {name for name in wheel_names if ".dist-info" not in name}
    assert {name.split("/")[0] for name in names} == {"gte_deploy", "optimum"}
    # A part of optimum's own namespace: one more file, above all an __init__.py, could hide those of optimum.
    assert {name for name in names if name.startswith("optimum/")} == {OPTIMUM_COMMAND}


def test_a_wheel_of_the_sdist_holds_the_same(wheel_names, tree, tmp_path):
    archive = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert names_in(build("wheel", source, tmp_path / "wheel")) == wheel_names


def test_an_editable_install_is_the_tree(tree, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", tmp_path, "--editable", tree]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    code = (
        "import importlib, importlib.util, site, sys\n"
        "site.addsitedir(sys.argv[1])\n"
        "print(*set(importlib.util.find_spec('optimum.commands.register').submodule_search_locations))\n"
        "for name in sys.argv[2:]:\n"
        "    print(importlib.import_module(name).__file__)"
    )
    # -I and elsewhere: neither this folder nor the environment's own installation may answer.
    run = [sys.executable, "-I", "-S", "-c", code, tmp_path, *FOLDERS.values()]
    found = subprocess.run(run, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=60).stdout.split()
    found, places = found[-len(FOLDERS) :], found[: -len(FOLDERS)]
    assert [Path(file).resolve() for file in found] == [tree / folder / "__init__.py" for folder in FOLDERS]
    assert str((tree / OPTIMUM_COMMAND).parent) in places, "optimum-cli looks for commands in these folders"


# Imports point one way: models <- training; models, gte_deploy <- exporters; the command lines <- everything.
# Those of BOTTOM stand at the bottom: they import nothing but one another.
BOTTOM = {
    f"gte_deploy.{name}"
    for name in ("_version", "core", "text.inputs", "text.batching", "text.chunking", "backends.base", "tasks")
}
MAY_NOT_IMPORT = {
    "models": ("gte_deploy.exporters", "gte_deploy.training"),
    "training": ("gte_deploy.exporters",),
    "exporters": ("gte_deploy.training",),
    "gte_deploy": ("gte_deploy.exporters", "gte_deploy.training"),
}


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    for file in (ROOT / folder).rglob("*.py"):
        if file.name == "cli.py":
            continue
        for module in imported_modules(file):
            assert not module.startswith(MAY_NOT_IMPORT[folder]), f"{file} imports {module}"


@pytest.mark.parametrize("folder", ["models", "training"])
def test_models_and_training_use_only_the_runtimes_plain_data(folder):
    allowed = ("gte_deploy.models", "gte_deploy.training")
    for file in (ROOT / folder).rglob("*.py"):
        if file.name == "cli.py":  # the command line may use everything
            continue
        for module in imported_modules(file):
            if module.startswith("gte_deploy.") and not module.startswith(allowed):
                assert any(module == name or module.startswith(f"{name}.") for name in BOTTOM), f"{file}: {module}"


def imported_at_import(file: Path) -> set[str]:
    """What importing the file imports: not what stands in functions or under `if TYPE_CHECKING`."""
    body = ast.parse(file.read_text()).body
    return {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module}


def test_the_bottom_imports_nothing_but_itself():
    for name in BOTTOM:
        path = ROOT / name.replace(".", "/")
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            for module in imported_at_import(file):
                if module.startswith("gte_deploy"):
                    assert any(module == low or module.startswith(f"{low}.") for low in BOTTOM), f"{file}: {module}"


def test_tasks_load_neither_torch_nor_an_engine():
    code = (
        "import sys, gte_deploy.tasks\n"
        "heavy = {'torch', 'tokenizers', 'onnxruntime', 'openvino', 'tensorrt', 'transformers', 'onnx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_loads_no_engine():
    code = (
        "import sys, gte_deploy\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'tensorrt', 'transformers', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_namespace_optimum_alone_makes_no_part_of_optimum_available():
    """Beside transformers without optimum; see docs/hub.md."""
    if _has_optimum():
        pytest.skip("optimum is installed here")
    pytest.importorskip("transformers")
    code = (
        "from transformers.utils.import_utils import is_optimum_available\n"
        "from transformers.utils import is_optimum_quanto_available\n"
        "from transformers.utils.import_utils import is_optimum_neuron_available\n"
        "assert is_optimum_available() and not is_optimum_quanto_available() and not is_optimum_neuron_available()\n"
        "from transformers import GPTQConfig\n"
        "from transformers.quantizers import AutoHfQuantizer\n"
        "try:\n"
        "    AutoHfQuantizer.from_config(GPTQConfig(bits=4), pre_quantized=True)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0 and "optimum" in ended.stdout, ended.stdout + ended.stderr


def _has_optimum() -> bool:
    try:
        importlib.metadata.version("optimum")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

"""One distribution over four top-level folders: what is listed, what is there, and what may import what."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "gte_deploy": "gte_deploy",
    "exporters": "gte_deploy.exporters",
    "models": "gte_deploy.models",
    "training": "gte_deploy.training",
}


def python_packages() -> set[str]:
    """Every folder of the four that holds Python files, under its installed name."""
    packages = set()
    for folder, name in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.parent.relative_to(ROOT / folder)
            packages.add(".".join((name, *relative.parts)))
    return packages


def setuptools_section() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_listed_packages_equal_the_tree():
    assert set(setuptools_section()["packages"]) == python_packages()


def test_every_package_has_an_init():
    for name in python_packages():
        folder, _, rest = name.removeprefix("gte_deploy.").partition(".")
        path = ROOT / folder / rest.replace(".", "/") if folder in FOLDERS else ROOT / name.replace(".", "/")
        assert (path / "__init__.py").is_file(), name


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = out.glob("gte_deploy-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module_and_data_file(wheel_names):
    for folder, package in FOLDERS.items():
        prefix = package.replace(".", "/")
        for file in (ROOT / folder).rglob("*"):
            if file.is_dir() or "__pycache__" in file.parts or file.name.startswith("."):
                continue
            assert f"{prefix}/{file.relative_to(ROOT / folder).as_posix()}" in wheel_names


def test_wheel_takes_no_other_top_level_name(wheel_names):
    assert {name.split("/")[0] for name in wheel_names if ".dist-info" not in name} == {"gte_deploy"}


# Imports point one way: models <- training; models, gte_deploy <- exporters; the command lines <- everything.
# Those of BOTTOM stand at the bottom: they import nothing but one another.
BOTTOM = {
    f"gte_deploy.{name}" for name in ("errors", "files", "quiet", "spec", "activations", "_version", "exit_codes")
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
        for module in imported_modules(file):
            if module.startswith("gte_deploy.") and not module.startswith(allowed):
                assert any(module == name or module.startswith(f"{name}.") for name in BOTTOM), f"{file}: {module}"


def test_import_loads_no_engine():
    code = (
        "import sys, gte_deploy\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'tensorrt', 'transformers', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

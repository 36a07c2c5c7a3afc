"""What keeps the code easy to extend: few parameters, a short pipeline, no circles of imports, one meaning a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gte_deploy", "exporters", "models", "training", "tools")
MOST_PARAMETERS = 8
# Signatures that others have set: sentence-transformers' (SentenceTransformer, SparseEncoder, CrossEncoder), the
# pipeline's of transformers, and that of transformers' attention functions. And `load`, whose arguments are the options
# of a user.
SET_BY_OTHERS = {
    "gte_deploy/loading.py": {"load"},
    "gte_deploy/tasks/interface.py": {"encode", "encode_sparse", "encode_hybrid", "predict", "rank", "classify_tokens"},
    "models/attention.py": {"packed_attention"},
}


def files() -> Iterator[Path]:
    """Every Python file of the product, once: not again through the links in gte_deploy/."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in file.parents):
                yield file


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_functions_have_few_parameters():
    many = []
    for file in files():
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
                if count > MOST_PARAMETERS and node.name not in SET_BY_OTHERS.get(name, ()):
                    many.append(f"{name}: {node.name} has {count}")
    assert many == [], "put some of them into an options dataclass"


def test_the_pipeline_of_an_export_can_be_read_at_once():
    assert len((ROOT / "exporters" / "export.py").read_text(encoding="utf-8").splitlines()) <= 300


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] in ("gte_deploy", "tools") else ("gte_deploy", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imported(file: Path, known: set[str]) -> set[str]:
    """The modules of the product that a file imports: at its top, in functions, and for type checkers."""
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def test_imports_make_no_circle():
    modules = {module_name(file): file for file in files()}
    imports = {name: imported(file, set(modules)) - {name} for name, file in modules.items()}
    left = dict(imports)
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"each of these imports another of them: {sorted(left)}"


# Names that several modules give to the same thing of their own, and are read with the module's name.
ROLES = {
    "FORMAT": "the kind of a file, in the file itself",
    "FORMAT_VERSION": "the version of a file's format, in the file itself",
    "ROOT": "the folder of the repository",
    "SERVED": "the ensemble of a task on Triton",
    "T": "a type variable",
    "filled": "a text or an array with its gaps filled",
    "format_table": "a report for people",
    "from_tensors": "answers of a task from Triton's tensors",
    "logger": "the module's logger",
    "main": "the entry of a command",
    "read_config": "a config.json: by any family, or by the module's",
    "save": "write what the module makes",
    "table": "a result for people",
    "to_tensors": "answers of a task as Triton's tensors",
}


def public_names(file: Path) -> Iterator[str]:
    """The classes, functions, constants and type aliases that a module defines without a leading underscore."""
    for node in parsed(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for target in targets:
            name = getattr(target, "name", None) or getattr(target, "id", "_")
            if not name.startswith("_") and not isinstance(node, ast.Import | ast.ImportFrom):
                yield name


def test_a_public_name_has_one_meaning():
    places: dict[str, list[str]] = {}
    for file in files():
        # The scripts of the built-in models and the models of a Triton server are no modules of the product.
        if not {"tiny_model", "embed_tiny", "serving"} & set(file.parts):
            for name in public_names(file):
                places.setdefault(name, []).append(file.relative_to(ROOT).as_posix())
    several = {name for name, found in places.items() if len(set(found)) > 1}
    assert {name: places[name] for name in several - ROLES.keys()} == {}, "give each its own name, or import the one"
    assert ROLES.keys() <= several, "no longer defined twice: take it out of the list"

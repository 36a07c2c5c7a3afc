"""Writes the files of a Python model: model.py, and copies of the modules of gte_deploy that it imports.

So a server needs no installation of gte-deploy.
"""

import ast
import importlib.util
import shutil
from pathlib import Path

import gte_deploy
from gte_deploy.core.spec import TOKENIZER_NAMES

SERVING = "gte_deploy.exporters.triton.serving"
_TOKENIZING = (
    "gte_tokenizer",
    "gte_fill_mask_output",
    "gte_sparse_output",
    "gte_sparse_query_output",
    "gte_classify_tokens_output",
)

# Two models for outputs of different sizes, with the same code.
_SAME_CODE = {"gte_token_encoder": "gte_encoder"}

# Written behind the docstring of model.py. In the repository the models are ordinary modules, which do not need it.
_PREFERS_OWN_MODULES = """
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file come before any installed ones
"""


def write_python_model(name: str, folder: Path, tokenizer: Path) -> None:
    """Write model.py and the modules that it imports to `folder`; the tokenizer too, if it tokenises or decodes."""
    source = _source(f"{SERVING}.{_SAME_CODE.get(name, name)}")
    (folder / "model.py").write_text(_preferring_own_modules(source.read_text(encoding="utf-8")), encoding="utf-8")
    for module in sorted(_imported(source)):
        file = _source(module)
        target = folder.joinpath(*module.split("."))
        target = target / "__init__.py" if file.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if name in _TOKENIZING:
        for file_name in TOKENIZER_NAMES:
            if (tokenizer / file_name).is_file():
                shutil.copyfile(tokenizer / file_name, folder / file_name)


def _preferring_own_modules(code: str) -> str:
    """The code of a model that imports the modules in its own folder first."""
    docstring = ast.parse(code).body[0]
    assert docstring.end_lineno is not None  # parsed from text
    lines = code.splitlines(keepends=True)
    return "".join([*lines[: docstring.end_lineno], _PREFERS_OWN_MODULES, *lines[docstring.end_lineno :]])


def _imported(source: Path) -> set[str]:
    """The modules and packages of gte_deploy that `source` imports, directly or through another one."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        for name in _direct_imports(waiting.pop()):
            parts = name.split(".")
            for module in (".".join(parts[: i + 1]) for i in range(len(parts))):
                if module not in found:
                    found.add(module)
                    waiting.append(_source(module))
    return found


def _direct_imports(source: Path) -> list[str]:
    # Only imports at the top level run when a module is imported: not those in functions or under `if TYPE_CHECKING`.
    body = ast.parse(source.read_text(encoding="utf-8")).body
    names = [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    return [name for name in names if name.split(".")[0] == gte_deploy.__name__]


def _source(module: str) -> Path:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, module
    return Path(found.origin)

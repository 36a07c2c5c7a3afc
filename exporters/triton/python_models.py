"""The Python models' files: each model alone in its folder, with all of gte_deploy that it imports beside it."""

import ast
import importlib.util
import shutil
from pathlib import Path

import gte_deploy

SERVING = "gte_deploy.exporters.triton.serving"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENIZING = (
    "gte_tokenizer",
    "gte_fill_mask_output",
    "gte_sparse_output",
    "gte_sparse_query_output",
    "gte_classify_tokens_output",
)


def write_python_model(name: str, folder: Path, tokenizer: Path) -> None:
    """Write model.py, the modules that it imports and, where it tokenises or decodes, the tokenizer to `folder`."""
    source = _source(f"{SERVING}.{name}")
    shutil.copyfile(source, folder / "model.py")
    for module in sorted(_imported(source)):
        file = _source(module)
        target = folder.joinpath(*module.split("."))
        target = target / "__init__.py" if file.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if name in _TOKENIZING:
        for file_name in TOKENIZER_FILES:
            if (tokenizer / file_name).is_file():
                shutil.copyfile(tokenizer / file_name, folder / file_name)


def _imported(source: Path) -> set[str]:
    """Modules of this package that importing `source` imports, packages included, directly or not."""
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
    # Only what runs at import: not what stands in functions, nor under `if TYPE_CHECKING`.
    body = ast.parse(source.read_text(encoding="utf-8")).body
    names = [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    return [name for name in names if name.split(".")[0] == gte_deploy.__name__]


def _source(module: str) -> Path:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, module
    return Path(found.origin)

"""modules.json, sentence-transformers' list of modules, as it is parsed for every kind of model. No torch."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.files import read_json

MODULES = "modules.json"
_LIBRARY = "sentence_transformers."


@dataclass(frozen=True)
class Module:
    """One entry of modules.json, or of router_config.json.

    Args:
        kind: name of its class, such as "Pooling"; the whole path of a class of somebody else.
        path: of its folder, relative to the checkpoint; "" for the checkpoint's own.
        arguments: names of the arguments for its calls.
    """

    kind: str
    path: str
    arguments: tuple[str, ...] = ()


def kind_of(path: str) -> str:
    """Name of a class of sentence-transformers, by its path of today or of before; another class keeps its path."""
    return path.rpartition(".")[2] if path.startswith(_LIBRARY) else path


def read_modules(folder: Path) -> list[Module] | None:
    """The entries of modules.json in their order, or None where there is no such file.

    Raises:
        CheckpointError: it is not JSON.
        ConfigError: it is not a list of modules.
    """
    file = folder / MODULES
    data = read_json(file)
    if data is None:
        return None
    if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in data):
        raise ConfigError(f"{file} must list objects with a `type`")
    return [
        Module(kind_of(entry["type"]), str(entry.get("path") or ""), tuple(map(str, entry.get("kwargs") or ())))
        for entry in data
    ]


def refuse_arguments(checkpoint: Path, module: Module) -> None:
    """Refuse a module that takes arguments from the caller.

    Raises:
        ConfigError: it does.
    """
    if module.arguments:
        raise ConfigError(f"{checkpoint / MODULES}: kwargs of {module.kind} is {list(module.arguments)}; expected none")


def folder_of(checkpoint: Path, module: Module) -> Path:
    """The module's folder.

    Raises:
        ConfigError: its path leaves the checkpoint's folder.
    """
    path = PurePosixPath(module.path)
    if ".." in path.parts or path.is_absolute() or "\\" in module.path:
        raise ConfigError(
            f"{checkpoint}: path is {module.path!r} of the module {module.kind}, which leaves the checkpoint's folder; "
            "expected a folder below it"
        )
    return checkpoint / path

"""A checkpoint folder: its JSON files, each parsed once, and the modules that sentence-transformers lists. No torch."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.files import checked_object, is_below, read_json
from gte_deploy.models.weight_files import refuse_irregular

MODULES_FILE = "modules.json"
_LIBRARY = "sentence_transformers."


@dataclass(frozen=True)
class Module:
    """One entry of modules.json, or of router_config.json.

    Args:
        checkpoint: the checkpoint's folder.
        kind: name of the class, such as "Pooling"; the full path for a class that sentence-transformers does not have.
        path: the module's folder, relative to the checkpoint; "" for the checkpoint's own folder.
        arguments: names of the arguments that the module takes from the caller.
    """

    checkpoint: Path
    kind: str
    path: str
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The module's folder.

        Raises:
            ConfigError: the path leaves the checkpoint's folder.
        """
        if not is_below(self.path):
            raise ConfigError(
                f"{self.checkpoint}: path is {self.path!r} of the module {self.kind}, which leaves the checkpoint's "
                "folder; expected a folder below it"
            )
        return self.checkpoint / self.path

    def file(self, name: str) -> str:
        """Return the path of a file in the module's folder, relative to the checkpoint; see `Module.folder`."""
        _ = self.folder  # raises if the folder is refused
        return posixpath.join(self.path, name)


class _Parsed(dict[str, Any]):
    """Path of a JSON file relative to the checkpoint -> its contents, read on first use."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, name: str) -> Any:
        self[name] = value = self._read(name)
        return value


class CheckpointFiles:
    """The JSON files of a checkpoint folder.

    Args:
        path: the folder.

    Raises:
        CheckpointError: one of its files is a pipe, a socket or a device.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        refuse_irregular(self.path)
        self.json = _Parsed(lambda name: read_json(self.path / name))
        """Name of a file -> its contents, or None if there is no such file.

        A lookup raises CheckpointError if the file is not JSON."""
        self.objects: dict[str, dict[str, Any]] = _Parsed(
            lambda name: checked_object(self.json[name], self.path / name)
        )
        """The same for files that hold an object; {} if there is no such file."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).is_file()

    @cached_property
    def modules(self) -> list[Module] | None:
        """The entries of modules.json in order; None if there is no such file.

        Raises:
            CheckpointError: the file is not JSON.
            ConfigError: the file is not a list of modules.
        """
        data = self.json[MODULES_FILE]
        if data is None:
            return None
        if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in data):
            raise ConfigError(f"{self.path / MODULES_FILE} must list objects with a `type`")
        return [
            Module(
                self.path,
                kind_of(entry["type"]),
                str(entry.get("path") or ""),
                tuple(map(str, entry.get("kwargs") or ())),
            )
            for entry in data
        ]


def kind_of(path: str) -> str:
    """Return the name of a sentence-transformers class, from its current or a former path, else the path itself."""
    return path.rpartition(".")[2] if path.startswith(_LIBRARY) else path


def refuse_arguments(module: Module) -> None:
    """Refuse a module that takes arguments from the caller.

    Raises:
        ConfigError: the module takes some.
    """
    if module.arguments:
        raise ConfigError(
            f"{module.checkpoint / MODULES_FILE}: kwargs of {module.kind} is {list(module.arguments)}; expected none"
        )

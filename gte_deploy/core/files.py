"""Writes files that are either complete or absent: to a temporary file, which is synced and then renamed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from gte_deploy.core.errors import CheckpointError, GteDeployError, OutputExistsError

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755
_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_free(output: Path, *, force: bool) -> None:
    """Refuse an output that exists already, unless it is an empty folder or `force` is true.

    Raises:
        OutputExistsError: there is something, and it is no folder to write into.
    """
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise OutputExistsError(f"{output} is not a folder.", advice="Choose another output, or remove it.")
    if not force and any(output.iterdir()):
        raise OutputExistsError(f"{output} exists already.", advice="Replace it with --force, or choose another.")


def is_below(name: str) -> bool:
    """Whether a relative path with forward slashes stays below its folder, on every system."""
    # A colon ends a drive of Windows, and starts a stream of a file there.
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or any(mark in name for mark in "\\:\0"))


def read_json(
    path: Path, *, error: type[GteDeployError] = CheckpointError, advice: str = "Download the checkpoint again."
) -> Any:
    """Parse a JSON file; return None if there is no file.

    Args:
        path: the file.
        error: the class of the error to raise; by default that of a model's checkpoint.
        advice: a sentence for the error message: what to do about a file that is not JSON.

    Raises:
        GteDeployError: the file cannot be read, or is not JSON; it is an instance of `error`.
    """
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON ({cause}). {advice}") from cause


def read_json_object(
    path: Path, *, error: type[GteDeployError] = CheckpointError, advice: str = "Download the checkpoint again."
) -> dict[str, Any]:
    """Parse a file that holds a JSON object; return {} if there is no file. Arguments as in `read_json`.

    Raises:
        GteDeployError: the file cannot be read, is not JSON, or holds no object; it is an instance of `error`.
    """
    return checked_object(read_json(path, error=error, advice=advice), path, error=error)


def checked_object(data: Any, path: Path, *, error: type[GteDeployError] = CheckpointError) -> dict[str, Any]:
    """Return the contents of the JSON file `path` as an object; {} for None, which stands for no file.

    Raises:
        GteDeployError: the contents are no object; it is an instance of `error`.
    """
    if data is not None and not isinstance(data, dict):
        raise error(f"{path} must hold a JSON object; it holds {type(data).__name__}")
    return data or {}


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory, so that a rename in it survives a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no directory
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file that a library wrote, and make it readable by other users (libraries often set mode 0600)."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.chmod(FILE_MODE)


def sync_tree(folder: Path) -> None:
    """Flush every file and directory below `folder`, and make them readable by other users."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            path.chmod(DIRECTORY_MODE)
            sync_directory(path)
        else:
            sync_file(path)


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it over `path`.

    A failure or a kill leaves the old file unchanged; at worst a `.tmp` file stays beside it.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    aside = Path(name)
    try:
        write(aside)
        sync_file(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_with(path, lambda aside: _fill(aside, data))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode("utf-8"))


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def cache_folder() -> Path:
    """The folder for this user's files that can be created again.

    Raises:
        OSError: the user has no home folder, and XDG_CACHE_HOME is not set.
    """
    # The XDG base directory specification says: ignore a relative XDG_CACHE_HOME.
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if asked.is_absolute():
        return asked / "gte-deploy"
    try:
        return Path.home() / ".cache" / "gte-deploy"
    except RuntimeError as error:
        raise OSError("this user has no home folder for a cache; set XDG_CACHE_HOME") from error

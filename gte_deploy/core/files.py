"""Writes files that are either complete or absent: to a temporary file, which is synced and then renamed.

New files and folders have the mode that the umask of the process leaves them; a file that is replaced keeps its mode. A
link stays, and the file that it names is replaced. A device or a pipe is never replaced: it gets the bytes.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from gte_deploy.core.errors import CheckpointError, GteDeployError, InputError, OutputExistsError
from gte_deploy.core.regular import MAX_JSON_BYTES, read_regular

_CHUNK_BYTES = 1 << 20
_MOST_LINKS = 40  # as in Linux
_OF_DISKS = {errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}
_umask_lock = threading.Lock()


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


def require_utf8(path: Path) -> None:
    """Refuse a path that the libraries of the engines and tokenizers cannot open: they take UTF-8 alone.

    Raises:
        InputError: the path has other bytes, or Python was started with an encoding that does not know them.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"the path {ascii(str(path))} is not UTF-8 for this process (encoding {sys.getfilesystemencoding()}). "
            "Rename it or give a link with another name; PYTHONUTF8=1 helps where the locale is the reason."
        ) from None


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
        data = read_regular(path, MAX_JSON_BYTES) if path.is_file() else None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause}") from cause
    return None if data is None else parse_json(data, path, error=error, advice=advice)


def parse_json(
    data: bytes,
    path: Path,
    *,
    error: type[GteDeployError] = CheckpointError,
    advice: str = "Download the checkpoint again.",
) -> Any:
    """Parse the contents of the JSON file `path`. Other arguments and errors as in `read_json`."""
    try:
        return json.loads(data)
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


def umask() -> int:
    """Return the bits of a mode that the process withholds from new files and folders."""
    with contextlib.suppress(OSError):
        found = re.search(rb"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_bytes(), re.MULTILINE)
        if found:
            return int(found[1], 8)
    # Elsewhere it is read by setting it. Files that other threads make meanwhile are private, not public.
    with _umask_lock:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def sync_file(path: Path) -> None:
    """Flush a file that a library wrote, and give it the mode of a new file (libraries often set 0600)."""
    _sync(path, 0o666 & ~umask())


def sync_tree(folder: Path) -> None:
    """Flush every file and directory below `folder`, and give them the modes of new ones."""
    mode = 0o777 & ~umask()
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            inherited = path.stat().st_mode & (stat.S_ISGID | stat.S_ISVTX)
            _set_mode(path, mode | inherited)
            sync_directory(path)
        else:
            _sync(path, mode & 0o666)


def follow_links(path: Path) -> Path:
    """Return the path of the file or folder that `path` means: itself, or what a link names, which need not exist.

    Raises:
        OSError: the links go in a circle.
    """
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if _is_descriptor(path) or not path.is_symlink():
            return path
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def is_special(path: Path) -> bool:
    """Whether `path` is neither a file nor a folder, but a device, a pipe, a socket, or an open file such as stdout.

    Raises:
        OSError: the links go in a circle.
    """
    if _is_descriptor(follow_links(path)):
        return True
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def names_in_errors(path: Path) -> Iterator[None]:
    """Let an error of the disk name `path` if it names no file: those of a write do not, only those of an opening."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None and error.errno in _OF_DISKS:
            raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error
        raise


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it over `path`.

    A failure or a kill leaves the old file unchanged; at worst a `.tmp` file stays beside it. What is no file, see
    `is_special`, gets the bytes of a temporary file when `write` has filled that.

    Raises:
        OSError: the path is a folder, or cannot be written.
    """
    with names_in_errors(path):
        if is_special(path):
            with tempfile.TemporaryDirectory(prefix="gte-deploy-") as folder:
                aside = Path(folder, "output")
                write(aside)
                write_through(aside, path)
            return
        target = follow_links(path)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        aside = _new_aside(target)
        try:
            mode = stat.S_IMODE(aside.stat().st_mode)
            write(aside)
            replace_file(aside, target, new_mode=mode)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def replace_file(aside: Path, path: Path, *, new_mode: int | None = None) -> None:
    """Sync the finished file `aside` and rename it over `path`, whose mode and owner it takes over.

    Args:
        aside: a file on the same disk.
        path: the file to replace or to make, which is no link.
        new_mode: the mode if there is no file yet; None is what the umask leaves.
    """
    mode = 0o666 & ~umask() if new_mode is None else new_mode
    with contextlib.suppress(FileNotFoundError):
        mode = _adopt_owner(aside, path.stat())
    _sync(aside, mode)
    try:
        aside.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a file that is mounted alone, as containers do, can only be overwritten
            raise
        write_through(aside, path)
        aside.unlink()
    sync_directory(path.parent)


def keep_mode(new: Path, old: Path) -> None:
    """Give the folder `new` the mode and owner of the folder `old` that it is going to replace, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        inherited = new.stat().st_mode & (stat.S_ISGID | stat.S_ISVTX)
        _set_mode(new, _adopt_owner(new, old.stat()) | inherited)


def write_through(source: Path, path: Path) -> None:
    """Write the bytes of the file `source` into what is at `path`: a device, a pipe, an open file, or a mounted one."""
    with source.open("rb") as read, _opened_to_write(path) as written:
        shutil.copyfileobj(read, written, _CHUNK_BYTES)


def _opened_to_write(path: Path) -> BinaryIO:
    named = follow_links(path)
    if _is_descriptor(named) and named.parts[:3] in (("/", "proc", str(os.getpid())), ("/", "dev", "fd")):
        # Opened again by its name, a file that the shell redirects to would be written from its beginning.
        if sys.stdout is not None:
            sys.stdout.flush()
        return open(os.dup(int(named.name)), "wb")
    return open(os.open(path, os.O_WRONLY | (os.O_TRUNC if named.is_file() else 0)), "wb")


def _is_descriptor(path: Path) -> bool:
    """Whether a path names an open file of a process, as /dev/stdout does through links."""
    folder = path.parent
    return folder == Path("/dev/fd") or (folder.name == "fd" and folder.is_relative_to("/proc"))


def _new_aside(target: Path) -> Path:
    """Create the temporary file beside `target`; what a private file will hold is private from the beginning."""
    mode = 0o666
    with contextlib.suppress(FileNotFoundError):
        mode &= target.stat().st_mode
    aside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode | stat.S_IRUSR | stat.S_IWUSR))
    return aside


def _adopt_owner(aside: Path, old: os.stat_result) -> int:
    """Give `aside` the owner and group of an old file, as far as the system lets us; return the mode it should have."""
    mode, own = old.st_mode & 0o777, aside.stat()
    if hasattr(os, "chown") and (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(aside, old.st_uid, old.st_gid)
        except PermissionError:
            # Its new group may do no more than everybody might before.
            mode = (mode & ~0o070) | ((mode & 0o007) << 3)
    return mode


def _sync(path: Path, mode: int) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:  # a disk without modes refuses to set them
        path.chmod(mode)


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

"""Writes a bundle to disk in one step: it fills a folder beside the destination, syncs it, and renames it.

A kill at any moment leaves the old bundle or the new one. If the file system cannot exchange two directories, it may
leave neither; then the next export puts the old bundle back.
"""

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gte_deploy.bundle.inspection import check_graphs
from gte_deploy.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, has_manifest, open_bundle, read_manifest
from gte_deploy.bundle.signature import SIGNATURE_NAME
from gte_deploy.core.errors import BundleError, OutputExistsError
from gte_deploy.core.files import keep_mode, names_in_errors, require_utf8, sha256_file, sync_directory, sync_tree
from gte_deploy.core.locks import Release, try_lock

_STAGING, _OLD, _LOCK = ".staging", ".old", ".lock"
# What `publish` began last: the destination, and device and inode of the folder that it renames.
_published: tuple[Path, tuple[int, int]] | None = None
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Errors of a kernel, C library or file system without renameat2(RENAME_EXCHANGE).
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def bundle_files(folder: Path) -> set[str]:
    """Return the files that the manifest of a bundle names.

    Raises:
        BundleError: the folder is not a bundle.
    """
    return set(read_manifest(folder).files)


def check_destination(destination: Path, *, force: bool, files_of: Callable[[Path], set[str]] = bundle_files) -> None:
    """Refuse a destination that an export must not replace.

    `files_of` returns the files of an earlier export, without its manifest.

    Raises:
        OutputExistsError: `destination` is not empty and `force` is False, or it holds anything besides such an export.
        InputError: its path is not UTF-8.
    """
    require_utf8(destination)
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise OutputExistsError(f"{destination} is not a folder.", advice="Choose another output, or remove it.")
    if not any(destination.iterdir()):
        return
    if not has_manifest(destination):
        raise OutputExistsError(
            f"{destination} holds files and is not a bundle, so it is not replaced.", advice="Choose another output."
        )
    if not force:
        raise OutputExistsError(
            f"{destination} exists already.", advice="Replace it with --force, or choose another output."
        )
    try:
        known = {MANIFEST_NAME, SIGNATURE_NAME, *files_of(destination)}
    except BundleError as error:
        raise OutputExistsError(
            f"{destination} is not replaced: {error}", advice="Remove it, or choose another output."
        ) from error
    # A server that imports a Python model of a repository writes its byte code into the folder.
    if strangers := sorted(name for name in _tree(destination) - known if "__pycache__/" not in name):
        raise OutputExistsError(
            f"{destination} holds files that no export wrote: {', '.join(strangers[:5])}.",
            advice="Move them away first.",
        )


@contextlib.contextmanager
def staging(destination: Path, *, force: bool, files_of: Callable[[Path], set[str]] = bundle_files) -> Iterator[Path]:
    """Yield a new folder beside `destination`, which is removed at the end unless `publish` renamed it.

    Leftovers of killed exports to the same destination are removed first. Folders above that are missing are made, and
    removed again if nothing is written into them.

    Raises:
        OutputExistsError: the destination must not be replaced; see `check_destination`.
    """
    made = [above for above in destination.parents if not above.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    clean_stale(destination)
    check_destination(destination, force=force, files_of=files_of)
    folder, release = _create_locked(destination)
    try:
        with names_in_errors(destination):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if release is not None:
            release()
        for above in made:
            with contextlib.suppress(OSError):  # it has something in it
                above.rmdir()


def clean_stale(destination: Path) -> None:
    """Remove the staging folders of dead exports to `destination`, and restore an old bundle that was moved away."""
    for folder in _leftovers(destination, _OLD):
        if not os.path.lexists(destination):
            folder.rename(destination)
    for suffix in (_STAGING, _OLD, _LOCK):
        for leftover in _leftovers(destination, suffix):
            with contextlib.suppress(OSError):  # a file system without locks: then nothing counts as stale
                release = try_lock(leftover.with_suffix(_LOCK))
                if release is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    release()


def seal(folder: Path, described: Manifest) -> Manifest:
    """Sync and hash every file of `folder`, give them the modes of new files, and write the manifest last.

    Args:
        folder: the folder of a bundle, complete except for the manifest.
        described: the manifest, without the list of files.

    Returns:
        The written manifest, as read back by the runtime's own reader.

    Raises:
        BundleError: the runtime would refuse this bundle.
    """
    manifest = dataclasses.replace(described, files=hash_files(folder))
    write_manifest(folder, manifest.to_json())
    read = open_bundle(folder)
    check_graphs(folder, read)
    return read


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Hash every file of `folder`: path relative to it -> size and digest."""
    files = {name: folder / name for name in sorted(_tree(folder))}
    return {name: FileEntry(file.stat().st_size, sha256_file(file)) for name, file in files.items()}


def write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the manifest as the last file of `folder`, give everything the mode of new files, and sync it."""
    (folder / MANIFEST_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    sync_tree(folder)


def publish(
    folder: Path, destination: Path, *, force: bool, files_of: Callable[[Path], set[str]] = bundle_files
) -> None:
    """Make the sealed `folder` the bundle at `destination`.

    Raises:
        OutputExistsError: the destination must not be replaced; see `check_destination`.
    """
    global _published
    check_destination(destination, force=force, files_of=files_of)
    keep_mode(folder, destination)
    _published = destination, _identity(folder)
    if force and has_manifest(destination):
        _replace(folder, destination)
    else:
        try:
            # Windows renames to no existing folder. A folder with files, which appeared just now, is never removed.
            with contextlib.suppress(FileNotFoundError):
                destination.rmdir()
            folder.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            publish(folder, destination, force=force, files_of=files_of)  # another export was quicker
    sync_directory(destination.parent)


def written_last() -> Path | None:
    """Return the folder that this process wrote last, if it is there: what an interruption came too late for."""
    if _published is not None:
        destination, identity = _published
        with contextlib.suppress(OSError):
            if _identity(destination) == identity:
                return destination
    return None


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _replace(folder: Path, destination: Path) -> None:
    if _exchange(folder, destination):
        return  # `folder` is the old bundle now, and `staging` removes it
    aside = folder.with_suffix(_OLD)
    destination.rename(aside)
    try:
        folder.rename(destination)
    except BaseException:
        aside.rename(destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return False if this system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _create_locked(destination: Path) -> tuple[Path, Release | None]:
    """Create a staging folder; the lock on the file beside it shows that its owner is alive."""
    # Beside the folder and not inside: Windows renames no folder with an open file. And before the folder, so that no
    # other export finds a folder without its lock.
    folder = destination.parent / f".{destination.name}.{secrets.token_hex(4)}{_STAGING}"
    release = None
    with contextlib.suppress(OSError):  # a file system without locks
        release = try_lock(folder.with_suffix(_LOCK))
    try:
        folder.mkdir()
    except BaseException:
        if release is not None:
            release()
        raise
    return folder, release


def _leftovers(destination: Path, suffix: str) -> list[Path]:
    # The whole name must match: beside "a" there may be the staging folder of "a.b".
    pattern = re.compile(re.escape(f".{destination.name}.") + "[0-9a-f]{8}" + re.escape(suffix))
    return [path for path in destination.parent.iterdir() if pattern.fullmatch(path.name)]


def _tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}

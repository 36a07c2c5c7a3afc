"""Folders and files of the user's cache that a process may trust: nobody but this user or root can have written them.

The cache holds what changes answers or is executed: the choice of an engine, compiled engines and kernels. A folder
that another user made first, or that others may write to, could hold anything.
"""

import os
import stat
from pathlib import Path

from gte_deploy.core.files import cache_folder
from gte_deploy.core.regular import open_regular

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def own_cache_folder(*names: str, create: bool = True) -> Path:
    """Return a folder in the user's cache, of which only this user or root can have written the entries.

    Args:
        names: the folder below the cache, a name for each level.
        create: whether to make what is missing, for this user alone.

    Raises:
        FileNotFoundError: it is missing, and not to be made.
        PermissionError: it, or one that it is in, is another user's, or others may write to it, or it is a link.
        OSError: it cannot be made, or the user has no home folder and XDG_CACHE_HOME is not set.
    """
    folder = cache_folder()  # which may be a link to another disk; below it there is no reason for one
    for name in ("", *names):
        folder /= name
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if name and folder.is_symlink():
            raise PermissionError(
                f"{folder} is a link to {folder.readlink()}, and must be a folder of its own. Remove it"
            )
        require_own(folder, folder.stat())
    return folder


def read_own(file: Path, *, max_bytes: int) -> bytes:
    """Read a file in a folder of `own_cache_folder`; links, devices and pipes are not read.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: it is another user's, or others may write to it.
        OSError: it cannot be read, or is no file.
        ValueError: it has more than `max_bytes`.
    """
    with open(open_regular(file, follow_links=False), "rb") as opened:
        require_own(file, os.fstat(opened.fileno()))
        data = opened.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{file} has more than {max_bytes:,} bytes")
    return data


def require_own(path: Path, found: os.stat_result) -> None:
    """Refuse a folder or a file, whose status is `found`, that others can have written.

    Raises:
        PermissionError: it is neither this user's nor root's, or others may write to it.
    """
    if not hasattr(os, "geteuid"):  # Windows tells no owner; its user folders are private
        return
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.geteuid(), 0) or mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(
            f"{path} belongs to user {found.st_uid} and has mode {mode:o}; it must belong to this user, "
            f"{os.geteuid()}, or to root, and no other user may write to it. Remove it, or set XDG_CACHE_HOME to a "
            "folder of your own"
        )

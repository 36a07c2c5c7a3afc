"""Locks between processes: a file that one living process holds.

The operating system releases a lock when its process ends for any reason. Unlike a process id, that has the same
meaning in every container that mounts the file system. On Linux, macOS and Windows alike; see the package filelock.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import filelock

Release = Callable[[], None]
"""Removes a lock's file, and ends the lock."""


def try_lock(file: Path) -> Release | None:
    """Lock `file`, which this creates; return None if another process or thread holds the lock.

    Raises:
        OSError: the folder is missing, or its file system has no locks.
    """
    lock = filelock.FileLock(file, thread_local=False, is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    except NotImplementedError as error:
        raise OSError(f"{file.parent}: {error}") from error

    def release() -> None:
        # Before the end of the lock, so that nobody's new lock is removed. Windows refuses, and removes it at the end.
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()

    return release

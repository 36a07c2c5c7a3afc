"""Keeps the kernels that TensorRT-RTX compiles on the GPU in the user's cache folder, for later processes.

A runtime cache is executable code. So it is read only from a folder and file that belong to this user and that nobody
else may write.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gte_deploy.core.own_cache import own_cache_folder, require_own

logger = logging.getLogger(__name__)

_FOLDER = "tensorrt-rtx"
# Seconds until the first look for new kernels while the model is in use; each later pause is twice as long.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0


def cache_file(plan_sha256: str, version: str, capability: str) -> Path | None:
    """The file for the kernels of one plan, one version of TensorRT-RTX and one compute capability.

    Its folder is created, and only this user may read it. None, with a line in the log, if there cannot be a folder.
    """
    if not hasattr(os, "geteuid"):
        logger.info(
            "TensorRT-RTX compiles its kernels in every process: this system does not tell whose files they are"
        )
        return None
    try:
        return own_cache_folder(_FOLDER) / f"{plan_sha256}-{version}-{capability}.cache"
    except OSError as error:
        logger.warning("TensorRT-RTX compiles its kernels in every process: %s", error)
        return None


class RuntimeCache:
    """The compiled kernels of one engine, which all of its contexts share, and the file that keeps them.

    Problems with the file are logged and never raised: without it the kernels are compiled again.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Keep the kernels in `file`, or only in memory for None."""
        self._file = file
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._cache: Any = None
        self._saved = b""
        """sha256 of the file's content, as far as this process knows it."""
        self._pause_s = _FIRST_PAUSE_S
        self._next_look = time.monotonic() + self._pause_s

    def attach(self, config: Any) -> None:
        """Let contexts of this `IRuntimeConfig` share the kernels. The first call reads the file."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._read()
            if not config.set_runtime_cache(self._cache):
                logger.warning("TensorRT-RTX refuses its runtime cache, so each of its contexts compiles its kernels")

    def save_if_due(self) -> None:
        """Call `save` if the last look for new kernels is long ago; the pauses grow from a minute to an hour."""
        now = time.monotonic()
        if now >= self._next_look:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._next_look = now + self._pause_s
            self.save()

    def save(self) -> None:
        """Write the kernels to the file, if they changed; a forked process writes nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._cache is None or self._file is None:
                return
            try:
                self._write(self._file, bytes(memoryview(self._cache.serialize())))
            except (OSError, RuntimeError, TypeError) as error:  # TypeError: TensorRT-RTX gave None
                logger.warning("the compiled kernels of TensorRT-RTX were not kept: %s", error)

    def _write(self, file: Path, data: bytes) -> None:
        digest = hashlib.sha256(data).digest()
        if digest == self._saved:
            return
        with _opened_folder(file.parent):
            descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
            try:
                with open(descriptor, "wb") as aside:
                    aside.write(data)
                os.replace(name, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        self._saved = digest
        logger.debug("%s: %d bytes of compiled kernels", file, len(data))

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            data = _read_own(self._file)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("the compiled kernels of TensorRT-RTX are not used: %s", error)
            return
        try:
            is_taken = self._cache.deserialize(data)
        except RuntimeError as error:
            logger.debug("%s: %s", self._file, error)
            is_taken = False
        if is_taken:
            self._saved = hashlib.sha256(data).digest()
        else:
            logger.warning(
                "%s is damaged, or comes from another GPU, driver or TensorRT-RTX; the kernels are compiled again",
                self._file,
            )


def _read_own(file: Path) -> bytes:
    with _opened_folder(file.parent) as folder:
        descriptor = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        with open(descriptor, "rb") as opened:
            require_own(file, os.fstat(descriptor))
            return opened.read()


@contextlib.contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    """A descriptor of a folder that is this user's own.

    Raises:
        OSError: the folder is missing, is a link, or somebody else may write to it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        require_own(folder, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)

"""A file that is opened once: what was verified is what an engine gets, whatever happens to its path meanwhile.

A rename over the path leaves an open file as it is. A write into the file itself does not, and nothing prevents it; so
`HeldFile.require_unchanged` tells an engine of it before the next batch.
"""

import functools
import hashlib
import mmap
import os
import threading
import weakref
from pathlib import Path

from gte_deploy.core.errors import BackendError, BundleError
from gte_deploy.core.regular import open_regular

_CHUNK_BYTES = 1 << 20

Identity = tuple[int, int, int, int]
"""Device, number, size in bytes and time of the last write of a file: they change with its content."""


class HeldFile:
    """An open file of a bundle with the size and hash that the manifest says. Threads and forked children may use it.

    Args:
        folder: the bundle.
        name: path of the file in the bundle, with forward slashes.
        size: expected number of bytes.
        sha256: expected hex digest.
        keeps_content: whether `content` is kept.
    """

    def __init__(self, folder: Path, name: str, size: int, sha256: str, *, keeps_content: bool = False) -> None:
        """Open and verify the file.

        Raises:
            BundleError: the file is missing or differs; the message names it and both values.
        """
        self.path = folder / name
        """The path by which the file was opened."""
        self.content: bytes | None = None
        """All bytes of the file, as they were hashed; None if they are not kept."""
        self._sha256 = sha256
        self._lock = threading.Lock()
        require_inside(self.path, folder)
        # A file of the Hugging Face cache is a link; huggingface_hub downloads what its target lacks.
        linked = self.path.is_symlink()
        remedy = f"Remove {os.path.realpath(self.path)} and download it again." if linked else "Export it again."
        self._descriptor = self._open()
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Close the file; a mapping of it stays usable. Idempotent."""
        self.identity = _identity(os.fstat(self._descriptor))
        """The identity of the verified file."""
        if self.identity[2] != size:
            self.close()
            raise BundleError(f"{self.path} has {self.identity[2]:,} bytes, and the manifest says {size:,}. {remedy}")
        digest = self._hash(keeps_content)
        if digest != sha256:
            self.close()
            raise BundleError(f"{self.path} has sha256 {digest}, and the manifest says {sha256}. {remedy}")

    def _open(self) -> int:
        try:
            return open_regular(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                f"{self.path} is missing, but the manifest names it. Export or download the bundle again."
            ) from error
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self.path} cannot be opened ({error}). Export or download the bundle again."
            ) from error

    def _hash(self, keeps_content: bool = False) -> str:
        digest = hashlib.sha256()
        chunks = []
        with open(self._descriptor, "rb", buffering=0, closefd=False) as file:
            file.seek(0)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                if keeps_content:
                    chunks.append(chunk)
        if keeps_content:
            self.content = b"".join(chunks)
        return digest.hexdigest()

    @functools.cached_property
    def mapped(self) -> mmap.mmap:
        """The file, mapped into memory; nothing that is written there reaches the file.

        It is not read only, because OpenVINO takes no arrays that are; no engine writes into its weights.
        """
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)

    def release_pages(self) -> None:
        """Take the mapped pages out of the process's resident memory, until somebody reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)

    def require_unchanged(self) -> None:
        """Refuse a file into which something was written since it was verified. It takes a microsecond.

        A file with a new time and the old content counts as unchanged; it is read again to know it.

        Raises:
            BackendError: the file has other content, or the process has closed it.
        """
        try:
            found = _identity(os.fstat(self._descriptor))
            if found == self.identity:
                return
            with self._lock:
                same_file = found[:3] == self.identity[:3]
                if same_file and (found == self.identity or self._hash() == self._sha256):
                    self.identity = found
                    return
        except OSError as error:
            raise BackendError(f"{self.path} was closed by other code of this process ({error})") from error
        raise BackendError(f"{self.path} has changed since it was loaded; load the bundle again")

    def require_same_path(self) -> None:
        """Refuse a path that leads to another file than the verified one by now, or to a changed one.

        Raises:
            BundleError: the file at the path was replaced or changed.
        """
        try:
            found = _identity(os.stat(self.path))
        except OSError:
            found = None
        if found != self.identity:
            raise BundleError(f"{self.path} has changed since it was verified; load the bundle again")


def _identity(found: os.stat_result) -> Identity:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def require_inside(file: Path, folder: Path) -> None:
    """Refuse a file that a link leads out of the folder of its bundle.

    Raises:
        BundleError: the file, or a folder that it is in, is such a link.
    """
    # A Hugging Face cache links each file of a snapshot into ../../blobs of the same repository.
    # Not by Path.resolve, which raises RuntimeError for links in a circle.
    target, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if not (target.is_relative_to(root) or target.is_relative_to(root.parent.parent / "blobs")):
        raise BundleError(
            f"{file} is a link that points out of the bundle, or is in a linked folder; a bundle must hold its own "
            "files."
        )

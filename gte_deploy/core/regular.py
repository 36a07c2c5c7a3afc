"""Reads files that come from elsewhere: whole, of a bounded size, and only if they are regular files.

To open a pipe waits for a writer, and a device may never end. So the kind of a file is looked at before it is read, and
by the descriptor that is read: a name may stand for something else a moment later.
"""

import errno
import os
import stat
from pathlib import Path

MAX_JSON_BYTES = 1 << 28
"""The largest JSON file of a model that is read; a tokenizer.json with 256,000 words has 17 to 34 MB."""


def open_regular(path: Path, *, follow_links: bool = True) -> int:
    """Return a descriptor from which a regular file is read. Child processes do not inherit it.

    Raises:
        OSError: the file cannot be read, is a folder (EISDIR), a pipe or a device (EINVAL), or a link (ELOOP) unless
            links are followed.
    """
    # Without the first, opening a pipe waits for a writer; without the second, Windows translates line ends.
    names = ("O_NONBLOCK", "O_BINARY", *(() if follow_links else ("O_NOFOLLOW",)))
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, name, 0) for name in names))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "It is a pipe, a socket or a device, not a file", str(path))


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: as `open_regular`, or the file has more than `most` bytes (EFBIG).
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
        if size > most or len(data) > most:
            raise OSError(errno.EFBIG, f"It has more than {most:,} bytes", str(path))
        return data

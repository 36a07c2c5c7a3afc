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


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: the file cannot be read, is a folder (EISDIR), a pipe or a device (EINVAL), or has more than `most`
            bytes (EFBIG).
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "It is a pipe, a socket or a device, not a file", str(path))
        data = file.read(most + 1) if found.st_size <= most else b""
        if found.st_size > most or len(data) > most:
            raise OSError(errno.EFBIG, f"It has more than {most:,} bytes", str(path))
        return data

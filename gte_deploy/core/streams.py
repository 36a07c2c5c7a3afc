"""The standard streams of a command: those that were closed before it began, and characters that they cannot show."""

import contextlib
import errno
import io
import os
import sys

CLOSED_STDOUT = "stdout is closed, and results are printed there. Let it be open, or redirect it to a file"


def prepare_streams() -> None:
    """Let each standard stream exist, and print what its encoding lacks as escapes. A command calls this first.

    Without it, the next file that is opened gets the number of a closed stream, and what libraries print ends in it.
    What is printed into a closed stdout is an OSError, see `is_closed_stdout`; into a closed stderr it is lost.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is that of the stream
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)
    if sys.stdout is None:
        # Opened for reading and without a buffer: each print fails, as into what is closed.
        unopened = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(unopened, encoding="utf-8", write_through=True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_closed_stdout(error: OSError) -> bool:
    """Whether an error means that stdout was closed before the command began."""
    return error.errno == errno.EBADF and error.filename is None


def drop_unwritten() -> None:
    """Throw away what was printed and cannot be written, such as to a full disk: Python would fail on it at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

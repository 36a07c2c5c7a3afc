"""Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes its unfinished work."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_previous: dict[signal.Signals, Any] = {}
"""The signals that raise now, and the handlers that they had before."""
_forking = threading.local()


class Terminated(KeyboardInterrupt):  # noqa: N818 -- no error, as KeyboardInterrupt is none
    """Raised in the main thread when a signal ends the command; what handles Ctrl-C handles it, too."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"ended by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """The exit code by which shells and schedulers know the signal: 128 and its number."""
        return 128 + self.signal


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """A `with` block in which SIGTERM and SIGHUP raise `Terminated`; a second signal ends the process at once.

    A signal that is ignored, as after `nohup`, or that has a handler already, is left as it is. A forked process ends
    at a signal as it would without the block: its parent cleans up.
    """
    # Python allows handlers in the main thread alone. A block inside of another changes nothing.
    sets = threading.current_thread() is threading.main_thread() and not _previous
    if sets:
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                _previous[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        if sets:
            _restore()


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _restore()
    raise Terminated(number)


def _restore() -> None:
    while _previous:
        signal.signal(*_previous.popitem())


def _before_fork() -> None:
    # A signal that comes before Python has set up the new process would be forgotten. So it waits.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _previous) if _previous else None


def _after_fork() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    _restore()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)

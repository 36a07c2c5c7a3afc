"""Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes its unfinished work."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


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

    A signal that is ignored, as after `nohup`, or that has a handler already, is left as it is.
    """
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _raising(os.getpid(), previous))
    try:
        yield
    finally:
        _restore(previous)


def _raising(owner: int, previous: dict[signal.Signals, Any]) -> Any:
    def handle(number: int, frame: FrameType | None) -> NoReturn:
        _restore(previous)
        if os.getpid() != owner:  # a forked worker ends as it would without us: its parent cleans up
            os.kill(os.getpid(), number)
        raise Terminated(number)

    return handle


def _restore(previous: dict[signal.Signals, Any]) -> None:
    while previous:
        signal.signal(*previous.popitem())

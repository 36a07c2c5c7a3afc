"""Keeps loaded models usable when the process forks: a child answers or raises an error, and never hangs.

A child has one thread, the one that forked. The other threads of an engine are gone, and their locks stay locked. So

- a fork waits until no engine computes, and no engine starts meanwhile: then no lock is held (`in_use`);
- in the child each model leaves its engine untouched and opens another one at its first use (`follow`).

This covers `os.fork`, `os.forkpty` and multiprocessing. A process that `subprocess` or multiprocessing's "spawn" starts
inherits nothing.
"""

import contextlib
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

# A fork waits at most so long for computations to end. A batch on a CPU takes less time; opening a model may take more.
_PATIENCE_S = 10.0
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_OFF = ("", "off", "false", "f", "no", "n", "0")  # as tokenizers reads it


class Follower(Protocol):
    """An object that has to act in a forked child."""

    def after_fork(self, *, idle: bool) -> None:
        """Act in the child, before anything else runs; `idle` says that no engine computed at the fork."""
        ...


class _Gate(AbstractContextManager[None]):
    """Lets many computations in at once, and a fork only while no computation is inside."""

    def __init__(self) -> None:
        self.followers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._inside: dict[int, int] = {}  # thread -> nesting depth
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        # A signal handler may fork while its own thread holds the lock, so it is an RLock: Condition's default.
        self._changed = threading.Condition()
        self._forks = 0
        self._idle = True

    def __enter__(self) -> None:
        self.enter()

    def enter(self, *, waits: bool = True) -> None:
        """Go inside; by default, wait for a fork that waits for others."""
        if self._pid != os.getpid():  # C code forked without Python's hooks
            self.after_in_child()
        me = threading.get_ident()
        with self._changed:
            while waits and self._forks and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(self, *error: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    def before(self) -> None:
        self._changed.acquire()
        self._forks += 1
        me = threading.get_ident()
        others_left = self._changed.wait_for(lambda: not self._inside.keys() - {me}, _PATIENCE_S)
        self._idle = others_left and me not in self._inside

    def after_in_parent(self) -> None:
        self._forks -= 1
        self._changed.notify_all()
        self._changed.release()

    def after_in_child(self) -> None:
        idle = self._idle if self._forks else not self._inside
        me = threading.get_ident()
        self._inside = {thread: depth for thread, depth in self._inside.items() if thread == me}
        self._reset()
        if "tokenizers" in sys.modules and os.environ.get(_PARALLELISM, "").lower() not in _OFF:
            # The threads of tokenizers are gone. It switches them off by itself only if the variable is not set.
            os.environ[_PARALLELISM] = "false"
        for follower in list(self.followers):
            follower.after_fork(idle=idle)


_gate = _Gate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_gate.before, after_in_parent=_gate.after_in_parent, after_in_child=_gate.after_in_child)


def in_use() -> AbstractContextManager[None]:
    """A `with` block for the work of an engine: no other thread forks inside it. Blocks may be nested."""
    return _gate


@contextlib.contextmanager
def in_use_for_others() -> Iterator[None]:
    """A `with` block of a thread that computes for threads inside `in_use`: a fork waits for them, so it must go on."""
    _gate.enter(waits=False)
    try:
        yield
    finally:
        _gate.__exit__()


def follow(follower: Follower) -> None:
    """Call `follower.after_fork` in every forked child. The reference to `follower` is weak."""
    _gate.followers.add(follower)


def keep_for_good(engine: object) -> None:
    """Never free an engine that a child inherited: freeing it would wait for threads that do not exist."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))

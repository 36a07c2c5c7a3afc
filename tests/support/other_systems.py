"""Takes from Python what Windows has not, so that code which needs it fails here too.

`become_windows()` is for a process of its own. It is no Windows: paths and processes stay those of Linux.
"""

import builtins
import importlib
import os
import pathlib
import shutil
import signal
import sys

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "spwd", "nis", "posixshmem")
"""Of the standard library, and not in Python for Windows."""
_OS = (
    "fork forkpty register_at_fork sched_getaffinity sched_setaffinity sched_yield uname getuid geteuid getgid getegid "
    "getgroups getpgid getpgrp setsid chown fchown lchown fchmod getloadavg mkfifo mknod statvfs fstatvfs sysconf "
    "WIFEXITED waitid wait3 wait4 nice killpg O_NOFOLLOW O_DIRECTORY O_NONBLOCK O_CLOEXEC"
).split()
_SIGNALS = ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "setitimer", "alarm")
_OURS = ("gte_deploy",)


def become_windows() -> None:
    """Take them away: from our own modules whatever is named above, and from every module some behaviour of files."""
    _hide_from_ours()
    sys.addaudithook(_refuse)
    os.rename = _rename  # type: ignore[assignment]
    os.symlink = _symlink  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # as on Windows


def _hide_from_ours() -> None:
    """Other packages keep what they have: their code for Linux needs it, and on Windows they run other code."""
    original = builtins.__import__

    def limited(name, globals=None, locals=None, fromlist=(), level=0):
        if not _is_ours((globals or {}).get("__name__")):
            return original(name, globals, locals, fromlist, level)
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return {"os": limited_os, "signal": limited_signal}.get(name) or original(
            name, globals, locals, fromlist, level
        )

    limited_os, limited_signal = _without(os, _OS), _without(signal, _SIGNALS)
    builtins.__import__ = limited


def _without(module, names):
    """A view of a module that lacks some names. It stays the module for everything else, also where tests patch it."""
    missing = {name for name in names if hasattr(module, name)}
    assert missing, module

    class View(type(importlib)):
        def __getattr__(self, name):
            if name in missing:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(module, name)

    return View(module.__name__)


def _is_ours(name) -> bool:
    return name is not None and name.split(".")[0] in _OURS


def _calls_from_ours() -> bool:
    frame = sys._getframe(2)  # that of `open`, unless this module opens
    while frame is not None and frame.f_globals.get("__name__") in (pathlib.__name__, "os"):
        frame = frame.f_back
    return frame is not None and _is_ours(frame.f_globals.get("__name__"))


def _refuse(event: str, args) -> None:
    if event != "open" or not isinstance(args[0], str | os.PathLike) or not _calls_from_ours():
        return
    path = os.fspath(args[0])
    if path.startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", path)
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)


_rename_here, _symlink_here = os.rename, os.symlink


def _rename(source, target, **options):
    if os.path.lexists(target):
        raise FileExistsError(17, "Cannot create a file when that file already exists", os.fspath(target))
    if os.path.isdir(source) and (inside := _open_below(os.path.realpath(source))):
        raise PermissionError(13, f"Windows renames no folder with open files: {inside}", os.fspath(source))
    _rename_here(source, target, **options)


def _open_below(folder: str) -> list[str]:
    """The files below a folder that this process has open or mapped."""
    paths = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths += [line.rstrip("\n").partition("/")[2] for line in maps]
    return sorted({path for path in paths if f"/{path.lstrip('/')}".startswith(f"{folder}/")})


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def _symlink(source, target, **options):
    raise OSError(22, "A required privilege is not held by the client", os.fspath(target))

"""Debian's packages, unpacked into a folder: programs that this system does not have, without a change to it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

_TIMEOUT_S = 900
_ERROR_CHARS = 800


class Unavailable(Exception):
    """Something cannot be set up here: no apt, no network, or no package of that name."""


def run(
    command: Sequence[str],
    error: type[Exception] = Unavailable,
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Run a command, and return its stdout.

    Raises:
        Unavailable, or `error`: it failed; the message ends with its stderr.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise error(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-_ERROR_CHARS:]}")
    return done.stdout


def require(*programs: str) -> None:
    """Refuse a system without apt, or without another program."""
    missing = [name for name in ("apt-get", "dpkg-deb", *programs) if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"{missing[0]} is missing here; this is made of Debian's packages")


def unpack(packages: Iterable[str], target: Path, work: Path, options: Iterable[tuple[str, object]]) -> list[str]:
    """Download packages with all that they need, and unpack them into `target`; return apt's command.

    Args:
        packages: names of packages.
        target: the folder that gets their files.
        work: folder for apt's lists and archives, which the caller deletes.
        options: further settings of apt, such as an architecture or other sources.

    Raises:
        Unavailable: a package cannot be had, with the reason of apt.
    """
    archives = work / "cache" / "archives"
    for path in (work / "state" / "lists" / "partial", archives / "partial"):
        path.mkdir(parents=True)
    (work / "status").touch()  # no package is installed there
    settings = [
        ("APT::Install-Recommends", "false"),
        ("APT::Sandbox::User", "root"),
        ("Dir::State", work / "state"),
        ("Dir::State::status", work / "status"),
        ("Dir::Cache", work / "cache"),
        *options,
    ]
    apt = ["apt-get", "--quiet", *(word for name, value in settings for word in ("-o", f"{name}={value}"))]
    run([*apt, "update"])
    run([*apt, "--yes", "--download-only", "install", *packages])
    for archive in archives.glob("*.deb"):
        run(["dpkg-deb", "-x", str(archive), str(target)])
    return apt


def mirror() -> str:
    """Return the address from which this system gets Debian's packages.

    Raises:
        Unavailable: it names none.
    """
    addresses = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    for address in addresses:
        if address.rstrip("/").endswith("/debian"):
            return address
    raise Unavailable("apt's sources name no mirror of Debian")

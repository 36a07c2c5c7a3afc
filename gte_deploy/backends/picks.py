"""Picks: the engine that `gte-deploy bench --pick` measured to be the fastest for a bundle, kept in the user's cache.

A pick holds for the same bundle on the same CPU model, number of CPUs and engine versions; the name of its file is a
hash of these. A bundle holds no pick, since another machine may have another fastest engine.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy._version import __version__
from gte_deploy.backends.stream_plan import ListPick
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.files import cache_folder, write_text
from gte_deploy.core.own_cache import own_cache_folder, read_own

logger = logging.getLogger(__name__)

_FORMAT = "gte-deploy-pick"
_FOLDER = "picks"
_ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Pick:
    """The engine that was picked, and the measurements behind the choice.

    Args:
        backend: the backend, as `gte_deploy.load` takes it.
        precision: the compute precision, as `gte_deploy.load` takes it; None for that of the bundle.
        measured: engine -> shape -> median seconds, for every measured engine.
        date: the date of the measurement, ISO 8601.
        versions: engine -> version, for the installed engines.
        lists: what is fastest for lists of texts; None if that was not measured.
    """

    backend: str
    precision: str | None
    measured: Mapping[str, Mapping[str, float]]
    date: str
    versions: Mapping[str, str]
    lists: ListPick | None = None


def lookup(manifest_checksum: str) -> Pick | None:
    """The pick for the bundle whose manifest has this checksum; None if there is none for this machine.

    A file that cannot be read, that belongs to another bundle or machine, or that another user can have written, is
    ignored with a warning.
    """
    key = _key(manifest_checksum)
    try:
        file = _file(key)
        if not file.exists():
            return None
    except OSError:  # without a readable cache there are no picks
        return None
    try:
        return _parsed(file, key)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        # RuntimeError: the JSON is nested too deep.
        logger.warning("ignoring a recorded pick: %s; measure again with gte-deploy bench --pick", error)
        return None


def save(manifest_checksum: str, pick: Pick) -> Path:
    """Record `pick` for this bundle on this machine, in place of an older one; return the file.

    Raises:
        PermissionError: the folder is another user's, or others may write to it.
        OSError: the cache cannot be written, or the user has no home folder.
    """
    key = _key(manifest_checksum)
    own_cache_folder(_FOLDER)
    file = _file(key)
    content = {"format": _FORMAT, "key": key, "pick": dataclasses.asdict(pick)}
    write_text(file, json.dumps(content, indent=2) + "\n")
    return file


def engine_versions() -> dict[str, str]:
    """Package -> version, for gte-deploy and each installed engine; imports nothing."""
    versions = {"gte-deploy": __version__}
    for name in _ENGINES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """The CPU's name from the system, such as "AMD EPYC 9R14"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _key(manifest_checksum: str) -> dict[str, Any]:
    return {
        "manifest_checksum": manifest_checksum,
        "cpu": cpu_model(),
        "cpus": available_cpus(),
        "versions": engine_versions(),
    }


def _file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / _FOLDER / f"{digest[:32]}.json"


def _parsed(file: Path, key: Mapping[str, Any]) -> Pick:
    own_cache_folder(_FOLDER, create=False)
    content = json.loads(read_own(file, max_bytes=_MAX_BYTES))
    if content["format"] != _FORMAT or content["key"] != key:
        raise ValueError(f"{file} is not a pick for this bundle and machine")
    fields = content["pick"]
    pick = Pick(**{**fields, "lists": fields.get("lists") and ListPick.from_json(fields["lists"])})
    if not isinstance(pick.backend, str) or not isinstance(pick.precision, str | None):
        raise ValueError(f"{file} names no backend")
    return pick

"""Units of work: the inputs of `gte-train prepare` are cut into units, and one worker encodes a unit into one shard."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.readers import (
    DATASET_PREFIX,
    PARQUET_SUFFIXES,
    SUFFIXES,
    Unit,
    load_dataset,
    parquet_library,
)

UNIT_BYTES = 32 << 20  # smaller files share a unit with their neighbours
_LANGUAGE = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,31})=(.+)", re.DOTALL)


def plan_units(inputs: Sequence[str]) -> list[Unit]:
    """Cut the inputs into units. The units of one language lie side by side, otherwise the given order stays.

    Raises:
        InputError: an input does not exist, is given twice, or has no known format.
    """
    if not inputs:
        raise InputError("no input is given: name files, folders or hf:DATASET")
    parts: list[dict[str, Any]] = []
    seen: set[str] = set()
    for text in inputs:
        language, place = _split_language(text)
        if place.startswith(DATASET_PREFIX):
            parts += _dataset_parts(language, place.removeprefix(DATASET_PREFIX))
            continue
        files = _expand(place)
        if twice := seen & {str(file) for file in files}:
            raise InputError(f"{min(twice)} is given twice (again by {text!r}): name each input once")
        seen.update(str(file) for file in files)
        parts += _file_parts(language, files)
    order = list(dict.fromkeys(part["language"] for part in parts))
    parts.sort(key=lambda part: order.index(part["language"]))
    return [Unit(number=number, **part) for number, part in enumerate(parts)]


def _split_language(text: str) -> tuple[str, str]:
    match = _LANGUAGE.fullmatch(text)
    return (match[1], match[2]) if match and not Path(text).exists() else ("", text)


def _expand(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(place, recursive=True)) if Path(name).is_file()]
    if not files:
        raise InputError(
            f"{place!r} names no file: expected {', '.join(SUFFIXES)}, a folder or a glob of them, or hf:…"
        )
    if any(file.name.endswith(PARQUET_SUFFIXES) for file in files):
        parquet_library()
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"{file} has no known format: expected a name that ends with {', '.join(SUFFIXES)}")
    return [file.resolve() for file in files]


def _file_parts(language: str, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    group: list[Path] = []
    held = 0
    for file in files:
        group.append(file)
        held += file.stat().st_size
        if held >= UNIT_BYTES:
            yield _file_part(language, group)
            group, held = [], 0
    if group:
        yield _file_part(language, group)


def _file_part(language: str, files: Sequence[Path]) -> dict[str, Any]:
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))
    return {"language": language, "files": tuple(str(file) for file in files), "stamps": stamps}


def _dataset_parts(language: str, dataset: str) -> list[dict[str, Any]]:
    shards = load_dataset(dataset).num_shards
    return [
        {"language": language, "dataset": dataset, "dataset_shard": i, "dataset_shards": shards} for i in range(shards)
    ]

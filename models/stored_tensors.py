"""The tensors of a checkpoint's safetensors files: reads those that are asked for, and writes whole files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gte_deploy.core.errors import CheckpointError
from gte_deploy.models.weight_files import INDEX

MAX_NAMED = 10
"""The most tensors that an error message names."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file; `read` reads its data.

    Args:
        handle: the open file.
        name: stored name.
        file: path of the file.
        shape: stored shape.
        dtype: stored type under safetensors' name, such as "F32".
    """

    handle: Any
    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Read the tensor.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return self.handle.get_tensor(self.name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read ({error}). Copy the file again.") from error


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file of PyTorch; a failure leaves a part of the file.

    Args:
        tensors: name -> tensor. No two may share memory.
        file: the file.
        metadata: further fields of its header.

    Raises:
        CheckpointError: the file cannot be written, because the disk is full for example.
    """
    try:
        save_file(dict(tensors), file, {"format": "pt", **(metadata or {})})
    except (SafetensorError, OSError) as error:
        raise unwritten(file, error) from error


def unwritten(place: Path, error: Exception) -> CheckpointError:
    """The error of a file or folder that safetensors could not write, because the disk is full for example."""
    return CheckpointError(
        f"{place} cannot be written: {error}",
        advice="Make room on the disk, or write to another one, and repeat the command.",
    )


def open_tensors(files: Mapping[Path, set[str] | None], stack: ExitStack) -> dict[str, StoredTensor]:
    """Return every tensor of the files by its stored name; the files stay open until `stack` closes.

    Args:
        files: file -> the tensor names that an index lists for it, or None without an index.
        stack: closes the files.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors differ from those in its index.
    """
    stored: dict[str, StoredTensor] = {}
    for file, expected in files.items():
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            names = list(handle.keys())
            slices = {name: handle.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}). Copy it again.") from error
        if expected is not None and set(names) != expected:
            odd = sorted(set(names) ^ expected)
            raise CheckpointError(f"{file} does not hold what {INDEX} says: {', '.join(odd[:MAX_NAMED])}")
        for name, part in slices.items():
            stored[name] = StoredTensor(handle, name, file, tuple(part.get_shape()), part.get_dtype())
    return stored

"""Writes arrays as .npy files. On a full disk `np.save` raises an error that does not say so; these do."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array to a .npy file; a failure leaves a part of it.

    Raises:
        OSError: the file cannot be written.
    """
    save_rows(path, [array], shape=array.shape, dtype=array.dtype)


def array_writer(array: NDArray[Any]) -> Callable[[Path], None]:
    """The function that writes the array to a path, for `core.files.write_with`."""
    return lambda aside: save_array(aside, array)


def save_rows(path: Path, parts: Iterable[NDArray[Any]], *, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write arrays that follow each other, and together have the shape and dtype, to a .npy file.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)

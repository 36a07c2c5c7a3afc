"""Chooses the profile of a TensorRT engine for a batch, pads the batch to it, and removes the padding again.

This module computes only numbers and does not use CUDA.

Shapes: B rows, S tokens, M masks of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile

# TensorRT prepares kernels and graphs for every new length. Lengths are rounded up in steps of a 32nd of the next power
# of two, at least 8. That leaves 112 lengths up to 8,192 and adds at most 7 tokens or 6 %.
_LEAST_STEP, _STEPS = 8, 32
# Rows are rounded up in steps of an eighth of the next power of two: 1 to 8, 10, 12, 14, 16, 20 and so on. Of 1 to 32
# rows, equally often, that adds 5 %.
_ROW_STEPS = 8


@dataclass(frozen=True)
class SubBatch:
    """The part of a batch that one run of the engine computes.

    Args:
        rows: the rows of the batch.
        masks: indices of the batch's mask positions that lie in those rows.
        profile: index of the engine's profile.
        shape: (rows, tokens of a row) after padding; for a padding-free engine, (texts, tokens of all texts).
        num_masks: mask positions after padding.
        places: for a padding-free engine, the row among `rows` of every token and its position in the row, [T] each.
    """

    rows: slice
    masks: NDArray[np.int64]
    profile: int
    shape: tuple[int, int]
    num_masks: int
    places: tuple[NDArray[np.int64], ...] | None = None


def choose_profile(profiles: Sequence[Profile], rows: int, length: int) -> int:
    """Index of the smallest profile that takes `rows` x `length`, padded to the profile's minimum.

    If no profile takes so many rows, it is the profile with the most rows that takes the length; the caller then splits
    the batch.

    Raises:
        InputError: no profile takes the length.
    """
    longs = [index for index, profile in enumerate(profiles) if profile.max[1] >= length]
    if not longs:
        raise InputError(
            f"the batch has rows of {length:,} tokens, and the engine's profiles (batch x sequence as min:opt:max) are "
            f"{', '.join(map(str, profiles))}. Shorten the texts, or export with a profile that takes them (--profile)."
        )

    def cost(index: int) -> tuple[int, int, int]:
        low, high = profiles[index].min, profiles[index].max
        padded = max(rows, low[0]) * max(length, low[1])
        return max(0, rows - high[0]), padded, high[0] * high[1]

    return min(longs, key=cost)


def padded_length(length: int, profile: Profile) -> int:
    """The length that `length` tokens are padded to in this profile."""
    step = max(_LEAST_STEP, (1 << (length - 1).bit_length()) // _STEPS)
    return min(max(-(-length // step) * step, profile.min[1]), profile.max[1])


def padded_rows(rows: int, profile: Profile) -> int:
    """The number of rows that `rows` rows are padded to for a CUDA graph of this profile."""
    step = max(1, (1 << (rows - 1).bit_length()) // _ROW_STEPS)
    return min(-(-rows // step) * step, profile.max[0])


def split_batch(
    batch: Batch, profiles: Sequence[Profile], masks: Sequence[tuple[int, int]] | None = None
) -> Iterator[SubBatch]:
    """Split a batch into sub-batches: one, unless it has more rows or masks than a profile takes.

    Args:
        batch: the batch to run.
        profiles: the engine's profiles.
        masks: (least, most) mask positions that each profile takes; None if the engine takes none.

    Raises:
        InputError: no profile takes the length of the batch.
    """
    count, length = batch.input_ids.shape
    index = choose_profile(profiles, count, length)
    profile = profiles[index]
    for start in range(0, count, profile.max[0]):
        rows = slice(start, min(start + profile.max[0], count))
        shape = (max(rows.stop - start, profile.min[0]), padded_length(length, profile))
        for chosen, number in mask_groups(batch, rows, None if masks is None else masks[index]):
            yield SubBatch(rows, chosen, index, shape, number)


def mask_groups(batch: Batch, rows: slice, limits: tuple[int, int] | None) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Groups of indices of the mask positions in `rows`, and the number to pad each group to.

    There is one group, which may be empty, unless the engine takes fewer at once. `limits` are the (least, most)
    positions that the profile takes; None if the engine takes none.
    """
    if limits is None or batch.mask_positions is None:
        yield np.empty(0, np.int64), 0 if limits is None else limits[0]
        return
    least, most = limits
    row = batch.mask_positions[:, 0]
    inside = np.flatnonzero((row >= rows.start) & (row < rows.stop))
    for first in range(0, max(len(inside), 1), most):
        chosen = inside[first : first + most]
        # Powers of two, so that few different counts occur.
        wanted = 1 << max(len(chosen) - 1, 0).bit_length()
        yield chosen, min(max(wanted, least), most)


def write_inputs(batch: Batch, sub_batch: SubBatch, inputs: Mapping[str, NDArray[Any]], *, pad_token_id: int) -> None:
    """Write a sub-batch into the input arrays of the engine, which have the padded shapes of the sub-batch.

    A row of padding holds one token, because attention over no tokens is NaN. Extra mask positions point at the first
    token of the first row.
    """
    rows, length = sub_batch.rows.stop - sub_batch.rows.start, batch.input_ids.shape[1]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids[:] = pad_token_id
    mask[:] = 0
    mask[rows:, 0] = 1
    ids[:rows, :length] = batch.input_ids[sub_batch.rows]
    mask[:rows, :length] = batch.attention_mask[sub_batch.rows]
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        types[:] = 0
        if batch.token_type_ids is not None:
            types[:rows, :length] = batch.token_type_ids[sub_batch.rows]
    if "mask_positions" in inputs:
        positions = inputs["mask_positions"]
        positions[:] = 0
        if len(sub_batch.masks):
            assert batch.mask_positions is not None  # the sub-batch's masks are indices into it
            positions[: len(sub_batch.masks)] = batch.mask_positions[sub_batch.masks] - (sub_batch.rows.start, 0)


class PaddedLayout:
    """Computes the shapes of a graph's tensors from those of a batch."""

    def __init__(self, tensors: Mapping[str, Sequence[int | str]]) -> None:
        """`tensors` maps tensors to axes, each a size or a name that an input has too."""
        self.tensors = dict(tensors)
        self._rows, self._tokens = self.tensors["input_ids"]
        self._masks = self.tensors["mask_positions"][0] if "mask_positions" in self.tensors else None

    split = staticmethod(split_batch)
    write = staticmethod(write_inputs)

    @staticmethod
    def with_common_shape(sub_batch: SubBatch, profile: Profile) -> SubBatch:
        """The same sub-batch with its rows padded too, so that many sub-batches share a shape and its CUDA graph."""
        rows, length = sub_batch.shape
        return replace(sub_batch, shape=(padded_rows(rows, profile), length))

    def shapes(self, batch: tuple[int, ...], num_masks: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, for a batch of (rows, tokens)."""
        sizes = {self._rows: batch[0], self._tokens: batch[1], self._masks: num_masks}
        return {
            name: tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)
            for name, axes in self.tensors.items()
        }

    def results(self, batch: Batch, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Arrays for the outputs of a whole batch, as every backend returns them."""
        num_masks = 0 if batch.mask_positions is None else len(batch.mask_positions)
        shapes = self.shapes(batch.input_ids.shape, num_masks)
        return {name: np.empty(shapes[name], np.float32) for name in names}

    def place(self, name: str, values: NDArray[Any], sub_batch: SubBatch, result: NDArray[np.float32]) -> None:
        """Copy an output of a sub-batch, without padding, to its rows or masks in the result of the whole batch."""
        axes = self.tensors[name]
        if len(axes) > 1 and axes[1] == self._tokens:
            values = values[:, : result.shape[1]]
        if axes[0] == self._masks:
            result[sub_batch.masks] = values[: len(sub_batch.masks)]
        else:
            result[sub_batch.rows] = values[: sub_batch.rows.stop - sub_batch.rows.start]

"""Which profile of a TensorRT engine runs a batch, and how the batch gets into its shape and out of it.

Numbers only, no CUDA.

Shapes: B rows, S tokens, M masks of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile

# TensorRT prepares kernels and graphs for every new length. Steps of a 32nd of the next power of two, of 8 at least,
# leave 112 lengths up to 8,192 and add 8 tokens or 6 % at most.
_LEAST_STEP, _STEPS = 8, 32


@dataclass(frozen=True)
class SubBatch:
    """What one run of the engine computes of a batch.

    Args:
        rows: of the batch.
        masks: indices of the batch's mask positions that lie in those rows.
        profile: index of the engine's profile.
        shape: (rows, tokens of each) after padding; of a padding-free engine, (texts, tokens of all).
        num_masks: mask positions after padding.
        places: of every token, its row among `rows` and its place there, [T] each; of a padding-free engine.
    """

    rows: slice
    masks: NDArray[np.int64]
    profile: int
    shape: tuple[int, int]
    num_masks: int
    places: tuple[NDArray[np.int64], ...] | None = None


def choose_profile(profiles: Sequence[Profile], rows: int, length: int) -> int:
    """Index of the smallest profile that takes `rows` x `length` once it is padded to the profile's minimum.

    Where none takes so many rows, that of most rows which takes the length; the rows are to be run in parts.

    Raises:
        InputError: every profile ends below the length.
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


def split_batch(
    batch: Batch, profiles: Sequence[Profile], masks: Sequence[tuple[int, int]] | None = None
) -> Iterator[SubBatch]:
    """Cut a batch into runs of the engine: one, unless it has more rows or masks than a profile takes.

    Args:
        batch: to be run.
        profiles: of the engine.
        masks: (least, most) mask positions that each profile takes; None where the engine takes none.

    Raises:
        InputError: every profile ends below the batch's length.
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
    """Indices of the mask positions in `rows`, no more at once than the engine takes, and the number to pad them to.

    One group, which may be empty, where they fit. `limits` are the (least, most) that the profile takes; None where the
    engine takes none.
    """
    if limits is None or batch.mask_positions is None:
        yield np.empty(0, np.int64), 0 if limits is None else limits[0]
        return
    least, most = limits
    row = batch.mask_positions[:, 0]
    inside = np.flatnonzero((row >= rows.start) & (row < rows.stop))
    for first in range(0, max(len(inside), 1), most):
        chosen = inside[first : first + most]
        # Powers of two: as lengths are, so that counts repeat.
        wanted = 1 << max(len(chosen) - 1, 0).bit_length()
        yield chosen, min(max(wanted, least), most)


def write_inputs(batch: Batch, sub_batch: SubBatch, inputs: Mapping[str, NDArray[Any]], *, pad_token_id: int) -> None:
    """Write a part of a batch into the engine's input arrays, which have the part's padded shapes.

    A row that only pads the batch holds one token: attention over none at all is NaN. What pads the mask positions
    points at the first token of the first row.
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
            assert batch.mask_positions is not None  # the part's masks are indices into it
            positions[: len(sub_batch.masks)] = batch.mask_positions[sub_batch.masks] - (sub_batch.rows.start, 0)


class Layout:
    """How the shapes of a graph's tensors follow from a batch."""

    def __init__(self, tensors: Mapping[str, Sequence[int | str]]) -> None:
        """`tensors` gives the axes of each: a size, or a name that the inputs have too."""
        self.tensors = dict(tensors)
        self._rows, self._tokens = self.tensors["input_ids"]
        self._masks = self.tensors["mask_positions"][0] if "mask_positions" in self.tensors else None

    split = staticmethod(split_batch)
    write = staticmethod(write_inputs)

    def shapes(self, batch: tuple[int, ...], num_masks: int) -> dict[str, tuple[int, ...]]:
        """Of every tensor, for a batch of (rows, tokens)."""
        sizes = {self._rows: batch[0], self._tokens: batch[1], self._masks: num_masks}
        return {
            name: tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)
            for name, axes in self.tensors.items()
        }

    def results(self, batch: Batch, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Arrays for a whole batch, as every backend gives them."""
        num_masks = 0 if batch.mask_positions is None else len(batch.mask_positions)
        shapes = self.shapes(batch.input_ids.shape, num_masks)
        return {name: np.empty(shapes[name], np.float32) for name in names}

    def place(self, name: str, values: NDArray[Any], sub_batch: SubBatch, result: NDArray[np.float32]) -> None:
        """Put what a part gave for an output to its rows or masks of the whole batch's result, without the padding."""
        axes = self.tensors[name]
        if len(axes) > 1 and axes[1] == self._tokens:
            values = values[:, : result.shape[1]]
        if axes[0] == self._masks:
            result[sub_batch.masks] = values[: len(sub_batch.masks)]
        else:
            result[sub_batch.rows] = values[: sub_batch.rows.stop - sub_batch.rows.start]

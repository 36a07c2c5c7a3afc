"""Packs batches for a padding-free TensorRT engine and unpacks its outputs.

The engine takes the tokens of all texts one after the other, the position of each token in its own text, and the
beginning and end of each text. Its profiles are (texts, tokens of all texts). This module computes only numbers and
does not use CUDA.

Shapes: B rows, S tokens of the longest row, M masks of a batch; T tokens of all rows of a sub-batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.shapes import SubBatch, mask_groups, padded_length, padded_rows
from gte_deploy.backends.tensorrt.variants import KV_LENGTHS, POSITIONS, QUERY_LENGTHS
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile


def split_packed_batch(
    batch: Batch, profiles: Sequence[Profile], masks: Sequence[tuple[int, int]] | None = None
) -> Iterator[SubBatch]:
    """Split a batch into sub-batches: one, unless it has more rows, tokens or masks than a profile takes.

    If the profile has room, texts of only padding are added at the end, so that many batches share few numbers of
    tokens (see `padded_length`) and of texts (see `padded_rows`). All of these texts but the last have one token.

    Args:
        batch: the batch to run.
        profiles: the engine's profiles, (texts, tokens of all texts).
        masks: (least, most) mask positions that each profile takes; None if the engine takes none.

    Raises:
        InputError: a text has more tokens than any profile takes.
    """
    lengths = batch.attention_mask.sum(axis=1)
    start = 0
    while start < len(lengths):
        index, count = _choose(profiles, lengths[start:])
        profile, rows = profiles[index], slice(start, start + count)
        tokens = int(lengths[rows].sum())
        shape = _common_shape(count, tokens, profile)
        places = np.nonzero(batch.attention_mask[rows])
        for chosen, number in mask_groups(batch, rows, None if masks is None else masks[index]):
            yield SubBatch(rows, chosen, index, shape, number, places)
        start += count


def _common_shape(texts: int, tokens: int, profile: Profile) -> tuple[int, int]:
    """(texts, tokens of all texts) with texts of padding, each of at least one token; without, if there is no room."""
    if (padded_rows(texts, profile), padded_length(tokens, profile)) == (texts, tokens):
        return texts, tokens
    wanted = padded_rows(texts + 1, profile)
    least = tokens + wanted - texts
    padded = padded_length(least, profile)
    return (wanted, padded) if wanted > texts and padded >= least else (texts, tokens)


def _choose(profiles: Sequence[Profile], lengths: NDArray[np.int64]) -> tuple[int, int]:
    """Index of the smallest profile that takes the most of the next texts, and the number of these texts."""
    ends = np.cumsum(lengths)
    counts = [min(profile.max[0], int(np.searchsorted(ends, profile.max[1], "right"))) for profile in profiles]
    best = min(range(len(profiles)), key=lambda i: (-counts[i], profiles[i].max[1], profiles[i].max[0]))
    if not counts[best]:
        raise InputError(
            f"a text of the batch has {lengths[0]:,} tokens, and the engine's profiles (texts x tokens of all texts, "
            f"as min:opt:max) are {', '.join(map(str, profiles))}. Shorten it, or export with a profile that takes it "
            "(--profile)."
        )
    return best, counts[best]


class PaddingFreeLayout:
    """`PaddedLayout` for the tensors of a padding-free engine."""

    def __init__(self, tensors: Mapping[str, Sequence[int | str]]) -> None:
        """`tensors` maps tensors to axes, each a size or a name. A name that no input has is the number of texts."""
        self.tensors = dict(tensors)
        (self._tokens,) = self.tensors["input_ids"]
        (self._lengths,) = self.tensors[QUERY_LENGTHS]
        self._masks = self.tensors["mask_positions"][0] if "mask_positions" in self.tensors else None

    split = staticmethod(split_packed_batch)

    @staticmethod
    def with_common_shape(sub_batch: SubBatch, profile: Profile) -> SubBatch:
        """The same sub-batch: `split_packed_batch` has padded it already."""
        return sub_batch

    def shapes(self, size: tuple[int, int], num_masks: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, for a number of (texts, tokens of all texts)."""
        texts, tokens = size
        sizes = {self._tokens: tokens, self._lengths: texts + 1, self._masks: num_masks}
        return {
            name: tuple(axis if isinstance(axis, int) else sizes.get(axis, texts) for axis in axes)
            for name, axes in self.tensors.items()
        }

    def results(self, batch: Batch, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Arrays for the outputs of a whole batch, as every backend returns them. Outputs by token are 0 at padding."""
        rows, length = batch.input_ids.shape
        shapes = self.shapes((rows, length), 0 if batch.mask_positions is None else len(batch.mask_positions))
        return {
            name: np.zeros((rows, *shapes[name]) if self._is_by_token(name) else shapes[name], np.float32)
            for name in names
        }

    def write(
        self, batch: Batch, sub_batch: SubBatch, inputs: Mapping[str, NDArray[Any]], *, pad_token_id: int
    ) -> None:
        """Write a sub-batch into the input arrays of the engine, which have the shapes of the sub-batch.

        Extra mask positions point at the first token.
        """
        rows, columns = _places(sub_batch)
        count = len(rows)
        ids, positions = inputs["input_ids"], inputs[POSITIONS]
        ids[:count], ids[count:] = batch.input_ids[sub_batch.rows][rows, columns], pad_token_id
        # Numbered as for other engines, even if the mask leaves tokens out.
        positions[:count], positions[count:] = columns, 0
        if "token_type_ids" in inputs:
            types = inputs["token_type_ids"]
            types[:] = 0
            if batch.token_type_ids is not None:
                types[:count] = batch.token_type_ids[sub_batch.rows][rows, columns]
        ends = np.cumsum(batch.attention_mask[sub_batch.rows].sum(axis=1))
        for name in (QUERY_LENGTHS, KV_LENGTHS):
            lengths = inputs[name]
            padding = len(lengths) - 1 - len(ends)  # texts
            lengths[0], lengths[1 : len(ends) + 1] = 0, ends
            lengths[len(ends) + 1 :] = ends[-1] + 1 + np.arange(padding)
            lengths[-1] = len(ids)
        if "mask_positions" in inputs:
            masked = inputs["mask_positions"]
            masked[:] = 0
            if len(sub_batch.masks):
                assert batch.mask_positions is not None  # the sub-batch's masks are indices into it
                row, token = batch.mask_positions[sub_batch.masks].T
                length = batch.input_ids.shape[1]
                masked[: len(sub_batch.masks)] = np.searchsorted(
                    rows * length + columns, (row - sub_batch.rows.start) * length + token
                )

    def place(self, name: str, values: NDArray[Any], sub_batch: SubBatch, result: NDArray[np.float32]) -> None:
        """Copy an output of a sub-batch to its tokens, masks or rows in the result of the whole batch."""
        if self._is_by_token(name):
            rows, columns = _places(sub_batch)
            result[sub_batch.rows][rows, columns] = values[: len(rows)]
        elif self.tensors[name][0] == self._masks:
            result[sub_batch.masks] = values[: len(sub_batch.masks)]
        else:
            result[sub_batch.rows] = values[: sub_batch.rows.stop - sub_batch.rows.start]

    def _is_by_token(self, name: str) -> bool:
        return self.tensors[name][0] == self._tokens


def _places(sub_batch: SubBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    assert sub_batch.places is not None  # set by split_packed_batch
    rows, columns = sub_batch.places
    return rows, columns

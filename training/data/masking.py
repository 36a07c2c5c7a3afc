"""BERT's masking as a pure function of the seed, the epoch, the chunk and the position in the chunk.

Legend: T tokens, M masked tokens.

Each ordinary token is chosen independently, so that the rate holds over the whole corpus. A short chunk may get no
masked token. Such a chunk stays as it is and has no loss, because a forced mask would raise the rate of short texts.
A micro-batch can therefore have M = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import Vocabulary
from gte_deploy.training.data.random import STREAM_MASK, join_words, philox4x32, split_words, stream_key


@dataclass(frozen=True)
class Masking:
    """Settings of the masking.

    Args:
        probability: each ordinary token is chosen with this probability.
        mask_share: share of the chosen tokens that become [MASK].
        random_share: share of the chosen tokens that become a random token. The other chosen tokens stay as they are.

    Raises:
        InputError: a number is out of its range.
    """

    probability: float = 0.3
    mask_share: float = 0.8
    random_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise InputError(f"mask probability {self.probability} is outside (0, 1]")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1 + 1e-9:
            raise InputError(
                f"mask_share {self.mask_share} and random_share {self.random_share} must be >= 0, together at most 1"
            )


def mask_tokens(
    token_ids: NDArray[np.int64], *, vocab: Vocabulary, masking: Masking, seed: int, epoch: int, chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Mask one chunk.

    Args:
        token_ids: the chunk, [T] int64; it is not changed.
        vocab: the vocabulary of the ids.
        masking: how to mask.
        seed: seed of the stage.
        epoch: number of the visit to the chunk.
        chunk: number of the chunk.

    Returns:
        The masked ids [T], the positions of the chosen tokens [M], and their original ids (the labels) [M], all int64.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    places = np.arange(len(token_ids))
    return mask_places(token_ids, places, vocab=vocab, masking=masking, seed=seed, epochs=epoch, chunks=chunk)


def mask_places(
    token_ids: NDArray[np.int64],
    places: NDArray[np.int64],
    *,
    vocab: Vocabulary,
    masking: Masking,
    seed: int,
    epochs: ArrayLike,
    chunks: ArrayLike,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Mask many chunks that are laid end to end; see `mask_tokens` for the result.

    `places`, `epochs` and `chunks` give each token's position in its chunk, the epoch, and the number of the chunk.
    """
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < vocab.size:
        raise InputError(f"ids {token_ids.min()}..{token_ids.max()} are not all in the vocabulary of {vocab.size}")
    chooses, kinds, low, high = philox4x32(
        (places, *split_words(chunks), np.asarray(epochs, dtype=np.uint64)), stream_key(seed, STREAM_MASK)
    )
    chosen = (chooses < _threshold(masking.probability)) & ~vocab.is_special[token_ids]
    positions = np.flatnonzero(chosen)
    labels = token_ids[positions]

    kinds = kinds[positions]
    becomes_mask = kinds < _threshold(masking.mask_share)
    becomes_random = (kinds < _threshold(masking.mask_share + masking.random_share)) & ~becomes_mask
    # The remainder of 64 random bits: its bias over a vocabulary of 250,000 is below 2^-46.
    draws = join_words(low[positions], high[positions]) % np.uint64(len(vocab.ordinary_ids))
    replaced = np.where(becomes_random, vocab.ordinary_ids[draws.astype(np.int64)], labels)
    input_ids = token_ids.copy()
    input_ids[positions] = np.where(becomes_mask, vocab.mask_id, replaced)
    return input_ids, positions, labels


def _threshold(probability: float) -> np.uint64:
    """Return the bound below which a uniform 32-bit word lies with the given probability."""
    return np.uint64(min(round(probability * (1 << 32)), 1 << 32))

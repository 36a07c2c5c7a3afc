"""BERT's masking as a pure function of (seed, epoch, chunk, place in the chunk).

Legend: T tokens, M masked tokens. Each ordinary token is chosen independently, so that the rate holds over a corpus; a
chunk of few tokens may get none. Such a chunk stays as it is and carries no loss: to force one would raise the rate of
short texts. A micro-batch can therefore have M = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gte_deploy.errors import InputError
from gte_deploy.training.data.corpus import Vocabulary
from gte_deploy.training.data.random import STREAM_MASK, join_words, philox4x32, split_words, stream_key


@dataclass(frozen=True)
class Masking:
    """Of the tokens chosen with `probability`: `mask_share` become [MASK], `random_share` random, the rest stays."""

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
    """Mask one chunk [T]: (input_ids [T], positions [M], labels [M]), int64; the argument stays as it is.

    Raises:
        InputError: an id outside the vocabulary.
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
    """Mask many chunks laid end to end; `places`, `epochs`, `chunks` say per token where it stands. See mask_tokens."""
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
    """Uniform 32-bit words below this come with the probability."""
    return np.uint64(min(round(probability * (1 << 32)), 1 << 32))

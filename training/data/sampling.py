"""The order of samples: documents cut into chunks, and the chunk that each sample of a stage takes.

Everything here is a pure function of the seed and of indices, so there is no state to save. The order of a stage is a
keyed permutation that is computed for each index. Every rank, and every resumed run, computes the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import LengthHistogram, TokenCorpus
from gte_deploy.training.data.random import (
    FIRST_LANGUAGE_STREAM,
    STREAM_LANGUAGE,
    STREAM_ORDER,
    STREAM_RESAMPLE,
    permute,
    philox4x32,
    split_words,
    stream_key,
)

NUM_SPECIAL = 2  # a chunk begins with [CLS] and ends with [SEP]
_MIXTURE_BLOCK = 1 << 16  # samples; every language has its exact share in each such block
DOCUMENT_BLOCK = 1 << 20  # documents computed at once; bounds the memory of an index over 10^8 documents

# --- the order of a stage -------------------------------------------------------------------------------------------


def samples_at(indices: ArrayLike, *, num_chunks: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the epochs and the chunks of the samples at `indices` of a stage, [N] each.

    Every epoch visits every chunk once.

    Raises:
        InputError: there is no chunk, or an index is negative.
    """
    places = np.atleast_1d(np.asarray(indices, dtype=np.int64))
    if num_chunks < 1:
        raise InputError("there is no chunk to sample from")
    if places.size and places.min() < 0:
        raise InputError(f"sample index {places.min()} is negative")
    epochs = places // num_chunks
    key = stream_key(seed, STREAM_ORDER)
    return epochs, permute(places - epochs * num_chunks, size=num_chunks, epochs=epochs, key=key)


class LanguageMixture:
    """Draws languages with probability q proportional to p^exponent, where p is the language's share of the chunks.

    The samples come in blocks of 65,536. q is rounded to whole samples per block, at least one for each language that
    has chunks, so that every block holds the exact shares; a permutation mixes the languages within the block. The
    number of samples of one language before an index therefore follows by arithmetic. That number walks through the
    language's own chunks, each epoch in a new permutation.
    """

    def __init__(self, chunks_per_language: ArrayLike, *, exponent: float) -> None:
        self._sizes = np.asarray(chunks_per_language, dtype=np.int64)
        if not 0 <= exponent <= 1:
            raise InputError(f"language exponent {exponent} is outside 0..1 (1 keeps the shares, 0 makes them equal)")
        self._first_chunk = np.concatenate([[0], np.cumsum(self._sizes)])
        self.quota = _quota(self._sizes, exponent)
        self._quota_ends = np.cumsum(self.quota)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """The probability of each language, after rounding."""
        return self.quota / _MIXTURE_BLOCK

    def samples_at(self, indices: ArrayLike, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and the chunks of the samples at `indices`, [N] each; each language counts its epochs."""
        places = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        blocks, within = np.divmod(places, _MIXTURE_BLOCK)
        key = stream_key(seed, STREAM_LANGUAGE)
        drawn = permute(within, size=_MIXTURE_BLOCK, epochs=blocks, key=key)
        languages = np.searchsorted(self._quota_ends, drawn, side="right")
        quota = self.quota[languages]
        ordinals = blocks * quota + drawn - (self._quota_ends[languages] - quota)
        epochs, chunks = np.empty_like(places), np.empty_like(places)
        for language in np.unique(languages):
            here = languages == language
            # Each language has its own seed: two languages of one size must not walk through their chunks in step.
            low, high = stream_key(seed, FIRST_LANGUAGE_STREAM + int(language))
            size = int(self._sizes[language])
            epochs[here], local = samples_at(ordinals[here], num_chunks=size, seed=low | high << 32)
            chunks[here] = local + self._first_chunk[language]
        return epochs, chunks


def _quota(sizes: NDArray[np.int64], exponent: float) -> NDArray[np.int64]:
    """Round q to whole samples of a block by the method of largest remainders."""
    used = sizes > 0
    if used.sum() > _MIXTURE_BLOCK:
        raise InputError(f"{used.sum()} languages are more than the {_MIXTURE_BLOCK} that a mixture can hold")
    weights = np.where(used, np.maximum(sizes, 1) / sizes.sum(), 0.0) ** exponent * used
    spare = _MIXTURE_BLOCK - int(used.sum())
    exact = weights / weights.sum() * spare
    quota = np.floor(exact).astype(np.int64) + used
    rest = _MIXTURE_BLOCK - int(quota.sum())
    order = np.lexsort((np.arange(len(sizes)), -(exact - np.floor(exact)) * used))
    quota[order[:rest]] += 1
    return quota


# --- chunks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resampling:
    """Drops short chunks: those of fewer than `short_threshold` tokens stay with probability `keep_prob`.

    The threshold counts [CLS] and [SEP]. The defaults keep every chunk.
    """

    short_threshold: int = 0
    keep_prob: float = 1.0

    def __post_init__(self) -> None:
        if self.short_threshold < 0:
            raise InputError(f"short_threshold {self.short_threshold} is negative")
        if not 0 <= self.keep_prob <= 1:
            raise InputError(f"keep_prob {self.keep_prob} is outside 0..1")


@dataclass(frozen=True)
class ResamplingReport:
    """Chunk lengths before and after short chunks were dropped; `str()` gives text for a person."""

    before: LengthHistogram
    after: LengthHistogram

    def __str__(self) -> str:
        if self.before == self.after:
            return f"chunks, all kept\n{self.after}"
        return f"chunks before resampling\n{self.before}\nchunks after resampling\n{self.after}"


class ChunkIndex:
    """The chunks of a corpus: each document is cut into chunks of at most `max_length` tokens.

    A chunk is [CLS], up to `max_length` - 2 tokens of one document, and [SEP]. Documents are never joined. Only the
    last chunk of a document can be short. One number per document, the count of chunks before it, is therefore enough
    to find any chunk: the index takes 8 bytes a document.

    Chunks are numbered after resampling. Whether a short chunk stays is a pure function of the seed and of the chunk's
    number before resampling. With `language_exponent` None all chunks are sampled alike, otherwise a LanguageMixture
    chooses the languages.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        *,
        max_length: int,
        resampling: Resampling = Resampling(),  # noqa: B008 - frozen
        language_exponent: float | None = None,
        seed: int,
    ) -> None:
        if max_length <= NUM_SPECIAL:
            raise InputError(f"max_length {max_length} leaves no room beside [CLS] and [SEP]: use 3 or more")
        if resampling.short_threshold > max_length:
            raise InputError(
                f"short_threshold {resampling.short_threshold} is above max_length {max_length}: every chunk is short"
            )
        self.corpus, self.max_length, self.resampling, self.seed = corpus, max_length, resampling, seed
        self._body = max_length - NUM_SPECIAL
        self._first_chunk = np.zeros(corpus.num_documents + 1, dtype=np.int64)
        for block, chunks, _, keeps in self._blocks():
            self._first_chunk[block.start + 1 : block.stop + 1] = chunks - ~keeps
        np.cumsum(self._first_chunk, out=self._first_chunk)
        self.num_chunks = int(self._first_chunk[-1])
        if not self.num_chunks:
            raise InputError(f"no chunk of {corpus.folder} is left after {resampling}: lower the threshold")
        self.mixture: LanguageMixture | None = None
        if language_exponent is not None:
            chunks_per_language = np.diff(self._first_chunk[corpus.language_bounds])
            self.mixture = LanguageMixture(chunks_per_language, exponent=language_exponent)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of every chunk, with [CLS] and [SEP], [num_chunks]. Each access computes it anew."""
        return self.lengths_of(np.arange(self.num_chunks))

    def lengths_of(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each given chunk, with [CLS] and [SEP]."""
        return self.locate(chunks)[2] + NUM_SPECIAL

    def locate(self, chunks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the document, the first token and the number of tokens (without special ones) of each chunk, [N]."""
        documents = np.searchsorted(self._first_chunk, chunks, side="right") - 1
        starts = (chunks - self._first_chunk[documents]) * self._body
        return documents, starts, np.minimum(self.corpus.lengths[documents] - starts, self._body)

    def chunk(self, index: int) -> NDArray[np.int64]:
        """Return the token ids of one chunk, with [CLS] and [SEP].

        Raises:
            InputError: the index has no such chunk.
        """
        if not 0 <= index < self.num_chunks:
            raise InputError(f"chunk {index} is not in 0..{self.num_chunks - 1}")
        return self.chunks(np.array([index]))[0]

    def chunks(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the token ids of the given chunks, end to end, [T], and each chunk's offset and the end, [N + 1]."""
        documents, starts, lengths = self.locate(indices)
        ends = np.concatenate([[0], np.cumsum(lengths + NUM_SPECIAL)])
        token_ids = np.empty(int(ends[-1]), dtype=np.int64)
        self.corpus.copy_tokens(documents, starts, lengths, out=token_ids, at=ends[:-1] + 1)
        token_ids[ends[:-1]] = self.corpus.vocab.cls_id
        token_ids[ends[1:] - 1] = self.corpus.vocab.sep_id
        return token_ids, ends

    def samples_at(self, indices: ArrayLike, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and the chunks of the samples at `indices` of a stage, [N] each."""
        if self.mixture is not None:
            return self.mixture.samples_at(indices, seed=seed)
        return samples_at(indices, num_chunks=self.num_chunks, seed=seed)

    def histogram(self) -> ResamplingReport:
        """Count the chunk lengths before and after resampling."""
        return ResamplingReport(
            before=LengthHistogram.of(self._chunk_lengths(resampled=False)),
            after=LengthHistogram.of(self._chunk_lengths(resampled=True)),
        )

    def _blocks(self) -> Iterator[tuple[range, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield, for each block of documents: its range, and per document the number of chunks before resampling, the
        length of the last chunk, and whether that chunk stays.
        """
        key = stream_key(self.seed, STREAM_RESAMPLE)
        first = 0
        for start in range(0, self.corpus.num_documents, DOCUMENT_BLOCK):
            lengths = self.corpus.lengths[start : start + DOCUMENT_BLOCK]
            chunks = -(-lengths // self._body)
            tail = lengths - (chunks - 1) * self._body + NUM_SPECIAL
            numbers = first + np.cumsum(chunks) - 1
            word, _, _, _ = philox4x32((*split_words(numbers), 0, 0), key)
            lucky = word < np.uint64(round(self.resampling.keep_prob * (1 << 32)))
            yield range(start, start + len(lengths)), chunks, tail, (tail >= self.resampling.short_threshold) | lucky
            first += int(chunks.sum())

    def _chunk_lengths(self, *, resampled: bool) -> Iterator[NDArray[np.int64]]:
        for _, chunks, tail, keeps in self._blocks():
            yield tail[keeps] if resampled else tail
            yield np.full(int((chunks - 1).sum()), self.max_length)

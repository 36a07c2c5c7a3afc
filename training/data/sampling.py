"""The order of samples: documents cut into chunks, and the chunk that each sample of a stage takes.

Everything here is a pure function of the seed and of indices, so there is no state to save. The order of a stage is a
keyed permutation that is computed for each index. Every rank, and every resumed run, computes the same samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.chunk_table import (
    DOCUMENTS_PER_BLOCK,
    TABLE_FORMAT,
    ChunkTable,
    num_blocks,
    pack_bits,
    read_table,
    unpack_bits,
    write_table,
)
from gte_deploy.training.data.corpus import LengthHistogram, TokenCorpus, corpus_fingerprint
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
from gte_deploy.training.data.window_order import WindowOrder

logger = logging.getLogger(__name__)

NUM_SPECIAL = 2  # a chunk begins with [CLS] and ends with [SEP]
_MIXTURE_BLOCK = 1 << 16  # samples; every language has its exact share in each such block
DOCUMENT_BLOCK = 1 << 16  # documents computed at once, a multiple of DOCUMENTS_PER_BLOCK; bounds the memory
_LOCATED_AT_ONCE = 1 << 14  # chunks; each may need the lengths of a block of documents

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
    """Draws chunks of several languages, or other sources, each with its weight.

    The samples come in blocks of 65,536. The weights are rounded to whole samples per block, at least one for each
    language that has chunks and a weight, so that every block holds the exact shares; a permutation mixes the languages
    within the block. The number of samples of one language before an index therefore follows by arithmetic. That number
    walks through the language's own chunks, each epoch in a new permutation.

    Args:
        chunks_per_language: `[L]`, the number of chunks of each.
        weights: `[L]`, how often a chunk of each is drawn; only their ratios count.
        orders: `[L]`, the order of each language's chunks; by default all of them are shuffled in each epoch.

    Raises:
        InputError: no language with chunks has a weight, or there are more languages than a block can hold.
    """

    def __init__(
        self,
        chunks_per_language: ArrayLike,
        weights: ArrayLike,
        orders: Sequence[WindowOrder | None] | None = None,
    ) -> None:
        self._sizes = np.asarray(chunks_per_language, dtype=np.int64)
        self._orders = [None] * len(self._sizes) if orders is None else list(orders)
        self._first_chunk = np.concatenate([[0], np.cumsum(self._sizes)])
        self.quota = _quota(np.asarray(weights, dtype=np.float64) * (self._sizes > 0))
        self._quota_ends = np.cumsum(self.quota)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """The probability of each language, after rounding."""
        return self.quota / _MIXTURE_BLOCK

    def samples_at(self, indices: ArrayLike, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and the chunks of the samples at `indices`, [N] each; each language counts its epochs."""
        languages, ordinals = self.ordinals_at(indices, seed=seed)
        epochs, chunks = np.empty_like(ordinals), np.empty_like(ordinals)
        for language in np.unique(languages).tolist():
            here = languages == language
            order, own_seed = self._orders[language], language_seed(seed, language)
            if order is None:
                size = int(self._sizes[language])
                epochs[here], local = samples_at(ordinals[here], num_chunks=size, seed=own_seed)
            else:
                epochs[here], local = order.samples_at(ordinals[here], seed=own_seed)
            chunks[here] = local + self._first_chunk[language]
        return epochs, chunks

    def ordinals_at(self, indices: ArrayLike, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the languages of the samples at `indices`, and the number of each among its language's, [N] each."""
        places = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        blocks, within = np.divmod(places, _MIXTURE_BLOCK)
        key = stream_key(seed, STREAM_LANGUAGE)
        drawn = permute(within, size=_MIXTURE_BLOCK, epochs=blocks, key=key)
        languages = np.searchsorted(self._quota_ends, drawn, side="right")
        quota = self.quota[languages]
        return languages, blocks * quota + drawn - (self._quota_ends[languages] - quota)

    def block_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return the samples of the whole blocks that the samples start..stop lie in, as start and stop."""
        return start // _MIXTURE_BLOCK * _MIXTURE_BLOCK, -(-stop // _MIXTURE_BLOCK) * _MIXTURE_BLOCK

    def ordinals_between(self, start: int, stop: int, *, language: int) -> tuple[int, int]:
        """Return the first and the last sample of a language, counted among its own, in whole blocks start..stop."""
        quota = int(self.quota[language])
        return start // _MIXTURE_BLOCK * quota, stop // _MIXTURE_BLOCK * quota - 1

    def most_in_step(self, batch_size: int) -> list[int]:
        """Return the samples of each language, [L], in the blocks that a step can lie in."""
        blocks = -(-batch_size // _MIXTURE_BLOCK) + 1
        return [int(quota) * blocks for quota in self.quota]


def language_seed(seed: int, language: int) -> int:
    """Return the seed of one language: two languages of one size must not walk through their chunks in step."""
    low, high = stream_key(seed, FIRST_LANGUAGE_STREAM + language)
    return low | high << 32


def token_shares(tokens: ArrayLike, *, exponent: float) -> NDArray[np.float64]:
    """Return q ∝ p^exponent, `[L]`, where p is each language's share of the tokens (mGTE, arXiv 2407.19669).

    Raises:
        InputError: the exponent is outside 0..1.
    """
    if not 0 <= exponent <= 1:
        raise InputError(f"language exponent {exponent} is outside 0..1 (1 keeps the shares, 0 makes them equal)")
    counts = np.asarray(tokens, dtype=np.float64)
    weights = np.where(counts > 0, counts / counts.sum(), 0.0) ** exponent * (counts > 0)
    return weights / weights.sum()


def _quota(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round weights to whole samples of a block by the method of largest remainders."""
    used = weights > 0
    if not 0 < used.sum() <= _MIXTURE_BLOCK:
        raise InputError(f"{used.sum()} languages with chunks and a weight; a mixture holds 1 to {_MIXTURE_BLOCK}")
    spare = _MIXTURE_BLOCK - int(used.sum())
    exact = weights / weights.sum() * spare
    quota = np.floor(exact).astype(np.int64) + used
    rest = _MIXTURE_BLOCK - int(quota.sum())
    order = np.lexsort((np.arange(len(weights)), -(exact - np.floor(exact)) * used))
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
class Chunking:
    """How a stage makes its samples of a corpus.

    The languages of a corpus are the names before `=` that `gte-train prepare` was given; they may be any sources.
    Shares are shares of the tokens that a stage trains on, so they depend neither on `max_length` nor on how long the
    documents of a language are.

    Args:
        max_length: tokens of a chunk, at most, with [CLS] and [SEP].
        resampling: rule that drops short chunks.
        language_exponent: language i gets a share q ∝ p^exponent, where p is its share of the corpus's tokens. None
            draws all chunks alike.
        source_weights: the share of each language by its name, up to a common factor; 0 leaves one out.

    Raises:
        InputError: a value is out of its range, or both an exponent and weights are given.
    """

    max_length: int
    resampling: Resampling = Resampling()
    language_exponent: float | None = None
    source_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        length, threshold = self.max_length, self.resampling.short_threshold
        if length <= NUM_SPECIAL:
            raise InputError(f"max_length {length} leaves no room beside [CLS] and [SEP]: use 3 or more")
        if threshold > length:
            raise InputError(f"short_threshold {threshold} is above max_length {length}: every chunk is short")
        if self.language_exponent is not None and self.source_weights is not None:
            raise InputError("language_exponent and source_weights are both given: use one of them")
        if wrong := [weight for weight in (self.source_weights or {}).values() if not weight >= 0]:
            raise InputError(f"source_weights has {wrong[0]}; expected 0 or more")

    @property
    def body(self) -> int:
        """Tokens of a chunk, at most, without [CLS] and [SEP]."""
        return self.max_length - NUM_SPECIAL

    def shares(self, corpus: TokenCorpus) -> NDArray[np.float64] | None:
        """Return the share of each language of `corpus` in the tokens of the stage, `[L]`; None weights nothing.

        Raises:
            InputError: the weights are not those of the corpus's languages.
        """
        if self.source_weights is not None:
            if set(self.source_weights) != set(corpus.languages):
                raise InputError(
                    f"source_weights names {', '.join(map(repr, self.source_weights))}; {corpus.folder} has "
                    f"{', '.join(map(repr, corpus.languages))}: give each a weight, 0 to leave one out"
                )
            weights = np.array([self.source_weights[name] for name in corpus.languages])
            if not weights.any():
                raise InputError("source_weights has no weight above 0")
            return weights / weights.sum()
        if self.language_exponent is None:
            return None
        return token_shares(corpus.language_tokens, exponent=self.language_exponent)

    @property
    def is_weighted(self) -> bool:
        """Whether languages have shares."""
        return self.language_exponent is not None or self.source_weights is not None


class ChunkIndex:
    """The chunks of a corpus: each document is cut into chunks of at most `max_length` tokens.

    A chunk is [CLS], up to `max_length` - 2 tokens of one document, and [SEP]. Documents are never joined. Only the
    last chunk of a document can be short.

    Chunks are numbered after resampling. Whether a short chunk stays is a pure function of the seed and of the chunk's
    number before resampling. Without weights all chunks are sampled alike, otherwise a LanguageMixture chooses the
    languages.

    Args:
        corpus: the documents.
        chunking: how they are cut, dropped and weighted.
        seed: seed of the choice of short chunks.
        shuffle_shards: the samples of an epoch stay among so many shards of each language at a time (see
            `window_order`); None shuffles all of them.
        table: where the chunks are, if that is known already, see `open_chunk_table`.

    Raises:
        InputError: no chunk is left, the weights are not those of the corpus's languages, or shuffle_shards is below 1.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        chunking: Chunking,
        *,
        seed: int,
        shuffle_shards: int | None = None,
        table: ChunkTable | None = None,
    ) -> None:
        self.corpus, self.chunking, self.seed = corpus, chunking, seed
        self._table = build_chunk_table(corpus, chunking, seed=seed) if table is None else table
        blocks = num_blocks(np.diff(corpus.first_documents))
        self._first_block = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
        self._shard_chunks = self._table.first_chunk[self._first_block]
        self.num_chunks = self._table.num_chunks
        if not self.num_chunks:
            raise InputError(f"no chunk of {corpus.folder} is left after {chunking.resampling}: lower the threshold")
        chunks = np.diff(self.language_bounds)
        draws = _draws(corpus, chunking, chunks=chunks, tokens=self._table.tokens)
        self._order_starts = [0]  # the first shard of each order
        self._fetched: tuple[int, int] | None = None
        self._orders = self._window_orders(shuffle_shards, weighted=draws is not None)
        self.mixture = None if draws is None else LanguageMixture(chunks, draws, self._orders)

    def _window_orders(self, width: int | None, *, weighted: bool) -> list[WindowOrder | None] | None:
        """Return the order of each language's chunks; without weights, one order of all chunks."""
        if width is None:
            return None
        sizes = np.diff(self._shard_chunks)
        if weighted:
            languages = np.arange(len(self.corpus.languages))
            self._order_starts = np.searchsorted(self.corpus.shard_languages, languages).tolist()
        parts = np.split(sizes, self._order_starts[1:])
        return [WindowOrder(part, width=width) if part.any() else None for part in parts]

    @property
    def language_bounds(self) -> NDArray[np.int64]:
        """The first chunk of each language, and the end, [languages + 1]. Languages lie side by side."""
        shards = np.searchsorted(self.corpus.shard_languages, np.arange(len(self.corpus.languages) + 1))
        return self._shard_chunks[shards]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of every chunk, with [CLS] and [SEP], [num_chunks]. Each access computes it anew."""
        return self.lengths_of(np.arange(self.num_chunks))

    def lengths_of(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each given chunk, with [CLS] and [SEP]."""
        return self.locate(chunks)[2] + NUM_SPECIAL

    def locate(self, chunks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the document, the first token and the number of tokens (without special ones) of each chunk, [N]."""
        starts = range(0, max(len(chunks), 1), _LOCATED_AT_ONCE)
        parts = [self._locate(chunks[start : start + _LOCATED_AT_ONCE]) for start in starts]
        documents, first, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return documents, first, lengths

    def _locate(self, chunks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        body, table = self.chunking.body, self._table
        blocks = np.searchsorted(table.first_chunk, chunks, side="right") - 1
        used, row = np.unique(blocks, return_inverse=True)
        shards = np.searchsorted(self._first_block, used, side="right") - 1
        first_document = (used - self._first_block[shards]) * DOCUMENTS_PER_BLOCK
        lengths = self.corpus.lengths_of_blocks(shards, first_document, width=DOCUMENTS_PER_BLOCK)  # [blocks, 64]
        counts = -(-lengths // body) - ((lengths > 0) & ~unpack_bits(table.keeps[used]))
        ends = np.cumsum(counts, axis=1)
        within = chunks - table.first_chunk[blocks]
        place = (ends[row] <= within[:, None]).sum(axis=1)  # of the document in its block
        first = (within - (ends[row, place] - counts[row, place])) * body
        documents = (self.corpus.first_documents[shards] + first_document)[row] + place
        return documents, first, np.minimum(lengths[row, place] - first, body)

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
        return self.read(*self.locate(indices))

    def read(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return what `chunks` does, of chunks that `locate` has found."""
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
        if self._orders is not None and self._orders[0] is not None:
            return self._orders[0].samples_at(indices, seed=seed)
        return samples_at(indices, num_chunks=self.num_chunks, seed=seed)

    def fetch_ahead(self, start: int, stop: int, *, seed: int) -> None:
        """Let a corpus that lies elsewhere fetch the shards of the samples start..stop, and of those after them."""
        if self.corpus.files.cache_bytes is None:
            return
        block = (start, stop) if self.mixture is None else self.mixture.block_range(start, stop)
        if block == self._fetched:
            return
        self._fetched = block
        now, ahead = self._shards_between(*block, seed=seed)
        self.corpus.files.fetch_ahead(list(dict.fromkeys([*now, *ahead])))

    def require_cache(self, batch_size: int) -> None:
        """Refuse a cache that cannot hold the shards of a step of `batch_size` samples, and those that come after them.

        Raises:
            InputError: the cache is too small; the message says how large it has to be.
        """
        most = self.corpus.files.cache_bytes
        if most is None:
            return
        size = self.corpus.vocab.dtype.itemsize
        bytes_of_shards = np.array([shard["tokens"] * size for shard in self.corpus.shards])
        needed = int(bytes_of_shards.sum())
        if self._orders is not None:
            parts = np.split(bytes_of_shards, self._order_starts[1:])
            samples = self.mixture.most_in_step(batch_size) if self.mixture is not None else [batch_size]
            orders = zip(self._orders, parts, samples, strict=True)
            needed = sum(order.most_bytes(part, samples=n) for order, part, n in orders if order is not None and n)
        if needed > most:
            advice = "set `shuffle_shards`" if self._orders is None else "lower `shuffle_shards`"
            raise InputError(
                f"a step needs up to {needed} bytes of the corpus's shards at a time, and cache_bytes is {most}: raise "
                f"it (--cache-bytes), or {advice} in the recipe, so that samples stay among fewer shards"
            )

    def _shards_between(self, start: int, stop: int, *, seed: int) -> tuple[list[int], list[int]]:
        now: list[int] = []
        ahead: list[int] = []
        if self._orders is None:
            return np.flatnonzero(np.diff(self._shard_chunks)).tolist(), ahead
        for number, (order, first_shard) in enumerate(zip(self._orders, self._order_starts, strict=True)):
            first, last, own_seed = start, stop - 1, seed
            if self.mixture is not None:
                first, last = self.mixture.ordinals_between(start, stop, language=number)
                own_seed = language_seed(seed, number)
            if order is not None and first <= last:
                parts = order.shards_between(first, last, seed=own_seed)
                now += [first_shard + shard for shard in parts[0]]
                ahead += [first_shard + shard for shard in parts[1]]
        return now, ahead


def _draws(
    corpus: TokenCorpus, chunking: Chunking, *, chunks: NDArray[Any], tokens: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Return how often a chunk of each language is drawn, so that its tokens get its share: q over the mean length.

    Args:
        corpus: its languages count.
        chunking: the shares.
        chunks: `[L]`, the chunks of each language that are left.
        tokens: `[L]`, their tokens.
    """
    shares = chunking.shares(corpus)
    if shares is None:
        return None
    empty = [name for name, share, left in zip(corpus.languages, shares, chunks, strict=True) if share and not left]
    if empty and chunking.source_weights:
        raise InputError(
            f"no chunk of {', '.join(map(repr, empty))} is left after {chunking.resampling}: lower the threshold, or "
            "set its weight to 0"
        )
    return np.where(chunks > 0, shares * chunks / np.maximum(tokens, 1), 0.0)


@dataclass(frozen=True)
class _Cut:
    """The chunks of some neighbouring documents of a shard.

    Args:
        language: number of the language of the shard.
        max_length: tokens of a chunk, at most.
        chunks: `[D]`, the number of chunks of each document.
        tails: `[D]`, the tokens of its last chunk, with [CLS] and [SEP].
        keeps: `[D]`, whether that chunk stays.
    """

    language: int
    max_length: int
    chunks: NDArray[np.int64]
    tails: NDArray[np.int64]
    keeps: NDArray[np.bool_]

    def histogram(self, *, resampled: bool) -> LengthHistogram:
        """Count the chunks by their lengths."""
        tails = self.tails[self.keeps] if resampled else self.tails
        whole = LengthHistogram.of([np.array([self.max_length])]).times(int((self.chunks - 1).sum()))
        return LengthHistogram.of([tails]) + whole

    def sums(self, *, resampled: bool) -> NDArray[np.float64]:
        """Sum over the chunks, `[5]`: 1, tokens, their square, 1 for a full chunk, late tokens."""
        tails, most, quarter = (
            self.tails[self.keeps] if resampled else self.tails,
            self.max_length,
            self.max_length // 4,
        )
        whole = int((self.chunks - 1).sum())
        return np.array(
            [
                whole + len(tails),
                whole * most + int(tails.sum()),
                whole * most**2 + int((tails**2).sum()),
                whole + np.count_nonzero(tails == most),
                whole * (most - quarter) + int(np.maximum(tails - quarter, 0).sum()),
            ],
            dtype=np.float64,
        )


def _cuts(corpus: TokenCorpus, chunking: Chunking, *, seed: int) -> Iterator[_Cut]:
    """Cut all documents, and decide which of the short last chunks stay. The documents of a shard come in order."""
    key, rule = stream_key(seed, STREAM_RESAMPLE), chunking.resampling
    first = 0
    for shard, language in enumerate(corpus.shard_languages.tolist()):
        count = int(corpus.first_documents[shard + 1] - corpus.first_documents[shard])
        for start in range(0, count, DOCUMENT_BLOCK):
            lengths = corpus.lengths_in(shard, start, min(start + DOCUMENT_BLOCK, count))
            chunks = -(-lengths // chunking.body)
            tails = lengths - (chunks - 1) * chunking.body + NUM_SPECIAL
            keeps = tails >= rule.short_threshold
            short = np.flatnonzero(~keeps)
            numbers = (first + np.cumsum(chunks) - 1)[short]
            word, _, _, _ = philox4x32((*split_words(numbers), 0, 0), key)
            keeps[short] = word < np.uint64(round(rule.keep_prob * (1 << 32)))
            yield _Cut(language, chunking.max_length, chunks, tails, keeps)
            first += int(chunks.sum())


def build_chunk_table(corpus: TokenCorpus, chunking: Chunking, *, seed: int) -> ChunkTable:
    """Find the chunks of a corpus. This reads the offsets of all documents."""
    total = int(num_blocks(np.diff(corpus.first_documents)).sum())
    counts, keeps = np.zeros(total + 1, dtype=np.int64), np.zeros(total, dtype=np.uint64)
    tokens = np.zeros(len(corpus.languages))
    block = 0
    for cut in _cuts(corpus, chunking, seed=seed):
        starts = np.arange(0, len(cut.chunks), DOCUMENTS_PER_BLOCK)
        stop = block + len(starts)
        counts[block + 1 : stop + 1] = np.add.reduceat(cut.chunks - ~cut.keeps, starts)
        keeps[block:stop] = pack_bits(cut.keeps)
        tokens[cut.language] += cut.sums(resampled=True)[1]
        block = stop
    return ChunkTable(np.cumsum(counts), keeps, tokens)


def open_chunk_table(
    corpus: TokenCorpus, chunking: Chunking, *, seed: int, folder: Path, write: bool
) -> ChunkTable | None:
    """Map the table of a stage that lies in `folder`.

    Args:
        corpus: the documents.
        chunking: how they are cut and dropped.
        seed: seed of the choice of short chunks.
        folder: folder of the tables of a run.
        write: build the table and write it if it is missing or damaged. One process does so; the others map it then.

    Returns:
        The table; None if there is none, and `write` is false.

    Raises:
        InputError: the table is damaged, and `write` is false.
    """
    made_of = [TABLE_FORMAT, corpus_fingerprint(corpus), chunking.max_length, asdict(chunking.resampling), seed]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    table = None
    try:
        table = read_table(folder, key, verify=write)
    except InputError as error:
        if not write:
            raise
        logger.warning("%s; it is made again", error)
    if table is None and write:
        write_table(build_chunk_table(corpus, chunking, seed=seed), folder, key)
        table = read_table(folder, key, verify=False)
    return table


# --- what a stage will see ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleLengths:
    """Lengths of the samples of a stage in tokens.

    Args:
        mean: the mean length.
        mean_square: the mean of the squares, for the cost of attention.
        full: share of the samples that have `max_length` tokens.
        late: share of the tokens at positions from `late_from` on.
        late_from: a quarter of `max_length`.
    """

    mean: float
    mean_square: float
    full: float
    late: float
    late_from: int

    def __str__(self) -> str:
        return (
            f"{self.mean:,.0f} tokens on average, {self.full:.1%} full, {self.late:.0%} of the tokens beyond "
            f"{self.late_from:,}"
        )

    @classmethod
    def of(cls, sums: NDArray[np.float64], draws: NDArray[np.float64], *, max_length: int) -> SampleLengths:
        """Compute them from `_Cut.sums` and from how often each language is drawn, `[L]`."""
        means = sums[:, 1:] / np.maximum(sums[:, :1], 1)
        mean, mean_square, full, late = (draws / draws.sum()) @ means
        return cls(float(mean), float(mean_square), float(full), float(late / mean), max_length // 4)


@dataclass(frozen=True)
class LanguageSurvey:
    """One language, or other source, of a stage: its shares of the corpus's tokens and of the stage's."""

    name: str
    corpus_share: float
    share: float
    chunks: int
    draw: float
    """Share of the samples."""


@dataclass(frozen=True)
class ChunkSurvey:
    """The samples of a stage, before it runs; `str()` gives text for a person.

    Args:
        chunking: how the documents are cut, dropped and weighted.
        before: lengths of the chunks before short ones are dropped.
        after: lengths of the chunks that are left.
        cut: statistics of the chunks before short ones are dropped, without weights.
        sampled: statistics of the samples, with the weights of the languages.
        languages: the languages of the corpus.
    """

    chunking: Chunking
    before: LengthHistogram
    after: LengthHistogram
    cut: SampleLengths
    sampled: SampleLengths
    languages: tuple[LanguageSurvey, ...]

    def passes(self, samples: int) -> float:
        """Return how often `samples` samples visit each chunk of the language that is visited most often."""
        return max(samples * each.draw / each.chunks for each in self.languages if each.chunks)

    def __str__(self) -> str:
        if self.before == self.after:
            lines = [f"chunks, all kept\n{self.after}"]
        else:
            lines = [f"chunks before resampling\n{self.before}", f"chunks after resampling\n{self.after}"]
            lines.append(f"all chunks: {self.cut}")
        lines.append(f"sampled: {self.sampled}")
        if len(self.languages) > 1:
            lines += [
                f"  {each.name or '(none)'}: {each.corpus_share:.2%} of the corpus's tokens, {each.share:.2%} of the "
                f"stage's, {each.chunks:,} chunks"
                for each in self.languages
            ]
        return "\n".join(lines)


def survey(corpus: TokenCorpus, chunking: Chunking, *, seed: int) -> ChunkSurvey:
    """Describe the samples that a stage with this seed draws, without the index that draws them.

    Raises:
        InputError: no chunk is left, or the weights are not those of the corpus's languages.
    """
    count = len(corpus.languages)
    cut, kept = np.zeros((count, 5)), np.zeros((count, 5))
    before, after = LengthHistogram.of(()), LengthHistogram.of(())
    for each in _cuts(corpus, chunking, seed=seed):
        cut[each.language] += each.sums(resampled=False)
        kept[each.language] += each.sums(resampled=True)
        before += each.histogram(resampled=False)
        after += each.histogram(resampled=True)
    if not kept[:, 0].any():
        raise InputError(f"no chunk of {corpus.folder} is left after {chunking.resampling}: lower the threshold")
    draws = _draws(corpus, chunking, chunks=kept[:, 0], tokens=kept[:, 1])
    draws = kept[:, 0] if draws is None else draws
    draws = draws / draws.sum()
    tokens = draws * kept[:, 1] / np.maximum(kept[:, 0], 1)
    raw = cut[:, 1] - NUM_SPECIAL * cut[:, 0]
    return ChunkSurvey(
        chunking=chunking,
        before=before,
        after=after,
        cut=SampleLengths.of(cut, cut[:, 0], max_length=chunking.max_length),
        sampled=SampleLengths.of(kept, draws, max_length=chunking.max_length),
        languages=tuple(
            LanguageSurvey(name, corpus_share=share, share=got, chunks=int(left), draw=draw)
            for name, share, got, left, draw in zip(
                corpus.languages,
                (raw / raw.sum()).tolist(),
                (tokens / tokens.sum()).tolist(),
                kept[:, 0],
                draws.tolist(),
                strict=True,
            )
        ),
    )

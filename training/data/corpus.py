"""The token corpus: shards of token ids on disk, read by memory map. `prepare` writes it and sampling reads it.

A corpus folder holds two files per shard and an index:

    NAME.tokens    the token ids of the shard's documents, end to end, without special tokens; little-endian uint16
                   or uint32
    NAME.offsets   the position of each document's first token, and the end; little-endian int64 [documents + 1]
    index.json     the vocabulary, the languages, and the size and sha256 of every file

The shards of one language lie side by side.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.core.files import read_json_object, sha256_file
from gte_deploy.core.formats import check_version

FORMAT = "gte-token-corpus"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
OFFSET_DTYPE = np.dtype("<i8")
_BAR_WIDTH = 40
_READ_BYTES = 4 << 20  # a multiple of every token's size


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer.

    `size` counts the tokenizer's ids, without the rows that pad an embedding matrix. `special_ids` holds the special
    tokens and, if the numbering has holes, the unused ids. Training never masks these ids and never draws one as a
    random replacement. [UNK] is among them, because a model learns nothing from predicting it.
    """

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    unk_id: int
    special_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        named = (self.cls_id, self.sep_id, self.mask_id, self.pad_id, self.unk_id)
        outside = [i for i in (*named, *self.special_ids) if not 0 <= i < self.size]
        if outside:
            raise InputError(f"special ids {outside} are outside the vocabulary of {self.size}: check the tokenizer")
        if not set(named) <= set(self.special_ids):
            raise InputError(f"special_ids {self.special_ids} must contain cls, sep, mask, pad and unk {named}")
        if len(set(self.special_ids)) >= self.size:
            raise InputError(f"all {self.size} ids of the vocabulary are special: there is nothing to train on")

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a token id on disk."""
        return np.dtype("<u2") if self.size < 65_536 else np.dtype("<u4")

    @cached_property
    def is_special(self) -> NDArray[np.bool_]:
        """True for each special id: a lookup table, [size] bool."""
        table = np.zeros(self.size, dtype=bool)
        table[list(self.special_ids)] = True
        return table

    @cached_property
    def ordinary_ids(self) -> NDArray[np.int64]:
        """The ids that are not special, ascending. A random replacement is one of them."""
        return np.flatnonzero(~self.is_special)


class TokenFiles(Protocol):
    """Gives the token ids of each shard, wherever they lie.

    `cache_bytes` bounds the shards that lie on this machine at a time; None means that all of them do.
    """

    @property
    def cache_bytes(self) -> int | None: ...

    def __getitem__(self, shard: int, /) -> NDArray: ...

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, in this order; all others may make room for them."""

    def close(self) -> None:
        """End what is fetched in the background."""


class MappedFiles:
    """The token files of a folder, memory-mapped."""

    cache_bytes = None

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]], vocab: Vocabulary) -> None:
        self._maps = [map_tokens(folder, shard, vocab) for shard in shards]

    def __getitem__(self, shard: int, /) -> NDArray:
        return self._maps[shard]

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Do nothing: all shards are here."""

    def close(self) -> None:
        """Do nothing."""


class TokenCorpus:
    """Documents as memory-mapped token ids. Open a corpus with `TokenCorpus.open`.

    The sizes of all files, and that the offsets ascend from 0 to the end of their tokens, are always checked.

    Args:
        folder: the folder of index.json and the offsets.
        index: what index.json holds.
        verify: also read every file and compare its sha256, see `verify_shard`.
        files: the token ids of each shard; None maps the files in `folder`.

    Raises:
        InputError: a file is missing, incomplete or altered.
    """

    def __init__(
        self,
        folder: Path,
        index: Mapping[str, Any],
        *,
        verify: bool = False,
        files: TokenFiles | None = None,
    ) -> None:
        self.folder = folder
        self.index = index
        self.vocab = read_corpus_vocabulary(index)
        self.languages: tuple[str, ...] = tuple(index["languages"])
        numbers = {language: i for i, language in enumerate(self.languages)}
        self.shards: Sequence[Mapping[str, Any]] = index["shards"]
        self.shard_languages = np.array([numbers[shard["language"]] for shard in self.shards], dtype=np.int64)
        """The language of each shard, as its position in `languages`, [shards]."""
        self.files: TokenFiles = MappedFiles(folder, self.shards, self.vocab) if files is None else files
        self._offsets = [_map_offsets(folder, shard, self.vocab) for shard in self.shards]
        if verify:
            for shard in self.shards:
                verify_shard(folder, shard, self.vocab)
        counts = np.array([len(offsets) - 1 for offsets in self._offsets], dtype=np.int64)
        self.first_documents = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """The first document of each shard, and the end, [shards + 1]."""
        self.num_documents = int(self.first_documents[-1])
        self.num_tokens = sum(shard["tokens"] for shard in self.shards)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> TokenCorpus:
        """Open a folder that `prepare` wrote. `verify` also reads every file and checks its sha256 and ids.

        Raises:
            InputError: the folder is no corpus, is incomplete or altered, or has another format version.
        """
        folder = Path(folder)
        return open_index(folder, read_index(folder), verify=verify)

    def close(self) -> None:
        """End what is fetched in the background. A corpus in a folder needs no end."""
        self.files.close()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each document, without special tokens, [num_documents]. Each access computes it anew."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int64, copy=False)

    def lengths_in(self, shard: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the lengths of the documents start..stop of a shard, in tokens, [stop - start]."""
        return np.diff(self._offsets[shard][start : stop + 1]).astype(np.int64, copy=False)

    def lengths_of_blocks(
        self, shards: NDArray[np.int64], starts: NDArray[np.int64], *, width: int
    ) -> NDArray[np.int64]:
        """Return the lengths of `width` documents of each shard from a place on, [N, width]; 0 beyond the shard's end.

        Only the pages of the offsets that hold these documents are read.
        """
        ends = np.empty((len(shards), width + 1), dtype=np.int64)
        for row, shard, start in zip(ends, shards.tolist(), starts.tolist(), strict=True):
            found = self._offsets[shard][start : start + width + 1]
            row[: len(found)] = found
            row[len(found) :] = found[-1]
        return np.diff(ends, axis=1)

    @property
    def language_tokens(self) -> NDArray[np.int64]:
        """The number of tokens of each language, [languages]."""
        totals = np.zeros(len(self.languages), dtype=np.int64)
        np.add.at(totals, self.shard_languages, [shard["tokens"] for shard in self.shards])
        return totals

    @cached_property
    def language_of(self) -> NDArray[np.int16]:
        """Each document's language, as its position in `languages`, ascending, [num_documents]."""
        return np.repeat(self.shard_languages.astype(np.int16), np.diff(self.first_documents))

    @property
    def language_bounds(self) -> NDArray[np.int64]:
        """The first document of each language, and the end, [languages + 1]. Languages lie side by side."""
        totals = np.zeros(len(self.languages), dtype=np.int64)
        np.add.at(totals, self.shard_languages, np.diff(self.first_documents))
        return np.concatenate([[0], np.cumsum(totals)]).astype(np.int64)

    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Return the tokens start..stop of a document: a read-only view, uint16 or uint32.

        Raises:
            InputError: the corpus has no such document, or the document no such range.
        """
        if not 0 <= document < self.num_documents:
            raise InputError(f"document {document} is not in 0..{self.num_documents - 1}")
        shard = int(np.searchsorted(self.first_documents, document, side="right")) - 1
        offsets = self._offsets[shard]
        local = document - int(self.first_documents[shard])
        first, end = int(offsets[local]), int(offsets[local + 1])
        if not 0 <= start <= stop <= end - first:
            raise InputError(f"tokens {start}..{stop} are not in document {document} of {end - first} tokens")
        return self.files[shard][first + start : first + stop]

    def copy_tokens(
        self,
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        out: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> None:
        """Copy `lengths[i]` tokens of `documents[i]` from `starts[i]` to `out[at[i]:]`, for all i.

        This does the work of many calls of `tokens` without their overhead. The arguments are not checked: they come
        from a ChunkIndex.
        """
        shards = np.searchsorted(self.first_documents, documents, side="right") - 1
        local = documents - self.first_documents[shards]
        rows = zip(shards.tolist(), local.tolist(), starts.tolist(), lengths.tolist(), at.tolist(), strict=True)
        for shard, document, start, length, target in rows:
            first = int(self._offsets[shard][document]) + start
            out[target : target + length] = self.files[shard][first : first + length]


# --- histograms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthHistogram:
    """Number of sequences, and of their tokens, whose length lies in [edges[i], edges[i + 1])."""

    edges: tuple[int, ...]
    sequences: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Iterable[NDArray[np.integer]]) -> LengthHistogram:
        """Count sequence lengths, given in blocks, by powers of two."""
        edges = np.concatenate([[0], 1 << np.arange(4, 41)]).astype(np.int64)
        sequences, tokens = np.zeros(len(edges) - 1, np.int64), np.zeros(len(edges) - 1, np.int64)
        for block in lengths:
            bins = np.searchsorted(edges, block, side="right") - 1
            sequences += np.bincount(bins, minlength=len(sequences))
            # bincount sums weights in float64, which is exact below 2**53 tokens a block.
            tokens += np.bincount(bins, weights=block, minlength=len(tokens)).astype(np.int64)
        used = int(np.flatnonzero(sequences)[-1]) + 1 if sequences.any() else 1
        return cls(*(tuple(a.tolist()) for a in (edges[: used + 1], sequences[:used], tokens[:used])))

    def __add__(self, other: LengthHistogram) -> LengthHistogram:
        longer, shorter = sorted((self, other), key=lambda each: len(each.edges), reverse=True)
        rest = (0,) * (len(longer.sequences) - len(shorter.sequences))
        sequences = zip(longer.sequences, (*shorter.sequences, *rest), strict=True)
        tokens = zip(longer.tokens, (*shorter.tokens, *rest), strict=True)
        return LengthHistogram(longer.edges, tuple(map(sum, sequences)), tuple(map(sum, tokens)))

    def times(self, count: int) -> LengthHistogram:
        """Return the histogram of `count` copies of the sequences."""
        if not count:
            return LengthHistogram.of(())
        counts = (tuple(count * each for each in part) for part in (self.sequences, self.tokens))
        return LengthHistogram(self.edges, *counts)

    def as_dict(self) -> dict[str, list[int]]:
        """Return the histogram for JSON or a plot. `edges` has one number more than the counts."""
        return {"edges": list(self.edges), "sequences": list(self.sequences), "tokens": list(self.tokens)}

    def __str__(self) -> str:
        total, most = max(sum(self.sequences), 1), max(*self.sequences, 1)
        all_tokens = max(sum(self.tokens), 1)
        lines = [f"{'length':>17} {'sequences':>13} {'share':>7} {'tokens':>7}"]
        for low, high, count, tokens in zip(self.edges, self.edges[1:], self.sequences, self.tokens, strict=False):
            bar = "#" * round(_BAR_WIDTH * count / most)
            span = f"{low}-{high - 1}"
            lines.append(f"{span:>17} {count:>13,} {count / total:>7.2%} {tokens / all_tokens:>7.2%} {bar}".rstrip())
        lines.append(f"{'all':>17} {sum(self.sequences):>13,} sequences, {sum(self.tokens):,} tokens")
        return "\n".join(lines)


def document_histogram(corpus: TokenCorpus, language: str | None = None) -> LengthHistogram:
    """Count the document lengths of one language, or of all, in tokens."""
    blocks = zip(corpus.shard_languages, corpus._offsets, strict=True)
    wanted = (offsets for i, offsets in blocks if language in (None, corpus.languages[i]))
    return LengthHistogram.of(np.diff(offsets) for offsets in wanted)


def corpus_facts(corpus: TokenCorpus) -> dict[str, Any]:
    """Describe a corpus for programs: its folder, and the numbers of documents, tokens, shards and words."""
    return {
        "path": str(corpus.folder),
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "shards": len(corpus.index["shards"]),
        "vocabulary": corpus.vocab.size,
        "counts": corpus.index.get("counts", {}),
    }


def describe_corpus(corpus: TokenCorpus) -> str:
    """Describe a corpus as text for a person: its size, vocabulary, languages and lengths."""
    lines = [
        f"{corpus.folder}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens, "
        f"{len(corpus.index['shards'])} shards of {corpus.vocab.dtype.name}, vocabulary {corpus.vocab.size:,}"
    ]
    lines += [f"  {name.replace('_', ' ')}: {count:,}" for name, count in corpus.index.get("counts", {}).items()]
    if len(corpus.languages) > 1:
        documents_of, tokens_of = np.diff(corpus.language_bounds).tolist(), corpus.language_tokens.tolist()
        for language, documents, tokens in zip(corpus.languages, documents_of, tokens_of, strict=True):
            share = tokens / corpus.num_tokens
            lines.append(f"  {language or '(none)'}: {documents:,} documents, {tokens:,} tokens ({share:.2%})")
    return "\n".join([*lines, str(document_histogram(corpus))])


# --- opening ------------------------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, Any]:
    """Read what the corpus says of itself.

    Raises:
        InputError: the folder is no corpus, or one of another version.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {INDEX_FILE}: it is no corpus; make one with `gte-train prepare`")
    index = read_json_object(path, error=InputError, advice="Run `gte-train prepare` again.")
    if index.get("format") != FORMAT:
        raise InputError(f"{path} is no index of a token corpus: expected format {FORMAT!r}")
    advice = "Prepare the corpus again with `gte-train prepare`."
    check_version(path, index.get("version"), (FORMAT_VERSION,), error=InputError, advice=advice)
    return index


def open_index(
    folder: Path, index: Mapping[str, Any], *, verify: bool = False, files: TokenFiles | None = None
) -> TokenCorpus:
    """Open the corpus that an index describes; arguments and errors as those of `TokenCorpus`."""
    try:
        corpus = TokenCorpus(folder, index, verify=verify, files=files)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX_FILE} is damaged ({error!r}): run `gte-train prepare` again") from error
    if not corpus.num_documents:
        raise InputError(f"{folder} holds no document: check the inputs of `gte-train prepare`")
    return corpus


def read_corpus_vocabulary(index: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary that an index states."""
    return Vocabulary(**{**index["vocabulary"], "special_ids": tuple(index["vocabulary"]["special_ids"])})


def corpus_fingerprint(corpus: TokenCorpus) -> str:
    """Return the sha256 of the corpus's index, which holds the sha256 of every shard."""
    return sha256_file(corpus.folder / INDEX_FILE)


def shard_files(shard: Mapping[str, Any], vocab: Vocabulary) -> dict[str, tuple[int, str]]:
    """Return the names of a shard's tokens and offsets -> their size in bytes, and their sha256."""
    name = shard["name"]
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise InputError(f"the shard name {name!r} is not a plain file name: the corpus was altered")
    return {
        f"{name}.tokens": (shard["tokens"] * vocab.dtype.itemsize, shard["tokens_sha256"]),
        f"{name}.offsets": ((shard["documents"] + 1) * OFFSET_DTYPE.itemsize, shard["offsets_sha256"]),
    }


def verify_shard(folder: Path, shard: Mapping[str, Any], vocab: Vocabulary) -> None:
    """Read both files of a shard, and compare their sha256 with the index, and the ids with the vocabulary.

    Raises:
        InputError: a file is missing or was altered, or an id is outside the vocabulary.
    """
    tokens, offsets = shard_files(shard, vocab).items()
    verify_file(folder / offsets[0], *offsets[1])
    verify_file(folder / tokens[0], *tokens[1], vocab=vocab)


def verify_file(path: Path, size: int, sha256: str, *, vocab: Vocabulary | None = None) -> None:
    """Read a file, and compare its size and sha256, and with `vocab` the ids that it holds.

    Raises:
        InputError: the file is missing, incomplete or altered, or an id is outside the vocabulary.
    """
    _require_size(path, size)
    digest, most = hashlib.sha256(), -1
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            if vocab is not None:
                most = max(most, int(np.frombuffer(block, dtype=vocab.dtype).max()))
    if digest.hexdigest() != sha256:
        raise InputError(f"{path} does not match its sha256 in {INDEX_FILE}: the corpus was altered; prepare it again")
    if vocab is not None and most >= vocab.size:
        raise InputError(f"{path} holds id {most}, outside the vocabulary of {vocab.size}")


def map_tokens(folder: Path, shard: Mapping[str, Any], vocab: Vocabulary) -> NDArray:
    """Map the token ids of a shard, uint16 or uint32.

    Raises:
        InputError: the file is missing or incomplete.
    """
    tokens, _ = shard_files(shard, vocab).items()
    return _map_file(folder / tokens[0], vocab.dtype, tokens[1][0], random_access=True)


def _map_offsets(folder: Path, shard: Mapping[str, Any], vocab: Vocabulary) -> NDArray[np.int64]:
    _, (name, (size, _)) = shard_files(shard, vocab).items()
    path = folder / name
    offsets = _map_file(path, OFFSET_DTYPE, size)
    ends = (int(offsets[0]), int(offsets[-1]))
    if ends != (0, shard["tokens"]) or not bool(np.all(offsets[1:] > offsets[:-1])):
        raise InputError(f"{path} does not fit its tokens (0..{shard['tokens']}, ascending): prepare the corpus again")
    return offsets


def _require_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        came = "is missing" if size is None else f"has {size} bytes"
        raise InputError(f"{path} {came}, expected {expected}: the corpus is incomplete; prepare or copy it again")


def _map_file(path: Path, dtype: np.dtype, size: int, *, random_access: bool = False) -> NDArray:
    _require_size(path, size)
    if not size:
        return np.empty(0, dtype=dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if random_access:
        # A sample is a few kilobytes anywhere in the file; read-ahead would fetch a hundred times as much.
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=dtype)

"""Late chunking: a text goes through the model once, and the token states of each chunk are averaged.

Each chunk's embedding so knows the text around it (Günther et al. 2024, arXiv:2409.04701). A text above the model's
limit goes through in windows that overlap.

Shapes: S tokens of a window with special ones, T tokens of a text without special ones, C chunks of a text, H hidden
size, D embedding size.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.tasks.embed import EmbeddingRequest
from gte_deploy.text.chunking import (
    ChunkRule,
    Ranges,
    SentenceChunks,
    TokenChunks,
    checked_spans,
    overlapping,
    ranges_of_spans,
    visible_places,
)
from gte_deploy.text.inputs import as_texts, check_integer

if TYPE_CHECKING:
    from gte_deploy.text.tokenization import Piece, TextTokenizer

# Characters of the texts that are tokenised and planned at once: enough for full batches, and a bound on memory.
_GROUP_CHARACTERS = 1 << 22
# More tokens than any text has, because its bytes are limited.
_NO_LIMIT = 1 << 40
_OVERLAP_SHARE = 10

ChunkSpec = ChunkRule | Sequence[Any]
"""A rule for chunks, or the caller's (start, end) of each chunk of a text, or a list of these for several texts."""

Projection = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""From mean states [C, H] to embeddings [C, D]."""

ChunkSums = tuple[int, NDArray[np.float64]]
"""The number of a document's chunk, and the sums [C', H] of a window's states for it and for the chunks behind it."""


@dataclass(frozen=True, eq=False)
class ChunkEmbeddings:
    """The embeddings of the chunks of one text.

    Args:
        text: the text.
        offsets: [C, 2] int64, the characters (code points) at which each chunk begins and ends in the text.
        embeddings: [C, D], one for each chunk: an array, or a torch tensor, or a list of tensors, as the call asked.
    """

    text: str
    offsets: NDArray[np.int64]
    embeddings: Any

    @property
    def texts(self) -> list[str]:
        """The text of each chunk."""
        return [self.text[start:end] for start, end in self.offsets.tolist()]

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.offsets)


def chunk_records(found: Iterable[ChunkEmbeddings], *, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yield plain data for each chunk of each text: the text's number (from `first`), start, end and embedding."""
    for number, each in enumerate(found, start=first):
        for (start, end), embedding in zip(each.offsets.tolist(), each.embeddings, strict=True):
            yield {"text": number, "start": start, "end": end, "embedding": embedding.tolist()}


@dataclass(frozen=True)
class ChunkedTexts:
    """The texts of one call.

    Args:
        texts: the texts, each behind the prompt.
        prompt: characters of the prompt.
        spans: the caller's chunks [C, 2] of each text, if the caller gave them, else None.
        single: whether the caller gave one text alone.
    """

    texts: list[str]
    prompt: int
    spans: list[NDArray[np.int64]] | None
    single: bool

    @classmethod
    def of(cls, inputs: Any, prompt: str, chunks: ChunkSpec) -> "ChunkedTexts":
        """Read the arguments of a call.

        Raises:
            InputError: see `as_texts` and `checked_spans`; or there is not one list of spans for each text.
        """
        texts, single = as_texts(inputs, prompt=prompt)
        if isinstance(chunks, TokenChunks | SentenceChunks):
            return cls(texts, len(prompt), None, single)
        if isinstance(chunks, str | bytes) or not isinstance(chunks, Sequence | np.ndarray):
            raise InputError(
                "chunks must be TokenChunks(…), SentenceChunks(…), or (start, end) for each chunk of each text, not "
                f"{type(chunks).__name__}"
            )
        lists = [chunks] if single else chunks
        if len(lists) != len(texts):
            raise InputError(
                f"chunks has {len(lists)} lists and there are {len(texts)} inputs; give a list of (start, end) for each"
            )
        spans = [
            checked_spans(given, text[len(prompt) :], f"input {number}")
            for number, (given, text) in enumerate(zip(lists, texts, strict=True))
        ]
        return cls(texts, len(prompt), spans, single)

    @property
    def keys(self) -> Sequence[Hashable]:
        """A key for each text: equal texts with equal chunks have equal keys."""
        if self.spans is None:
            return self.texts
        return [(text, spans.tobytes()) for text, spans in zip(self.texts, self.spans, strict=True)]

    def groups(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of texts, in groups that are worked on one after the other."""
        group: list[int] = []
        size = 0
        for number in numbers:
            length = len(self.texts[number])
            if group and size + length > _GROUP_CHARACTERS:
                yield group
                group, size = [], 0
            group.append(number)
            size += length
        if group:
            yield group


@dataclass(frozen=True)
class Window:
    """A part of a document that goes through the model at once.

    Args:
        document: the document.
        first: the document's token at which the window begins.
        end: the token behind its last.
        counted: tokens (first, end) whose states are taken from this window and not from its neighbours.
    """

    document: "Document"
    first: int
    end: int
    counted: tuple[int, int]

    @property
    def row(self) -> list[int]:
        """Token ids, the prompt's and special tokens included."""
        document = self.document
        return document.tokenizer.template.row([*document.prompt_ids, *document.ids[self.first : self.end]])

    def sums(self, states: NDArray[np.float32]) -> ChunkSums:
        """Return the sums of the counted states for the first to the last chunk that has any, from states [S, H]."""
        document = self.document
        shift = len(document.tokenizer.template.prefix) + len(document.prompt_ids) - self.first
        low, high = self.counted
        begins = np.clip(document.ranges[:, 0], low, high)
        ends = np.clip(document.ranges[:, 1], low, high)
        chunks = np.flatnonzero(ends > begins)
        if not len(chunks):
            return 0, np.zeros((0, states.shape[1]))
        chosen = range(int(chunks[0]), int(chunks[-1]) + 1)
        found = np.zeros((len(chosen), states.shape[1]))
        for row, chunk in enumerate(chosen):
            # Along the token axis numpy adds one by one: float32 sums in float64 keep their digits.
            part = states[begins[chunk] + shift : ends[chunk] + shift]
            np.add.reduce(part, axis=0, dtype=np.float64, out=found[row])
        return chosen[0], found


@dataclass(frozen=True, eq=False)
class Document:
    """The tokens of a text, and its chunks.

    Args:
        index: number of the text.
        tokenizer: tokenizer of the model.
        prompt_ids: tokens of the prompt; every window begins with them.
        ids: tokens of the text.
        ranges: [C, 2], the tokens of each chunk.
        offsets: [C, 2], the characters of each chunk.
        size: most tokens of the text in a window.
        overlap: tokens of the text that neighbouring windows share.
    """

    index: int
    tokenizer: "TextTokenizer"
    prompt_ids: list[int]
    ids: list[int]
    ranges: Ranges
    offsets: NDArray[np.int64]
    size: int
    overlap: int

    @property
    def windows(self) -> list[Window]:
        """The windows, in order; none if there are no chunks."""
        if not len(self.ranges):
            return []
        places = overlapping(len(self.ids), self.size, self.overlap).tolist()
        # A token of two windows counts in the one whose edge is farther from it.
        inner = [(end + first + 1) // 2 for (_, end), (first, _) in pairwise(places)]
        counted = pairwise([0, *inner, len(self.ids)])
        return [Window(self, first, end, each) for (first, end), each in zip(places, counted, strict=True)]

    def mean(self, sums: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the mean states [C, H] of the chunks from the sums over their tokens."""
        counts = self.ranges[:, 1] - self.ranges[:, 0]
        return (sums / counts[:, None]).astype(np.float32)


@dataclass(frozen=True)
class ChunkRequest:
    """The arguments of one call that say which chunks to embed, and how.

    Args:
        embedding: form of the embeddings.
        chunks: rule for chunks, or the caller's own chunks.
        window_overlap: tokens that neighbouring windows of a long text share; None for a tenth of a window.
    """

    embedding: EmbeddingRequest
    chunks: ChunkSpec
    window_overlap: int | None

    def check(self) -> None:
        """Refuse arguments that chunks cannot have, before any work.

        Raises:
            InputError: the message names the argument.
        """
        embedding = self.embedding
        if embedding.output_value != "sentence_embedding":
            raise InputError(
                f"output_value is {embedding.output_value!r}; chunks give one embedding each, so leave it out"
            )
        if embedding.pooling != "mean":
            raise InputError(
                f"pooling is {embedding.pooling!r}; chunks have the mean of their tokens, since only the first chunk "
                "has a first token of the text. Leave pooling out, or pass 'mean'"
            )
        embedding.check()

    def documents(
        self,
        given: ChunkedTexts,
        numbers: Sequence[int],
        tokenizer: "TextTokenizer",
        *,
        limit: int,
        truncation: bool,
    ) -> list[Document]:
        """Tokenise texts and plan their windows.

        Args:
            given: the texts of the call.
            numbers: the texts to tokenise.
            tokenizer: tokenizer of the model.
            limit: most tokens of a window, special tokens included.
            truncation: whether a text keeps one window's tokens only.

        Raises:
            InputError: a chunk has no token; the prompt leaves no room for the text; `window_overlap` is above half a
                window.
        """
        budget = limit - tokenizer.min_length + 1
        overlap = budget // _OVERLAP_SHARE
        if self.window_overlap is not None:
            overlap = check_integer("window_overlap", self.window_overlap, 0, budget // 2)
        pieces = tokenizer.encode_places(
            [given.texts[number] for number in numbers],
            numbers,
            max_length=limit if truncation else _NO_LIMIT,
            truncation=truncation,
        )
        return [self._document(piece, given, tokenizer, budget, overlap) for piece in pieces]

    def _document(
        self, piece: "Piece", given: ChunkedTexts, tokenizer: "TextTokenizer", budget: int, overlap: int
    ) -> Document:
        text, prompt, index = given.texts[piece.index], given.prompt, piece.index
        places = visible_places(text, piece.offsets)
        own = int(np.searchsorted(places[:, 1], prompt, side="right"))
        places = np.maximum(places[own:] - prompt, 0)
        if given.spans is None:
            assert isinstance(self.chunks, TokenChunks | SentenceChunks)  # as ChunkedTexts.of has checked
            ranges = self.chunks.ranges(text[prompt:], places)
            offsets = np.stack([places[ranges[:, 0], 0], places[ranges[:, 1] - 1, 1]], axis=1)
        else:
            offsets = given.spans[index]
            ranges = ranges_of_spans(offsets, places)
            _check_tokens(ranges, offsets, index)
        ids = piece.own_ids
        size = budget - own
        if size < 1:
            raise InputError(
                f"input {index} has a prompt of {own:,} tokens, and max_length leaves room for {budget:,} tokens; "
                "choose a shorter prompt or a larger max_length"
            )
        return Document(index, tokenizer, ids[:own], ids[own:], ranges, offsets, size, min(overlap, size // 2))

    def answers(
        self, documents: Sequence[Document], sums: Iterator[tuple[Window, ChunkSums]], project: Projection | None = None
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """Yield each document's number, and its offsets [C, 2] and embeddings [C, D], when its last window is done.

        Args:
            documents: the documents.
            sums: each window of these documents with its `sums`, in any order.
            project: the model's Dense modules, if it has some.
        """
        spec = self.embedding.spec

        def answer(document: Document, states: NDArray[np.float32]) -> tuple[list[int], list[Any]]:
            embeddings = self.embedding.finished(states if project is None else project(states))
            return [document.index], [(document.offsets, embeddings)]

        totals: dict[int, NDArray[np.float64]] = {}
        left = {document.index: len(document.windows) for document in documents}
        for document in documents:
            if not left[document.index]:
                yield answer(document, np.zeros((0, spec.hidden_size), np.float32))
        for window, (first, part) in sums:
            document = window.document
            index = document.index
            if index not in totals:
                totals[index] = np.zeros((len(document.ranges), spec.hidden_size))
            totals[index][first : first + len(part)] += part
            left[index] -= 1
            if not left[index]:
                yield answer(document, document.mean(totals.pop(index)))

    def assemble(self, found: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], given: ChunkedTexts) -> Any:
        """Return a `ChunkEmbeddings` for each text, in the requested form; of one text alone, that one."""
        together = self.embedding.in_form(np.concatenate([embeddings for _, embeddings in found]))
        results, first = [], 0
        for text, (offsets, embeddings) in zip(given.texts, found, strict=True):
            end = first + len(embeddings)
            results.append(ChunkEmbeddings(text[given.prompt :], offsets, together[first:end]))
            first = end
        return results[0] if given.single else results


def windows_of(documents: Sequence[Document]) -> dict[int, Window]:
    """Return the windows of all documents, numbered."""
    return dict(enumerate(window for document in documents for window in document.windows))


def _check_tokens(ranges: Ranges, offsets: NDArray[np.int64], index: int) -> None:
    empty = np.flatnonzero(ranges[:, 0] == ranges[:, 1])
    if len(empty):
        chunk = int(empty[0])
        raise InputError(
            f"chunk {chunk} of input {index}, {tuple(offsets[chunk].tolist())}, has no token: it is white space, or "
            "characters that the tokenizer drops, or truncation cut it off. Leave it out"
        )

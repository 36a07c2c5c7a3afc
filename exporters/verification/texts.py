"""Batches of real text: what quantization is calibrated with, and what its accuracy is measured on.

Both are Addresses on the State of the Union, in the public domain; none is in the built-in model's training text, and
the two files share none.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.text.batching import collate
from gte_deploy.text.tokenization import TextTokenizer

MASK_PROBABILITY = 0.15
_ROUNDS = 3
"""How often `text_batches` can mask other words of the same texts."""
TextBatch = tuple[Batch, np.ndarray]
Span = tuple[int, int]
"""First word and the one after the last, of all words in a row."""
_WINDOWS = (32, 128, 512, 2048)
_WINDOW_TOKENS = 512  # of a batch of windows; longer ones stand alone
_ROWS_OF_A_BATCH = 4
_SEED = 20240729


def builtin_texts(name: str) -> list[str]:
    """The paragraphs of "calibration" or "evaluation"."""
    file = resources.files("gte_deploy.exporters") / "texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").split("\n")


def read_texts(path: Path) -> list[str]:
    """The lines of a user's file that are not blank.

    Raises:
        InputError: the file cannot be read as UTF-8 text, or has no such line.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}. Expected UTF-8 with one text a line.") from error
    if not texts:
        raise InputError(f"{path} holds no text; expected UTF-8 with one text a line")
    return texts


def text_batches(
    texts: Sequence[str], tokenizer: TextTokenizer, spec: ModelSpec, *, max_tokens: int, round: int = 0
) -> list[TextBatch]:
    """Token ids of `texts` in all lengths: every text alone, sorted and padded in batches of four, and all their words
    run together and cut into windows of 32 to 2,048 tokens.

    The words are the same for every limit of the model, and so are those that are masked: what is longer than the
    limit is cut into pieces, so that a verdict on these batches does not hang on where the limit falls.

    With a classifier that is fed token types, every second row is a pair of its halves. With a fill-mask model, 15 % of
    the words are masked (seeded), others in every round and others in the windows; the array holds what stood there,
    [num_masks] int64, empty for other tasks.

    Args:
        texts: at least one.
        tokenizer: of the model.
        spec: of the model.
        max_tokens: words of the texts at most, and as many again in windows.
        round: up to `_ROUNDS` - 1; all rounds together mask nine words in ten once.
    """
    rng = np.random.default_rng(_SEED)
    prefix, suffix = tokenizer.template.prefix, tokenizer.template.suffix
    special = len(prefix) + len(suffix)
    has_pairs = spec.task == "classify" and spec.token_types
    rows = tokenizer.encode_texts(
        [text for text in texts if text.strip()], max_length=max(max_tokens, special + 1), truncation=True
    )
    words = [row[len(prefix) : len(row) - len(suffix)] for row in _at_most(rows, max_tokens)]
    ends = np.cumsum([0, *map(len, words)])
    inner = max(1, spec.max_length - special)
    pieces = [span for start, end in pairwise(ends) for span in _cut(start, end, inner)]
    windows = _windows(int(ends[-1]), [min(window - special, inner) for window in _WINDOWS])
    stream, luck = np.concatenate(words).astype(np.int64), rng.random(ends[-1])

    def batch(spans: Sequence[Span], kind: int) -> TextBatch:
        # Each round and kind masks its own 15 % of all words.
        masked = np.floor(luck / MASK_PROBABILITY) == 2 * round + kind
        rows = [
            _row(stream[slice(*span)].tolist(), tokenizer, is_pair=has_pairs and i % 2 == 0)
            for i, span in enumerate(spans)
        ]
        positions, wanted = None, np.empty(0, np.int64)
        if spec.task == "fill-mask" and tokenizer.mask_token_id is not None:
            places = [
                (i, len(prefix) + n)
                for i, span in enumerate(spans)
                for n in np.flatnonzero(masked[slice(*span)]).tolist()
            ]
            # At least one mask: a batch without any says nothing of the vocabulary projection.
            positions = np.array(places or [(0, min(len(prefix), len(rows[0]) - 1))], np.int64)
            wanted = _mask(rows, positions, tokenizer.mask_token_id)
        padded = collate(rows, pad_token_id=spec.pad_token_id, token_types=spec.token_types)
        return dataclasses.replace(padded, mask_positions=positions), wanted

    return [batch(group, 0) for group in _grouped(pieces)] + [batch(group, 1) for group in windows]


class Rounds(Protocol):
    """The batches of each round; a list of lists is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sequence[TextBatch]: ...


class TextRounds:
    """The rounds of `text_batches`, each made when it is first asked for; the arguments are those of the function."""

    def __init__(self, texts: Sequence[str], tokenizer: TextTokenizer, spec: ModelSpec, *, max_tokens: int) -> None:
        self._make = partial(text_batches, texts, tokenizer, spec, max_tokens=max_tokens)
        self._made: dict[int, list[TextBatch]] = {}

    def __len__(self) -> int:
        return _ROUNDS

    def __getitem__(self, number: int, /) -> Sequence[TextBatch]:
        if number not in self._made:
            self._made[number] = self._make(round=number)
        return self._made[number]


def _cut(start: int, end: int, length: int) -> list[Span]:
    """Spans of `length` that cover `start` to `end`; the last is what is left. One, empty, where there is nothing."""
    return [(i, min(i + length, end)) for i in range(start, end, length)] or [(start, end)]


def _windows(total: int, lengths: Sequence[int]) -> list[list[Span]]:
    """Every word once: a sixth of them in windows of each shorter length, the rest in the longest; in batches."""
    parts = [total * i // 6 for i in range(len(lengths))] + [total]
    groups = []
    for (start, end), length in zip(pairwise(parts), lengths, strict=True):
        spans = _cut(start, end, length) if start < end else []
        whole, rest = [span for span in spans if span[1] - span[0] == length], spans[-1:]
        rows = max(1, _WINDOW_TOKENS // length)
        groups += [whole[i : i + rows] for i in range(0, len(whole), rows)]
        groups += [rest] if rest and rest != whole[-1:] else []
    return groups


def _row(words: list[int], tokenizer: TextTokenizer, *, is_pair: bool) -> list[int]:
    """A text of these words; or a pair of their halves, as long as that, the last words making room for [SEP]."""
    inner = len(words) - (tokenizer.min_pair_length - 2) + (tokenizer.min_length - 1)
    if not is_pair or inner < 2:
        return tokenizer.template.row(words)
    return tokenizer.template.row(words[: inner // 2], words[inner // 2 : inner])


def _at_most(rows: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Rows spread evenly over `rows` that hold no more than `max_tokens`; at least one where there is one."""
    total = sum(map(len, rows))
    keep = min(len(rows), max(1, len(rows) * max_tokens // max(total, 1)))
    return [rows[i] for i in np.linspace(0, len(rows) - 1, keep).round().astype(int)] if rows else []


def _grouped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    by_length = sorted(spans, key=lambda span: span[1] - span[0])
    for start in range(0, len(by_length), _ROWS_OF_A_BATCH):
        yield by_length[start : start + _ROWS_OF_A_BATCH]


def _mask(rows: list[list[int]], positions: NDArray[np.int64], mask_token_id: int) -> NDArray[np.int64]:
    """Put the mask token at the positions (row, token), and return the ids that stood there."""
    wanted = np.array([rows[row][token] for row, token in positions], np.int64)
    for row, token in positions:
        rows[row][token] = mask_token_id
    return wanted

"""Where the chunks of a text begin and end, for embeddings of parts of a text.

A rule turns the places of a text's tokens into ranges of tokens, one range a chunk.

Shapes: T tokens of a text without special ones, C chunks.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.text.inputs import check_integer

Ranges = NDArray[np.int64]
"""[C, 2]: the first token of each chunk, and the one behind its last."""

_MOST_TOKENS = (1 << 31) - 1

# Unicode's Sentence_Break=STerm, without "!" and "?", in scripts that are written today. Many of these scripts have no
# spaces between sentences.
_STOPS = "։؝؞؟۔܀܁܂߹।॥၊။።፧፨᙮។៕᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮。꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹖﹗！？｡"  # noqa: RUF001
_CLOSER = "[\u00a0\u202f]?[\"'’”»›)\\]}」』】》〉〕］）｝｣＂＇]"  # French has a narrow space before its own  # noqa: RUF001
# All of them: the sentence does not end before the last one, where a space may stand.
_CLOSERS = rf"(?:{_CLOSER})*(?!{_CLOSER})"
_BREAK = re.compile(
    rf"(?P<stop>[{_STOPS}][{_STOPS}.!?…]*{_CLOSERS})"  # breaks wherever it stands
    rf"|(?<![.!?…])(?P<mark>[.!?…]+)(?![.!?…]){_CLOSERS}(?=\s|\Z)"  # breaks before a space; never tried twice
    r"|(?P<paragraph>\n\s*\n|[\u2029\f])"
)
_NEXT = re.compile(r"\s*(\S?)")
# The word before a full stop: letters, digits and inner full stops.
_LAST_WORD = re.compile(r"(?:[^\W_]|\.)+\Z")
_LONGEST_WORD = 16
_ABBREVIATIONS = frozenset(
    (
        "approx art bijv bzw ca capt cf col dept dhr dott dr dra evtl fig figs fr gen ggf hon hr lt m mlle mm mme mr "
        "mrs ms mt mevr nr prof rev sgt sig sr sra srta st str ud uds vgl vol vs им ул"
    ).split()
)


@dataclass(frozen=True)
class TokenChunks:
    """Chunks of equally many tokens; the last one has the rest.

    Args:
        size: tokens of a chunk, special tokens not counted.
        overlap: tokens that a chunk shares with the one before.

    Raises:
        InputError: `size` is not a positive integer, or `overlap` is not one below `size`.
    """

    size: int = 256
    overlap: int = 0

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1, _MOST_TOKENS)
        check_integer("overlap", self.overlap, 0, self.size - 1)

    def ranges(self, text: str, places: NDArray[np.int64]) -> Ranges:
        """Return the tokens of each chunk, for tokens at these places [T, 2] of the text."""
        return overlapping(len(places), self.size, self.overlap)


@dataclass(frozen=True)
class SentenceChunks:
    """Chunks of as many whole sentences as have at most `max_tokens` tokens.

    A longer sentence is cut into parts of nearly equal length, as few as possible. See `sentences` for the rule.

    Args:
        max_tokens: most tokens of a chunk, special tokens not counted.

    Raises:
        InputError: `max_tokens` is not a positive integer.
    """

    max_tokens: int = 256

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 1, _MOST_TOKENS)

    def ranges(self, text: str, places: NDArray[np.int64]) -> Ranges:
        """Return the tokens of each chunk, for tokens at these places [T, 2] of the text, which begin in order."""
        begins = np.searchsorted(places[:, 0], [start for start, _ in sentences(text)])
        found: list[tuple[int, int]] = []
        first = last = 0
        for end in [*begins.tolist(), len(places)]:
            if end - first > self.max_tokens:
                found.append((first, last))
                first = last
            if end - first > self.max_tokens:
                parts = -(-(end - first) // self.max_tokens)
                found += pairwise([first + (end - first) * part // parts for part in range(parts + 1)])
                first = end
            last = end
        found.append((first, last))
        return as_ranges([(first, last) for first, last in found if last > first])


ChunkRule = TokenChunks | SentenceChunks


def sentences(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each sentence in the text, with the white space behind it; together they are the text.

    A sentence ends behind

    - a full stop, an ellipsis, "!" or "?", with closing quotes and brackets, if white space follows. A full stop or an
      ellipsis does not end it if the next character is a small letter. Nor does one full stop behind a single letter,
      a word with inner full stops ("e.g."), a number of at most two digits, or one of few abbreviations ("Dr.");
    - a sentence terminator of another script (。！？ । ؟ ።), also without white space;
    - an empty line, a form feed or a paragraph separator.

    Scripts without such marks, such as Thai, are split at empty lines and at spaces behind "!" and "?" only.
    """  # noqa: RUF002
    cuts = [0, *_sentence_ends(text), len(text)]
    return [(start, end) for start, end in pairwise(cuts) if end > start]


def _sentence_ends(text: str) -> Iterator[int]:
    done = 0
    for found in _BREAK.finditer(text):
        following = _NEXT.match(text, found.end())
        assert following is not None  # it matches the empty text, too
        if found["mark"] is None or _ends_sentence(text, found.start(), found["mark"], following[1]):
            end = following.start(1)
            if end > done:
                yield end
                done = end


def _ends_sentence(text: str, place: int, mark: str, following: str) -> bool:
    if mark[-1] in "!?":
        return True
    if following.islower():
        return False
    if mark != ".":
        return True
    word = _LAST_WORD.search(text, max(0, place - _LONGEST_WORD), place)
    if word is None:
        return True
    is_short_number = word[0].isdecimal() and len(word[0]) <= 2
    is_letter = len(word[0]) == 1 and word[0].isalpha()
    return not (is_short_number or is_letter or "." in word[0] or word[0].lower() in _ABBREVIATIONS)


def overlapping(count: int, size: int, overlap: int) -> Ranges:
    """Return ranges of `size` over `count` tokens; each repeats `overlap` tokens of the one before."""
    firsts = np.arange(0, max(count - overlap, min(count, 1)), size - overlap, dtype=np.int64)
    return np.stack([firsts, np.minimum(firsts + size, count)], axis=1)


def ranges_of_spans(spans: NDArray[np.int64], places: NDArray[np.int64]) -> Ranges:
    """Return the tokens that share a character with each span [C, 2], for tokens at these places [T, 2], in order.

    A span without a token gets an empty range.
    """
    first = np.searchsorted(places[:, 1], spans[:, 0], side="right")
    return np.stack([first, np.maximum(first, np.searchsorted(places[:, 0], spans[:, 1]))], axis=1)


def visible_places(text: str, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places of tokens without the white space around them, in order.

    Some tokenizers count the space before a word to its token. A token of white space alone keeps its place. A token
    without a character, such as a word mark alone, gets the character at its place.

    Args:
        text: the text.
        offsets: [T, 2], the characters at which each token begins and ends.
    """
    places = offsets.copy()
    for token, (start, end) in enumerate(offsets.tolist()):
        if start < end and (text[start].isspace() or text[end - 1].isspace()) and (seen := text[start:end].strip()):
            begin = start + text[start:end].index(seen)
            places[token] = begin, begin + len(seen)
    places[:, 0] = np.clip(places[:, 0], 0, max(0, len(text) - 1))
    places[:, 1] = np.clip(places[:, 1], places[:, 0] + 1, max(1, len(text)))
    return np.maximum.accumulate(places, axis=0)


def checked_spans(given: Any, text: str, where: str) -> NDArray[np.int64]:
    """Return the caller's spans of one text as [C, 2] int64.

    Args:
        given: a sequence of (start, end), in characters (code points).
        text: the text.
        where: name of the text in messages.

    Raises:
        InputError: a span is no pair of integers, is empty, or is not inside the text.
    """
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise InputError(f"chunks of {where} must be a list of (start, end), not {type(given).__name__}")
    for number, span in enumerate(given):
        if not _is_span(span, len(text)):
            raise InputError(
                f"chunk {number} of {where} is {span!r}; expected (start, end), integers with 0 <= start < end <= "
                f"{len(text):,}, the characters of the text"
            )
    return as_ranges(given)


def as_ranges(pairs: Sequence[Any]) -> Ranges:
    """Return pairs of integers as [C, 2] int64, also if there are none."""
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, (tuple, list, np.ndarray)) or len(span) != 2:
        return False
    integers = all(isinstance(each, (int, np.integer)) and not isinstance(each, bool) for each in span)
    return integers and 0 <= span[0] < span[1] <= length

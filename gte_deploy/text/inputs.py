"""Checks the texts, pairs and integers of a caller before any work. A message names the index and the limit."""

import numbers
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gte_deploy.core.errors import InputError

MAX_TEXT_BYTES = 4 << 20
"""Longest text in UTF-8 bytes, prompt included. Tokenising takes about a second per megabyte, before truncation."""
MAX_BATCH_SIZE = 65_536
MAX_BATCH_TOKENS = 1 << 24

_NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)

Distinct = TypeVar("Distinct", bound=Hashable)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` if it is an integer in [low, high].

    Raises:
        InputError: it is not; booleans are not integers here.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(f"{name} must be an integer from {low:,} to {high:,}, not {value!r}")
    return int(value)


def as_texts(inputs: Any, *, name: str = "inputs", prompt: str = "") -> tuple[list[str], bool]:
    """The texts with `prompt` before each, and whether the input was a single text.

    Raises:
        InputError: `inputs` is not a text or a non-empty sequence of texts; a text is longer than MAX_TEXT_BYTES or has
            a lone surrogate.
    """
    if isinstance(inputs, str):
        return [_prompted(inputs, prompt, name)], True
    return [_prompted(text, prompt, name, i) for i, text in enumerate(_as_list(inputs, name))], False


def distinct(inputs: Sequence[Distinct]) -> dict[int, Distinct]:
    """The inputs of one call, each once: the number of the first among equal ones -> the input, in order."""
    firsts: dict[Distinct, int] = {}
    for number, item in enumerate(inputs):
        firsts.setdefault(item, number)
    return {number: item for item, number in firsts.items()}


def as_words(inputs: Any) -> list[list[str]]:
    """The words of each text; a flat sequence of words is one text.

    Raises:
        InputError: `inputs` is not a non-empty sequence of words or of such sequences; `as_texts` refuses a text.
    """
    if isinstance(inputs, str):
        raise InputError("inputs is one text; with is_split_into_words a text must be a list of its words")
    items = _as_list(inputs, "inputs")
    if isinstance(items[0], str):
        return [as_texts(items)[0]]
    return [as_texts(_as_list(item, "inputs", i), name=f"inputs[{i}]")[0] for i, item in enumerate(items)]


def as_pairs(inputs: Any, *, prompt: str = "") -> tuple[list[tuple[str, ...]], bool]:
    """Each input as a tuple of one or two texts, and whether there was a single input, as CrossEncoder reads them.

    A text is one input, and so is a flat sequence of two texts (a pair). A sequence of sequences is a batch. `prompt`
    is put before the first text of each input.

    Raises:
        InputError: the input has another form, or `as_texts` refuses a text.
    """
    if isinstance(inputs, str):
        return [(_prompted(inputs, prompt, "inputs"),)], True
    items = _as_list(inputs, "inputs")
    if not any(isinstance(item, str) for item in items):
        return [_as_pair(item, prompt, "inputs", i) for i, item in enumerate(items)], False
    if len(items) != 2:
        raise InputError(
            f"inputs is a flat list of {len(items)} texts; one pair has two. For a batch give a list of pairs "
            "[[query, document], …], or of single texts [[text], …]."
        )
    return [_as_pair(items, prompt, "inputs")], True


# The functions below run once for each text. They take the place of a text as an argument's name and indices in it, and
# spell it, as in inputs[3][1], only for an error.


def _as_list(inputs: Any, name: str, *place: int) -> list[Any]:
    if not isinstance(inputs, list | tuple):
        import numpy as np  # not above: the command lines check integers with this module

        if isinstance(inputs, np.ndarray):
            inputs = inputs.tolist() if inputs.ndim else inputs.item()
        # A set has no order for answers to be in, and of a mapping, keys or values could be meant.
        if not isinstance(inputs, Iterable) or isinstance(inputs, _NO_LISTS):
            raise InputError(f"{_where(name, place)} must be a text or a list of texts, not {type(inputs).__name__}")
    items = list(inputs)
    if not items:
        raise InputError(f"{_where(name, place)} is empty; give at least one text")
    return items


def _as_pair(item: Any, prompt: str, name: str, *place: int) -> tuple[str, ...]:
    texts = _as_list(item, name, *place)
    if len(texts) > 2:
        raise InputError(f"{_where(name, place)} has {len(texts)} texts; expected one text or a pair")
    return tuple([_prompted(text, "" if i else prompt, name, *place, i) for i, text in enumerate(texts)])


def _prompted(text: Any, prompt: str, name: str, *place: int) -> str:
    """Return the text behind the prompt, if it is one that can be tokenised."""
    if not isinstance(text, str):
        raise InputError(f"{_where(name, place)} must be a text (str), not {type(text).__name__}")
    text = prompt + text
    # ASCII has no surrogates, and as many bytes as characters; Python stores whether a text is ASCII.
    if len(text) > MAX_TEXT_BYTES or not text.isascii():
        _check_encoding(text, _where(name, place) if place else f"{name} (one text)")
    return text


def _check_encoding(text: str, where: str) -> None:
    # A text has at least as many bytes as characters, so an oversized text is refused before it is copied.
    if len(text) > MAX_TEXT_BYTES:
        raise InputError(_too_long(where, f"{len(text):,} characters"))
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has a lone surrogate {text[error.start]!a} at character {error.start}, which no UTF-8 text can "
            "hold. Decode the input with errors='replace'."
        ) from None
    if size > MAX_TEXT_BYTES:
        raise InputError(_too_long(where, f"{size:,} bytes"))


def _where(name: str, place: Sequence[int]) -> str:
    return name + "".join(f"[{index}]" for index in place)


def _too_long(where: str, size: str) -> str:
    return f"{where} has {size}; a text may have at most {MAX_TEXT_BYTES:,} bytes of UTF-8. Split it into parts."

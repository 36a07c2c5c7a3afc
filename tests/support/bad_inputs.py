"""Inputs that people send by mistake or on purpose, in one table for the Python API, the commands and the server.

Each row has a stated outcome: an error that says something, or a finite answer. Where JSON can say a value, the server
gets it, too; where bytes can, the commands get it as an argument and on stdin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from gte_deploy.text.inputs import MAX_TEXT_BYTES

GOOD = "the [MASK] is old"


@dataclass(frozen=True)
class BadInput:
    """A value in place of a text, or of a list of texts.

    Args:
        name: of the test.
        value: the value in Python.
        says: regular expression of the error; None where the answer is finite.
    """

    name: str
    value: Any
    says: str | None = None

    def json(self, around: Any = lambda value: value) -> bytes | None:
        """JSON of `around(value)` as Python's json writes it, NaN included; None where JSON has no such value."""
        try:
            return json.dumps(around(self.value)).encode("ascii")
        except TypeError:
            return None

    def utf8(self) -> bytes:
        """A text as the bytes of a terminal or a file, which are no UTF-8 where it has a lone surrogate."""
        assert isinstance(self.value, str)
        return self.value.encode("utf-8", "surrogatepass")


def rows(inputs: Iterable[BadInput]) -> Any:
    """The inputs for `pytest.mark.parametrize`. The ids are short: those of long texts would go between workers."""
    return [pytest.param(row, id=row.name) for row in inputs]


_NO_TEXTS = r"(inputs|texts|documents)"

NOT_TEXTS = tuple(
    BadInput(f"{type(value).__name__} {value!r:.8}", value, _NO_TEXTS)
    for value in (None, 7, 1.5, float("nan"), True, b"text", bytearray(b"text"), {"text": 1}, {"a"})
) + (BadInput("object", object(), _NO_TEXTS),)
"""In place of a text or a list of texts."""

EMPTY = (BadInput("list", [], _NO_TEXTS), BadInput("tuple", (), _NO_TEXTS))
"""No texts at all."""

BAD_ITEMS = tuple(BadInput(repr(value), value) for value in (None, 7, float("nan"), b"text", {"a": 1}, {"[MASK]"}))
"""In place of one text of a list; the error names the index."""

NESTED = tuple(
    BadInput(repr(value), value, r"(inputs|texts)\[\d\] must be a text \(str\), not list")
    for value in ([[GOOD]], [GOOD, [GOOD]], [[]])
)
"""Lists of lists, for methods that take no pairs."""

SURROGATES = tuple(
    BadInput(ascii(value), f"[MASK] {value}", r"lone surrogate '\\ud")
    for value in ("\ud800", "\udfff", "a\udc80b", "\udc00\ud800")
)
"""Texts that no UTF-8 can hold."""

TOO_LARGE = tuple(
    BadInput(name, value, f"at most {MAX_TEXT_BYTES:,} bytes")
    for name, value in (("x", "x" * 10_000_000), ("é", "é" * 5_000_000), ("[MASK]", "[MASK] " * 1_500_000))
)
"""Texts that are refused whatever is asked for."""

MEGABYTES = (
    BadInput("words", "[MASK] " + "the old king " * 80_000),
    BadInput("a word", "[MASK] " + "x" * 1_000_000),
    BadInput("中", "[MASK] " + "中" * 330_000),
    BadInput("masks", "[MASK] " + "[MASK]" * 160_000),
)
"""Texts that are answered if they may be cut."""

FINITE = (
    BadInput("empty", ""),
    BadInput("spaces", "   \t\n "),
    BadInput("NUL", "\0"),
    BadInput("NUL inside", "the\0king"),
    BadInput("replacement", "\ufffd the \ufffd"),
    BadInput("ZWJ", "a\u200db \u200d"),
    BadInput("right to left", "שלום \u202eking\u202c مرحبا"),
    BadInput("combining marks", "a" + "\u0301" * 100_000),
    BadInput("emoji", "👩‍👩‍👧‍👦" * 20),
    BadInput("literal specials", "[SEP] [CLS] [PAD] [UNK] </s> <mask>"),
    BadInput("control", "".join(map(chr, range(1, 32)))),
    BadInput("private use", "\ue000\U0010ffff"),
    BadInput("noncharacters", "\ufffe\uffff\U0001fffe"),
    BadInput("byte order mark", "\ufeffking"),
    BadInput("line separators", "a\u2028b\u2029c\x85d\x0be"),
    BadInput("markup", "<script>alert('king')</script> %s %n {0} {{king}} $(king) `king` ; -- '\""),
)
"""Odd texts that a model answers."""

MAX_LENGTHS = tuple(
    BadInput(repr(value), value, r"max_length must be an integer from [35] to 128")
    for value in (0, -1, 1, 2, 129, 2**31, 2.0, "9", True)
)
"""Of models that take 128 tokens."""

NOT_JSON: tuple[tuple[str, bytes, str], ...] = (
    ("empty", b"", "empty"),
    ("cut off", b"{", "not JSON"),
    ("without its end", b'{"inputs": "a"', "not JSON"),
    ("two values", b'{"inputs": "a"} {}', "not JSON"),
    ("single quotes", b"{'inputs': 'a'}", "not JSON"),
    ("a trailing comma", b'{"inputs": "a",}', "not JSON"),
    ("a form", b"inputs=a", "not JSON"),
    ("not UTF-8", b'{"inputs": "\xff"}', "not UTF-8"),
    ("UTF-16", '{"inputs": "a"}'.encode("utf-16"), "not UTF-8"),
    ("NUL", b'{"inputs": "\0"}', "not JSON"),
    ("NUL behind", b'{"inputs": "a"}\0', "not JSON"),
    ("byte order mark", b'\xef\xbb\xbf{"inputs": "a"}', "not JSON"),
    ("NaN", b'{"inputs": NaN}', "NaN"),
    ("Infinity", b'{"inputs": -Infinity}', "Infinity"),
    ("a key twice", b'{"inputs": "a", "inputs": "b"}', "'inputs' twice"),
    ("a key twice inside", b'{"inputs": {"a": 1, "a": 2}}', "'a' twice"),
    ("deep lists", b"[" * 100_000, "too many levels"),
    ("deep lists with ends", b"[" * 100_000 + b"]" * 100_000, "too many levels"),
    ("deep objects", b'{"a":' * 100_000, "too many levels"),
    ("a long number", b'{"inputs": ' + b"9" * 5000 + b"}", "number"),
)
"""Name, body and what is said: bodies that no route takes, since two parsers could read them in two ways."""

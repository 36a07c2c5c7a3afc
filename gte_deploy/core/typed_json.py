"""Reads JSON from anywhere into checked types: each wrong value is refused with its place in the document.

A `JsonValue` is a value and its place. Each of its methods takes one type, checks it, and returns it as such, so that
nothing behind the edge meets a float for an integer, a string for a list, or a number without bounds.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Read = TypeVar("Read")
Choice = TypeVar("Choice")

# What JSON calls the types that Python's json module gives.
_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number"}
_SHOWN = 60
MAX_COUNT = 1 << 31
"""The largest number of anything, unless a reader gives another."""


@dataclass(frozen=True)
class JsonValue:
    """A value of a JSON document.

    Args:
        value: the value, as the json module gives it.
        place: where it is, such as "spec.prompts" or "files['a.bin'].size"; empty for the whole document.
    """

    value: Any
    place: str = ""

    def refuse(self, expected: str) -> ValueError:
        """Return the error that says what the value is, and what was expected of it."""
        shown = repr(self.value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        return ValueError(f"{self.place or 'it'} is {shown}; expected {expected}")

    def __getitem__(self, name: str) -> "JsonValue":
        """Return a field that an object must have.

        Raises:
            ValueError: this is no object, or has no such field.
        """
        fields = self._of(dict)
        inside = self._inside(name)
        if name not in fields:
            raise ValueError(f"{inside} is missing")
        return JsonValue(fields[name], inside)

    def get(self, name: str, default: Any = None) -> "JsonValue":
        """Return a field of an object, or `default` in its place. Raises ValueError: this is no object."""
        return JsonValue(self._of(dict).get(name, default), self._inside(name))

    def fields(self) -> "dict[str, JsonValue]":
        """Return all fields of an object. Raises ValueError: this is no object."""
        return {name: JsonValue(value, f"{self.place}[{name!r}]") for name, value in self._of(dict).items()}

    def entries(self, *, least: int = 0) -> "list[JsonValue]":
        """Return the entries of a list. Raises ValueError: this is no list, or has fewer than `least` entries."""
        entries = self._of(list)
        if len(entries) < least:
            raise self.refuse(f"at least {least} entries")
        return [JsonValue(value, f"{self.place}[{number}]") for number, value in enumerate(entries)]

    def has_only(self, names: Collection[str]) -> None:
        """Refuse an object with another field. Raises ValueError: this is no object, or has one; it is named."""
        for name in self._of(dict):
            if name not in names:
                raise ValueError(f"{self._inside(name)} is unknown; expected {', '.join(sorted(names))}")

    def text(self, pattern: str = "") -> str:
        """Return a string that can be encoded in UTF-8, and matches a regular expression as a whole, if there is one.

        Raises:
            ValueError: this is no string, or another one.
        """
        text: str = self._of(str)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.refuse("a string of whole characters, and no half of a surrogate pair") from error
        if pattern and not re.fullmatch(pattern, text):
            raise self.refuse(f"a string of the form {pattern}")
        return text

    def whole(self, low: int = 0, high: int = MAX_COUNT) -> int:
        """Return an integer from `low` to `high`. Raises ValueError: this is none; 1.0 and true are none, either."""
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.refuse(f"a whole number, {low} to {high:,}")
        return self.value

    def number(self, low: float = 0.0, below: float = math.inf) -> float:
        """Return a number from `low` up to, and not, `below`. Raises ValueError: this is none; NaN is none, either."""
        if type(self.value) not in (int, float) or not low <= self.value < below:
            raise self.refuse(f"a number of at least {low:g}" + (f" and below {below:g}" if below < math.inf else ""))
        number: float = self.value
        return number

    def flag(self) -> bool:
        """Return a boolean. Raises ValueError: this is none."""
        flag: bool = self._of(bool)
        return flag

    def one_of(self, allowed: Sequence[Choice]) -> Choice:
        """Return one of the values that are allowed. Raises ValueError: this is none of them."""
        # Not by `in`: 1 == True, and a list cannot be hashed.
        for choice in allowed:
            if type(self.value) is type(choice) and self.value == choice:
                return choice
        raise self.refuse(f"one of {', '.join('null' if choice is None else str(choice) for choice in allowed)}")

    def or_none(self, read: "Callable[[JsonValue], Read]") -> Read | None:
        """Return None for null, and else what `read` makes of the value."""
        return None if self.value is None else read(self)

    def _of(self, kind: type) -> Any:
        if type(self.value) is not kind:
            raise self.refuse(_TYPES[kind])
        return self.value

    def _inside(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

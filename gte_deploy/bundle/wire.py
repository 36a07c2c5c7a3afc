"""Reads protobuf messages as strictly as no protobuf library does: only the one encoding that every parser reads alike.

Parsers differ in what they make of anything else, so a file could show one graph to an inspection and another to the
engine. Libraries write exactly this encoding (https://protobuf.dev/programming-guides/encoding/):

- a number is a varint of the least length, of at most 64 bits, and fits the width of its field;
- each field is one that the message defines, with the wire type of its own type;
- a field that is not repeated occurs once, and a message has one member of each oneof;
- every length ends within the message around it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {"int32": _VARINT, "int64": _VARINT, "float": _FIXED32, "double": _FIXED64}
_FIXED_BYTES = {_FIXED32: 4, _FIXED64: 8}
_MAX_DEPTH = 64
_MAX_FIELD = (1 << 29) - 1
# A number whose last byte is zero has a shorter encoding; and none has over 64 bits.
_BAD_PACKED = re.compile(rb"[\x80-\xff]\x00|[\x80-\xff]{9}[\x02-\xff]")

Message = Mapping[str, Any]
"""The kept fields of a message: name -> value, or the list of values of a repeated field."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """How to read one field. `once` is the same for fields of which a message has at most one, None if repeated."""

    name: str
    type: str
    wire: int
    once: str | None
    child: "_Rules | None"
    kept: bool


@dataclass(frozen=True)
class _Rules:
    """A message: its name, the tag of each field -> its rule, and whether any of its fields are kept."""

    name: str
    fields: dict[int, _Rule]
    visited: bool


class Schema:
    """The messages that a file may hold."""

    def __init__(
        self, messages: Mapping[str, Mapping[int, tuple[str, str]]], *, kept: Mapping[str, frozenset[str]]
    ) -> None:
        """Take a table as in `onnx_fields`, and the names of the fields whose values are kept, for each message."""
        self._rules = {name: _Rules(name, {}, name in kept) for name in messages}
        for message, fields in messages.items():
            for number, (name, spelled) in fields.items():
                self._add(message, number, name, spelled, name in kept.get(message, ()))

    def _add(self, message: str, number: int, name: str, spelled: str, kept: bool) -> None:
        oneof, _, type = spelled.rpartition(":")
        repeated, type = type.startswith("*"), type.removeprefix("*")
        child = self._rules.get(type)
        own = _WIRE_TYPES.get(type, _BYTES)
        once = None if repeated else (oneof or name)
        # A repeated number comes alone or packed with others in a field of bytes; parsers read both.
        for wire in {own, _BYTES} if repeated and own != _BYTES else {own}:
            self._rules[message].fields[number << 3 | wire] = _Rule(name, type, wire, once, child, kept)

    def read(self, data: bytes, message: str, visit: Callable[[str, Message, int], None] = lambda *_: None) -> Message:
        """Read a whole message, and return its kept fields.

        Args:
            data: the message.
            message: its name in the table.
            visit: is called with each message inside it and then itself, if fields of such messages are kept: its name,
                these fields, and how many messages are around it.

        Raises:
            ValueError: the data are not in the one encoding that is read; the message of the error says where.
        """
        try:
            return _Reader(data, visit).message(0, len(data), self._rules[message], 0)
        except IndexError as error:
            raise ValueError("a field runs past the end of the file") from error


class _Reader:
    def __init__(self, data: bytes, visit: Callable[[str, Message, int], None]) -> None:
        self._data = data
        self._visit = visit

    def message(self, at: int, end: int, rules: _Rules, depth: int) -> Message:
        """Read the message between two offsets. It is one loop, because a graph has ten thousand fields."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"messages nested deeper than {_MAX_DEPTH}")
        data, fields = self._data, rules.fields
        kept: dict[str, Any] = {}
        seen: set[str] = set()
        value: Any
        while at < end:
            start = at
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(data, start)
            rule = fields.get(tag)
            if rule is None:
                raise ValueError(_unknown(tag, rules, start))
            if rule.once is not None:
                if rule.once in seen:
                    raise ValueError(f"{rules.name}.{rule.name} occurs twice, at byte {start}")
                seen.add(rule.once)
            if rule.wire == _BYTES:
                size = data[at]
                at += 1
                if size > 0x7F:
                    size, at = _varint(data, at - 1)
                start, at = at, at + size
                if at > end:
                    raise ValueError(f"{rules.name}.{rule.name} runs past the end of its message, at byte {start}")
                # The two commonest kinds first.
                if rule.child is not None:
                    value = self.message(start, at, rule.child, depth + 1)
                elif rule.type == "string":
                    value = data[start:at].decode("utf-8")
                else:
                    value = self._content(rule, start, at)
            elif rule.wire == _VARINT:
                value, at = _varint(data, at)
                if rule.type == "int32" and (1 << 31) <= value < (1 << 64) - (1 << 31):
                    raise ValueError(f"{rules.name}.{rule.name} is {value}, which does not fit 32 bits")
            else:
                at, value = at + _FIXED_BYTES[rule.wire], None
            if rule.kept:
                if rule.once is not None:
                    kept[rule.name] = value
                elif isinstance(value, list):  # numbers that stand together
                    kept.setdefault(rule.name, []).extend(value)
                else:
                    kept.setdefault(rule.name, []).append(value)
        if at != end:
            raise ValueError(f"the last field of a {rules.name} runs past its end, at byte {end}")
        if rules.visited:
            self._visit(rules.name, kept, depth)
        return kept

    def _content(self, rule: _Rule, start: int, end: int) -> list[int] | None:
        """Check the content of a field of bytes: bytes as they are, or numbers that stand together."""
        if rule.type == "bytes":
            return None
        wire = _WIRE_TYPES[rule.type]
        if wire != _VARINT:
            if (end - start) % _FIXED_BYTES[wire]:
                raise ValueError(f"{rule.name} ends within a number, at byte {end}")
            return None
        return self._packed(rule, start, end)

    def _packed(self, rule: _Rule, start: int, end: int) -> list[int] | None:
        """Check numbers that stand together; return them if the field is kept."""
        view = memoryview(self._data)[start:end]
        if (found := _BAD_PACKED.search(view)) or (view and view[-1] > 0x7F):
            where = end if found is None else start + found.start()
            raise ValueError(f"{rule.name} has a malformed number, at byte {where}")
        if not rule.kept:
            return None
        numbers, at = [], start
        while at < end:
            number, at = _varint(self._data, at)
            numbers.append(number)
        return numbers


def encode_varint(number: int) -> bytes:
    """Return the shortest encoding of a number."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def encode_field(number: int, content: bytes) -> bytes:
    """Return a field of bytes with its tag and length."""
    return encode_varint(number << 3 | _BYTES) + encode_varint(len(content)) + content


def encode_number(number: int, value: int) -> bytes:
    """Return a field with a number that is not negative."""
    return encode_varint(number << 3 | _VARINT) + encode_varint(value)


def map_fields(data: bytes, number: int, change: Callable[[bytes], bytes | None]) -> bytes:
    """Return a message with `change` applied to the content of each field of bytes with this number.

    A field is left out if `change` returns None. Nothing is checked: `Schema.read` must have read the message before.
    """
    parts: list[bytes] = []
    at = copied = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            content, at = at, at + size
            if tag >> 3 == number:
                changed = change(data[content:at])
                parts += (data[copied:start], b"" if changed is None else encode_field(number, changed))
                copied = at
        else:
            at += _FIXED_BYTES[wire]
    return b"".join((*parts, data[copied:]))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at an offset and the offset behind it."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift, start = byte & 0x7F, 7, at
    while byte > 0x7F:
        at += 1
        byte = data[at]
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70 or (shift == 70 and byte > 1):
            raise ValueError(f"a number has more than 64 bits, at byte {start}")
    if byte == 0:
        raise ValueError(f"a number is longer than needed, at byte {start}")
    return number, at + 1


def _unknown(tag: int, rules: _Rules, at: int) -> str:
    number, wire = tag >> 3, tag & 7
    if not 1 <= number <= _MAX_FIELD:
        return f"a field of {rules.name} has the number {number}, at byte {at}; expected 1 to {_MAX_FIELD}"
    known = next((rule.name for key, rule in rules.fields.items() if key >> 3 == number), None)
    if known is None:
        return f"{rules.name} has a field {number}, at byte {at}, which ONNX does not define"
    return f"{rules.name}.{known} has the wire type {wire}, at byte {at}, which is not that of its type"

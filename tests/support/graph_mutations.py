"""ONNX files with one thing changed: an encoding that parsers may read differently, or random bytes.

The encoder is this module's own, so that it can write what no library writes.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper, numpy_helper

# For each message: field number -> the message inside it, as far as mutations go down.
_INSIDE = {
    "model": {7: "graph", 8: "leaf", 14: "leaf", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "leaf", 12: "leaf", 13: "leaf", 15: "sparse", 16: "leaf"},
    "function": {7: "node", 9: "leaf", 11: "attribute"},
    "node": {5: "attribute", 9: "leaf"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "leaf", 16: "leaf"},
    "leaf": {},
}


@dataclass(frozen=True)
class RawField:
    """A field as its bytes: tag, what stands between tag and content (a length, or nothing), and the content."""

    tag: bytes
    length: bytes
    content: bytes

    @property
    def bytes(self) -> bytes:
        return self.tag + self.length + self.content


def varint(number: int, *, padding: int = 0) -> bytes:
    """Encode a number, with so many bytes more than needed."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    for _ in range(padding):
        encoded[-1] |= 0x80
        encoded.append(0)
    return bytes(encoded)


def field(number: int, content: bytes) -> RawField:
    return RawField(varint(number << 3 | 2), varint(len(content)), content)


def model_with_everything() -> bytes:
    """An ONNX file that both engines run, with a subgraph, a function's operators, external data and negative numbers.

    Its input is float32 [2, 3]; it reads 24 bytes of `weights.bin`.
    """
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["then"])], "then", [], [helper.make_tensor_value_info("then", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["else"])], "else", [], [helper.make_tensor_value_info("else", 1, None)]
    )
    constant = numpy_helper.from_array(np.asarray([3.0, -1.0, 0.5], np.float32), "k")
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], name="add"),
        helper.make_node("If", ["yes"], ["b"], then_branch=inner, else_branch=other),
        helper.make_node("Softmax", ["a"], ["s"], axis=-1),
        helper.make_node("Mul", ["s", "b"], ["m"]),
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("Sub", ["m", "c"], ["y"]),
    ]
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "24")):
        weights.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [2, 3])],
        [helper.make_tensor_value_info("y", 1, [2, 3])],
        [weights, helper.make_tensor("yes", TensorProto.BOOL, [], [True]), helper.make_tensor("n", 7, [2], [-1, 300])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="test")
    return model.SerializeToString()


def split(data: bytes) -> list[RawField]:
    """Split a well-formed message into its fields."""
    found, at = [], 0
    while at < len(data):
        start, (tag, at) = at, _number(data, at)
        behind, wire = at, tag & 7
        if wire == 2:
            size, at = _number(data, at)
            found.append(RawField(data[start:behind], data[behind:at], data[at : at + size]))
            at += size
            continue
        at = _number(data, at)[1] if wire == 0 else at + (8 if wire == 1 else 4)
        found.append(RawField(data[start:behind], b"", data[behind:at]))
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        number |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return number, at


Change = Callable[[list[RawField], int], bytes]
"""From the fields of a message and the index of one to the bytes of the changed message."""


def _one(change: Callable[[RawField], bytes]) -> Change:
    return lambda fields, index: b"".join(
        change(found) if number == index else found.bytes for number, found in enumerate(fields)
    )


def _tag(found: RawField) -> int:
    return _number(found.tag, 0)[0]


def _is_number(found: RawField) -> bool:
    return _tag(found) & 7 == 0


def _value(found: RawField) -> int:
    return _number(found.content, 0)[0] if _is_number(found) else 0


def _insert(raw: bytes) -> Change:
    return _one(lambda found: found.bytes + raw)


# Every kind of encoding that is not the canonical one. Parsers accept some of them, and do not agree on all.
CHANGES: dict[str, Change] = {
    "tag_one_byte_too_long": _one(lambda f: varint(_tag(f), padding=1) + f.length + f.content),
    "tag_of_ten_bytes": _one(lambda f: varint(_tag(f), padding=10 - len(f.tag)) + f.length + f.content),
    "tag_with_bit_32": _one(lambda f: varint(_tag(f) | 1 << 32) + f.length + f.content),
    "tag_with_bits_above_32": _one(lambda f: varint(_tag(f) | 7 << 32) + f.length + f.content),
    "tag_with_bit_63": _one(lambda f: varint(_tag(f) | 1 << 63) + f.length + f.content),
    "tag_of_eleven_bytes": _one(lambda f: varint(_tag(f), padding=11 - len(f.tag)) + f.length + f.content),
    "length_too_long": _one(lambda f: f.tag + (f.length and varint(len(f.content), padding=1)) + f.content),
    "length_of_ten_bytes": _one(lambda f: f.tag + (f.length and varint(len(f.content), padding=8)) + f.content),
    "length_with_bit_32": _one(lambda f: f.tag + (f.length and varint(len(f.content) | 1 << 32)) + f.content),
    "length_with_bit_63": _one(lambda f: f.tag + (f.length and varint(len(f.content) | 1 << 63)) + f.content),
    "length_one_more": _one(lambda f: f.tag + (f.length and varint(len(f.content) + 1)) + f.content),
    "length_one_less": _one(lambda f: f.tag + (f.length and varint(max(0, len(f.content) - 1))) + f.content),
    "number_too_long": _one(
        lambda f: f.tag + (varint(_value(f), padding=1) if _is_number(f) else f.length + f.content)
    ),
    "number_with_bit_32": _one(
        lambda f: f.tag + (varint(_value(f) | 1 << 32) if _is_number(f) else f.length + f.content)
    ),
    "number_of_eleven_bytes": _one(
        lambda f: f.tag + (b"\x81" * 10 + b"\x01" if _is_number(f) else f.length + f.content)
    ),
    "twice": _one(lambda f: f.bytes * 2),
    "twice_and_first_empty": _one(lambda f: (f.tag + b"\x00" if f.length else f.bytes) + f.bytes),
    "cut_into_two": _one(
        lambda f: (
            field(_tag(f) >> 3, f.content[:3]).bytes + field(_tag(f) >> 3, f.content[3:]).bytes if f.length else f.bytes
        )
    ),
    "left_out": _one(lambda f: b""),
    "moved_to_the_end": lambda fields, index: b"".join(
        f.bytes for f in (*fields[:index], *fields[index + 1 :], fields[index])
    ),
    "as_group": _one(lambda f: varint(_tag(f) & ~7 | 3) + f.content + varint(_tag(f) & ~7 | 4)),
    "group_around": _one(lambda f: varint(99 << 3 | 3) + f.bytes + varint(99 << 3 | 4)),
    "group_not_ended": _one(lambda f: varint(99 << 3 | 3) + f.bytes),
    "group_ended_early": _one(lambda f: varint(99 << 3 | 4) + f.bytes),
    "as_fixed32": _one(lambda f: varint(_tag(f) & ~7 | 5) + b"\x01\x02\x03\x04"),
    "as_fixed64": _one(lambda f: varint(_tag(f) & ~7 | 1) + bytes(8)),
    "as_number": _one(lambda f: varint(_tag(f) & ~7) + varint(7)),
    "as_bytes": _one(lambda f: field(_tag(f) >> 3, f.content).bytes),
    "wire_type_6": _one(lambda f: varint(_tag(f) & ~7 | 6) + f.content),
    "wire_type_7": _one(lambda f: varint(_tag(f) | 7) + f.content),
    "field_0": _insert(b"\x02\x01x"),
    "field_above_the_largest": _insert(varint((1 << 29) << 3 | 2) + b"\x01x"),
    "largest_field": _insert(varint(((1 << 29) - 1) << 3 | 2) + b"\x01x"),
    "unknown_field": _insert(field(77, b"abc").bytes),
    "unknown_number": _insert(varint(78 << 3) + b"\x05"),
    "byte_order_mark": _insert(b"\xef\xbb\xbf"),
    "not_utf8": _one(lambda f: field(_tag(f) >> 3, b"\xff" + f.content[1:]).bytes if f.length else f.bytes),
    "zero_behind": _one(lambda f: field(_tag(f) >> 3, f.content + b"\0").bytes if f.length else f.bytes),
}


def mutations(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a name and an ONNX file for each kind of change at each field of each message of a model."""
    for name, apply in CHANGES.items():
        for number, changed in enumerate(_everywhere(data, "model", apply)):
            yield f"{name}_{number}", changed


def _everywhere(data: bytes, kind: str, apply: Change) -> Iterator[bytes]:
    fields = split(data)
    for index, found in enumerate(fields):
        yield apply(fields, index)
        number = _tag(found) >> 3
        if found.length and number in _INSIDE[kind]:
            before = b"".join(other.bytes for other in fields[:index])
            after = b"".join(other.bytes for other in fields[index + 1 :])
            for inside in _everywhere(found.content, _INSIDE[kind][number], apply):
                yield before + field(number, inside).bytes + after


def random_mutation(data: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four random changes of its bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 1, 2, 4, 16))
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = rng.randbytes(size)
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                other = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + size]
            case 5 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)

"""Strict JSON: what is taken is what another parser reads, and whatever comes, it is a value or a refusal."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gte_deploy.serving.failures import RequestError
from gte_deploy.serving.json_body import parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_it_reads_what_another_parser_reads(value):
    body = json.dumps(value).encode()
    assert parse_json(body) == json.loads(body) == value


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:0129.eE-+truefalsnNI\\u d8', max_size=40).map(str.encode))
def test_any_bytes_are_a_value_or_a_refusal(body):
    try:
        found = parse_json(body)
    except RequestError as error:
        assert error.status == 400 and error.message
        return
    try:
        expected = orjson.loads(body)
    except orjson.JSONDecodeError:
        # orjson refuses lone surrogates, which are refused later here, as texts, and numbers beyond a float64.
        assert "\\u" in body.decode().lower() or "Infinity" in json.dumps(found)
        return
    assert floats(found) == floats(expected)


def floats(value):
    """The value with floats in place of integers, as orjson reads those of more than 64 bits."""
    if isinstance(value, dict):
        return {key: floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [floats(each) for each in value]
    return float(value) if type(value) is int else value


@pytest.mark.parametrize("depth", [10, 100_000])
def test_depth(depth):
    body = b"[" * depth + b"]" * depth
    if depth == 10:
        assert json.dumps(parse_json(body)).encode() == body
    else:
        with pytest.raises(RequestError, match="levels"):
            parse_json(body)

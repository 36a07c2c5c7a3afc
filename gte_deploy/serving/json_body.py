"""Strict JSON: what two parsers could read in different ways is refused."""

import json
from typing import Any, NoReturn

from gte_deploy.serving.failures import RequestError


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        RequestError: the text is not UTF-8 or not JSON, has NaN or Infinity, the same key twice in one object, an
            integer of thousands of digits, or too many levels of lists and objects.
    """
    if not body:
        raise RequestError(400, "the body is empty; expected a JSON object")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: {error.reason} at byte {error.start:,}") from None
    except json.JSONDecodeError as error:
        raise RequestError(400, f"the body is not JSON: {error.msg} at character {error.pos:,}") from None
    except RecursionError:
        raise RequestError(400, "the body has too many levels of lists and objects") from None
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise RequestError(400, f"the body has a number that cannot be read: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RequestError(400, f"the body has the key {twice!a} twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(400, f"the body has {name}, which is not JSON")

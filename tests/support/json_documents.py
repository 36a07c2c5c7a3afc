"""JSON documents with one value changed, for tests of what reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Place = tuple[Any, ...]
"""The keys and indices that lead from a document to one of its values."""


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Yield the path to every value of a document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places(inside, (*path, key))


def put(data: Any, path: Place, value: Any) -> Any:
    """Return a copy with another value at a place; ... leaves the value out."""
    changed = copy.deepcopy(data)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return changed

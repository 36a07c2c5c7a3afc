"""Fuzzes one target of targets.py, guided by coverage: python run.py TARGET CORPUS [option of libFuzzer ...].

It needs atheris, and what `import gte_deploy` and the server's parser need: tests/support/environments.py fuzz.
"""

import json
import random
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["gte_deploy"]):
    from targets import TARGETS, Refused


VALUES: list[Any] = [None, True, 0, -1, 1 << 62, 0.5, 1e308, "", "x", "../x", "\ud800", "[MASK]", [], [[]], {}, {"": 0}]


def change_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a value at any depth of a JSON document; what is no JSON, and every fourth document, byte by byte."""
    rng = random.Random(seed)
    try:
        document = json.loads(data)
        places = list(_places([document]))
    except (ValueError, RecursionError):
        places = []
    if not places or rng.random() < 0.25:
        return atheris.Mutate(data, max_size)
    for _ in range(rng.choice((1, 1, 2, 4))):
        inside, key = rng.choice(places)
        other, name = rng.choice(places)
        inside[key] = rng.choice((rng.choice(VALUES), other[name]))
    try:
        changed = json.dumps(document, separators=(",", ":")).encode()
    except (ValueError, RecursionError):  # a document that became a part of itself
        return data
    return changed if len(changed) <= max_size else data


def _places(inside: Any) -> Any:
    """Yield each container of a document with each of its keys."""
    for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
        yield inside, key
        if isinstance(inside[key], dict | list):
            yield from _places(inside[key])


def main() -> None:
    """Run until an option of libFuzzer ends it, or an input breaks the target."""
    target = TARGETS[sys.argv[1]]

    def once(data: bytes) -> None:
        try:
            target(data)
        except Refused:
            pass

    documents = {"custom_mutator": change_json} if sys.argv[1] in ("manifest", "tokenizer") else {}
    atheris.Setup([sys.argv[0], *sys.argv[2:]], once, **documents)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Bounds what the rules of a tokenizer.json may do, and turns their failures into errors of this package.

The rules are data of a stranger. A normalizer that replaces a letter by a megabyte fills the memory with a short text.
And where the tokenizers library gives up, as for a pattern that goes back and forth too often, it panics: with an
exception that is no `Exception`, so no server would catch it.
"""

import base64
import binascii
import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models

from gte_deploy.core.errors import CheckpointError, GteDeployError

MAX_GROWTH = 64
"""The most characters that the rules together may make of one character of a text; NFKC makes up to 18."""

_MAX_RULES = 256
_MAX_DEPTH = 32
_MAX_WORD = 256  # characters; the library's own value is 100
_MAX_MARK = 64  # characters of a prefix or suffix that marks a part of a word
_SPARE_IDS = 1 << 16
_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")


@contextlib.contextmanager
def failures_as(kind: type[GteDeployError], message: str) -> Iterator[None]:
    """Raise `kind` with `message` and the reason in place of whatever the tokenizers library raises or panics with."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, GteDeployError):
        raise
    except BaseException as error:  # PanicException derives from BaseException, and is in no module to import it from
        raise kind(f"{message} ({type(error).__name__}: {str(error)[:300]})") from error


def check_rules(tokenizer: Tokenizer) -> None:
    """Refuse rules that make texts many times longer, or that take very long.

    Raises:
        CheckpointError: the message names the rule's place and the bound.
    """
    for name in _RULES:
        rule = getattr(tokenizer, name)
        if rule is None:
            continue
        described = json.loads(rule.__getstate__())
        if (count := _count(described, 0)) > _MAX_RULES:
            raise _refused(f"the {name} of tokenizer.json has {count:,} rules; at most {_MAX_RULES} are read")
        if name in ("normalizer", "decoder") and (growth := _growth(described)) > MAX_GROWTH:
            raise _refused(
                f"the {name} of tokenizer.json may make {growth:,} characters of one; the limit is {MAX_GROWTH}"
            )
    _check_model(tokenizer.model)
    _check_ids(tokenizer)


def _check_model(model: Any) -> None:
    """Refuse words of any length: WordPiece looks up every part of a word, so its time grows with the third power."""
    longest = getattr(model, "max_input_chars_per_word", 0)
    if longest > _MAX_WORD:
        raise _refused(f"max_input_chars_per_word of tokenizer.json is {longest:,}; the limit is {_MAX_WORD}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        mark = getattr(model, name, None)
        if mark is not None and len(mark) > _MAX_MARK:
            raise _refused(f"{name} of tokenizer.json has {len(mark):,} characters; the limit is {_MAX_MARK}")


def _check_ids(tokenizer: Tokenizer) -> None:
    """Refuse ids far above the number of tokens: the library writes the vocabulary by counting through all ids."""
    if isinstance(tokenizer.model, models.Unigram):
        return  # its ids are positions in a list
    highest, count = max(tokenizer.get_vocab().values(), default=0), tokenizer.get_vocab_size()
    if highest > 2 * count + _SPARE_IDS:
        raise _refused(f"tokenizer.json has the id {highest:,}, and {count:,} tokens")


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(f"{reason}. Take the tokenizer that belongs to the checkpoint.")


def _parts(rule: Any, depth: int) -> list[Any]:
    """The rules of which a rule consists; none if it is a single one."""
    if not isinstance(rule, dict) or depth > _MAX_DEPTH:
        raise _refused(f"a rule of tokenizer.json lies below more than {_MAX_DEPTH} others")
    if rule.get("type") != "Sequence":
        return []
    return list(next((rule[name] for name in _LISTS if name in rule), ()))


def _count(rule: Any, depth: int) -> int:
    return 1 + sum(_count(part, depth + 1) for part in _parts(rule, depth))


def _growth(rule: Any) -> int:
    """The most characters that a rule makes of one character."""
    kind = rule.get("type")
    if kind == "Sequence":
        return math.prod(_growth(part) for part in _parts(rule, 0))
    if kind == "Replace":
        return max(1, len(str(rule.get("content", ""))))
    if kind == "Prepend":
        length = len(str(rule.get("prepend", "")))
        return 1 if length <= _MAX_MARK else length
    if kind == "Precompiled":
        return _growth_of_map(rule.get("precompiled_charsmap"))
    return 1


def _growth_of_map(encoded: Any) -> int:
    """The characters of the longest text that a map of sentencepiece writes in place of others.

    The map is the size of a trie in four bytes, the trie, and the texts, each with a zero behind it: `Normalizer` in
    sentencepiece's normalizer.cc.
    """
    try:
        data = base64.b64decode(encoded) if isinstance(encoded, str) else bytes(encoded or ())
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    except (ValueError, TypeError, binascii.Error) as error:
        raise CheckpointError(f"the map of characters of tokenizer.json cannot be read: {error}") from error
    return max(1, *(len(text.decode("utf-8", errors="replace")) for text in texts))

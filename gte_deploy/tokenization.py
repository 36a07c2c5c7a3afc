"""Texts to token ids and back, on the `tokenizers` library alone.

The shared `tokenizers.Tokenizer` is never told to truncate or pad: such settings belong to the object, and threads
that set them differently get each other's lengths without an error. Ids are cut here, special tokens kept.
"""

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

from gte_deploy.checkpoint_spec import read_json
from gte_deploy.errors import CheckpointError, InputError
from gte_deploy.inputs import check_integer

logger = logging.getLogger(__name__)

# A first look at a long text takes this many characters for each token wanted: English has 4 to 5.
_CHARS_PER_TOKEN = 8
_LOOK_AHEAD_GROWTH = 4
# Words at the end of a look-ahead that the cut may have changed: "[MASK]" cut in two becomes up to three words.
_UNSAFE_WORDS = 8


@dataclass(frozen=True)
class Template:
    """Special tokens around one text (`prefix` A `suffix`) and a pair (`prefix` A `middle` B `pair_suffix`)."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    middle: tuple[int, ...]
    pair_suffix: tuple[int, ...]


class TextTokenizer:
    """A checkpoint's tokenizer. Nothing in it changes after construction, so threads may share it."""

    def __init__(self, tokenizer: Tokenizer, *, pad_token: str, mask_token: str | None, clean_up: bool) -> None:
        """Take over `tokenizer`, whose stored truncation and padding are switched off."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.decoder is None and type(tokenizer.model).__name__ == "WordPiece":
            tokenizer.decoder = decoders.WordPiece(prefix="##")
        self._tokenizer = tokenizer
        self._clean_up = clean_up
        self.template = _template(tokenizer, pad_token)
        self.pad_token_id: int | None = tokenizer.token_to_id(pad_token)
        self.mask_token = mask_token
        self.mask_token_id = None if mask_token is None else tokenizer.token_to_id(mask_token)
        if mask_token is not None and self.mask_token_id is None:
            raise CheckpointError(f"the mask token {mask_token!r} is not in tokenizer.json's vocabulary")

    @property
    def min_length(self) -> int:
        """Fewest tokens that `max_length` may ask of a text: its special tokens and one of its own."""
        return self._num_special(1) + 1

    @property
    def min_pair_length(self) -> int:
        """Fewest tokens that `max_length` may ask of a pair: its special tokens and one of each text."""
        return self._num_special(2) + 2

    @functools.cached_property
    def unknown_token_id(self) -> int | None:
        """Id of what is not in the vocabulary; None where the model of the tokenizer has none."""
        token = getattr(self._tokenizer.model, "unk_token", None)
        if token is not None:
            return self.token_to_id(token)
        # A Unigram model tells it in its file alone.
        found = json.loads(self._tokenizer.to_str())["model"].get("unk_id")
        return found if type(found) is int else None

    def token_to_id(self, token: str) -> int | None:
        """Id of a vocabulary entry, or None where it is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def known_or_unknown_id(self, token: str) -> int | None:
        """As transformers' convert_tokens_to_ids: the id of [UNK] where the vocabulary has no such entry."""
        found = self.token_to_id(token)
        return self.unknown_token_id if found is None else found

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, as the vocabulary has it; None where the id only pads the embedding."""
        found: str | None = self._tokenizer.id_to_token(token_id)
        return found

    def known_ids(self, vocab_size: int) -> NDArray[np.bool_]:
        """[vocab_size] bool: which ids have a token. The rows that pad the embedding have none.

        Raises:
            CheckpointError: the tokenizer has an id that the model has no row for.
        """
        ids = np.fromiter(self._tokenizer.get_vocab(with_added_tokens=True).values(), dtype=np.int64)
        if ids.max() >= vocab_size:
            raise CheckpointError(
                f"tokenizer.json has token id {ids.max():,}, and the model's vocabulary has {vocab_size:,} rows. "
                "Take the tokenizer that belongs to the checkpoint."
            )
        known = np.zeros(vocab_size, dtype=np.bool_)
        known[ids] = True
        return known

    def encode_texts(
        self, texts: Sequence[str], indices: Sequence[int] | None = None, *, max_length: int, truncation: bool
    ) -> list[list[int]]:
        """Token ids of each text, special tokens included, at most `max_length` of them.

        `indices` are the caller's numbers of the texts, for errors.

        Raises:
            InputError: a text has more tokens and `truncation` is off; it names the index, the count and the limit.
        """
        template = self.template
        budget = max_length - self._num_special(1)
        rows = []
        numbers = range(len(texts)) if indices is None else indices
        for index, (ids, whole) in zip(numbers, self._encode_bounded(texts, budget), strict=True):
            if len(ids) > budget and not truncation:
                raise _too_many_tokens(index, len(ids) + max_length - budget, max_length, whole=whole)
            rows.append([*template.prefix, *ids[:budget], *template.suffix])
        return rows

    def encode_pairs(
        self,
        inputs: Sequence[tuple[str, ...]],
        indices: Sequence[int] | None = None,
        *,
        max_length: int,
        truncation: bool,
    ) -> list[list[int]]:
        """Token ids of each single text or pair; a pair that is too long loses tokens of its longer text first.

        Raises:
            InputError: as `encode_texts`.
        """
        flat = [text for texts in inputs for text in texts]
        encoded = iter(self._encode_bounded(flat, max_length))
        rows = []
        for index, texts in zip(range(len(inputs)) if indices is None else indices, inputs, strict=True):
            parts = [next(encoded) for _ in texts]
            special = self._num_special(len(parts))
            count = sum(len(ids) for ids, _ in parts) + special
            if count > max_length and not truncation:
                raise _too_many_tokens(index, count, max_length, whole=all(whole for _, whole in parts))
            budget = max_length
            while len(parts) == 2 and not _known_which_is_longer(parts, max_length):
                budget *= _LOOK_AHEAD_GROWTH
                parts = self._encode_bounded(texts, budget)
            rows.append(self._joined([ids for ids, _ in parts], max_length - special))
        return rows

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, as transformers decodes them."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return _cleaned_up(text) if self._clean_up else text

    def target_ids(self, targets: Sequence[str]) -> list[int]:
        """Ids of the target words, each once, in the order given.

        A word that is not in the vocabulary stands for its first piece, and one without any piece for nothing; each
        is told by a warning, as transformers' fill-mask pipeline does.

        Raises:
            InputError: no target is left.
        """
        ids = [token_id for target in targets if (token_id := self._target_id(target)) is not None]
        if not ids:
            raise InputError(f"none of the {len(targets)} targets has a token; at least one must be given")
        return list(dict.fromkeys(ids))

    def _target_id(self, target: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(target)
        if token_id is not None:
            return token_id
        pieces = self._encode(target).ids
        if not pieces:
            logger.warning("The target %r is not in the vocabulary and has no token; it is ignored.", target)
            return None
        logger.warning(
            "The target %r is not in the vocabulary; its first piece %r is taken.",
            target,
            self._tokenizer.id_to_token(pieces[0]),
        )
        return int(pieces[0])

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]

    def _encode_bounded(self, texts: Sequence[str], budget: int) -> list[tuple[list[int], bool]]:
        """Ids of each text without special tokens, and whether they are all: a long text may stop above `budget`."""
        look_ahead = _CHARS_PER_TOKEN * budget
        short = [text for text in texts if len(text) <= look_ahead]
        encodings = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False) if short else ())
        return [
            (next(encodings).ids, True) if len(text) <= look_ahead else self._encode_long(text, budget)
            for text in texts
        ]

    def _encode_long(self, text: str, budget: int) -> tuple[list[int], bool]:
        """Tokenise ever longer beginnings of `text` until one holds more than `budget` tokens that no cut changed."""
        size = _CHARS_PER_TOKEN * budget
        while size < len(text):
            encoding = self._tokenizer.encode(text[:size], add_special_tokens=False)  # the fast one gives no word ids
            words = [word or 0 for word in encoding.word_ids]
            last_safe = (words[-1] if words else 0) - _UNSAFE_WORDS
            ids = [token for token, word in zip(encoding.ids, words, strict=True) if word <= last_safe]
            if len(ids) > budget:
                return ids, False
            size *= _LOOK_AHEAD_GROWTH
        return self._encode(text).ids, True

    def _num_special(self, num_texts: int) -> int:
        template = self.template
        if num_texts == 1:
            return len(template.prefix) + len(template.suffix)
        return len(template.prefix) + len(template.middle) + len(template.pair_suffix)

    def _joined(self, parts: list[list[int]], budget: int) -> list[int]:
        template = self.template
        if len(parts) == 1:
            return [*template.prefix, *parts[0][:budget], *template.suffix]
        first, second = _longest_first(len(parts[0]), len(parts[1]), budget)
        return [
            *template.prefix,
            *parts[0][:first],
            *template.middle,
            *parts[1][:second],
            *template.pair_suffix,
        ]


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a checkpoint or bundle folder.

    Raises:
        CheckpointError: tokenizer.json is missing or unreadable, or the special tokens are not what it holds.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json. Write one with transformers: AutoTokenizer.from_pretrained(…)"
            ".save_pretrained(…)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception for every malformed file
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
    config = read_json(folder / "tokenizer_config.json") or {}
    special = {**(read_json(folder / "special_tokens_map.json") or {}), **config}
    pad_token = _content(special.get("pad_token"))
    if pad_token is None:
        raise CheckpointError(f"{folder}: neither tokenizer_config.json nor special_tokens_map.json names a pad_token")
    return TextTokenizer(
        tokenizer,
        pad_token=pad_token,
        mask_token=_content(special.get("mask_token")),
        clean_up=config.get("clean_up_tokenization_spaces") is True and type(tokenizer.model).__name__ != "BPE",
    )


def checked_max_length(value: int | None, *, low: int, limit: int) -> int:
    """The caller's `max_length`, or the model's own `limit` where none is given."""
    return limit if value is None else check_integer("max_length", value, low, limit)


def _content(token: Any) -> str | None:
    # Either plain text or AddedToken's fields.
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _template(tokenizer: Tokenizer, pad_token: str) -> Template:
    """Find the special tokens by looking where the post-processor puts a marker: the pad token, which no text holds."""
    marker = tokenizer.token_to_id(pad_token)
    single = tokenizer.encode(pad_token).ids
    pair = tokenizer.encode(pad_token, pad_token).ids
    if marker is None or single.count(marker) != 1 or pair.count(marker) != 2:
        raise CheckpointError(f"tokenizer.json does not hold the pad token {pad_token!r} as one special token")
    at = single.index(marker)
    first = pair.index(marker)
    second = pair.index(marker, first + 1)
    return Template(
        prefix=tuple(single[:at]),
        suffix=tuple(single[at + 1 :]),
        middle=tuple(pair[first + 1 : second]),
        pair_suffix=tuple(pair[second + 1 :]),
    )


def _known_which_is_longer(parts: Sequence[tuple[list[int], bool]], budget: int) -> bool:
    """Whether the two texts' ids, of which a long text's may not be all, tell what `_longest_first` has to know."""
    (first, first_whole), (second, second_whole) = parts
    if first_whole and second_whole or min(len(first), len(second)) <= budget:
        return True  # ids that are not all are more than the budget, and so more than these
    return (first_whole and len(second) > len(first)) or (second_whole and len(first) > len(second))


def _longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """Tokens kept of each text of a pair: the `longest_first` rule of the tokenizers library."""
    if first + second <= budget:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > budget else max(short, budget - short)
    if short + long > budget:
        short, long = budget // 2, budget // 2 + budget % 2
    return (long, short) if first > second else (short, long)


def _too_many_tokens(index: int, count: int, limit: int, *, whole: bool) -> InputError:
    number = f"{count:,}" if whole else f"at least {count:,}"
    return InputError(
        f"input {index} has {number} tokens, special tokens included; the limit is {limit:,}. "
        "Pass truncation=True to keep the first ones, or split the text."
    )


def _cleaned_up(text: str) -> str:
    # transformers' PreTrainedTokenizerBase.clean_up_tokenization, in its order.
    for old, new in (
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ):
        text = text.replace(old, new)
    return text

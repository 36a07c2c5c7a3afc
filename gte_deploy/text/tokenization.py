"""Converts texts to token ids and back, with the `tokenizers` library only.

The shared `tokenizers.Tokenizer` never truncates or pads. Such settings belong to the object, so threads with different
settings would get each other's lengths without an error. This module truncates the ids and keeps the special tokens.
"""

import copy
import dataclasses
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

from gte_deploy.core.errors import CheckpointError, InputError, TooLongError
from gte_deploy.core.files import checked_object, parse_json
from gte_deploy.core.regular import MAX_JSON_BYTES, read_regular
from gte_deploy.core.spec import TOKENIZER_NAMES
from gte_deploy.core.tokenizer_rules import check_rules, failures_as
from gte_deploy.text.batching import TypedRow
from gte_deploy.text.filling import cleaned_up, filled_texts
from gte_deploy.text.inputs import check_integer

logger = logging.getLogger(__name__)

# The first attempt on a long text takes this many characters for each wanted token; English has 4 to 5.
_CHARS_PER_TOKEN = 8
_LOOK_AHEAD_GROWTH = 4
MAX_TOKENIZED_CHARS = 1 << 20
"""The most characters of a text that are tokenised to find the tokens that are kept: about half a second of work."""

# A text of so many characters, alone, is tokenised in the caller's thread. A batch wakes a thread, which takes longer,
# but does not compute offsets.
_ALONE_CHARS = 256
# Words at the end of the tokenised part that the cut may have changed: half of "[MASK]" is up to three words.
_UNSAFE_WORDS = 8
# Unicode's last code point, which is no character.
_NO_CHARACTER = "\U0010ffff"


@dataclass(frozen=True)
class Template:
    """Special tokens around one text (`prefix` A `suffix`) and a pair (`prefix` A `middle` B `pair_suffix`).

    `types` are the token types of `prefix`, A and `suffix`: one for each special token, and one for all of A.
    `pair_types` are the token types of `prefix`, A, `middle`, B and `pair_suffix`.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    middle: tuple[int, ...]
    pair_suffix: tuple[int, ...]
    types: tuple[tuple[int, ...], ...] = ((), (0,), ())
    pair_types: tuple[tuple[int, ...], ...] = ((), (0,), (), (0,), ())

    def row(self, *texts: Sequence[int]) -> list[int]:
        """Token ids of one or two texts with the special tokens; a `TypedRow` if not every type is 0."""
        parts: tuple[Sequence[int], ...] = (self.prefix, texts[0], self.suffix)
        types, has_types = self.types, self._has_types[0]
        if len(texts) == 2:
            parts = (self.prefix, texts[0], self.middle, texts[1], self.pair_suffix)
            types, has_types = self.pair_types, self._has_types[1]
        ids = list(chain.from_iterable(parts))
        return TypedRow(ids, _runs(parts, types)) if has_types else ids

    @cached_property
    def _has_types(self) -> tuple[bool, bool]:
        """Whether a text, and whether a pair, has a token of another type than 0."""
        return any(map(any, self.types)), any(map(any, self.pair_types))


@dataclass(frozen=True)
class Piece:
    """The tokens of a text, or of one window of a text, with their positions in it.

    Args:
        index: the number of the text.
        ids: token ids, special tokens included.
        first: position in `ids` of the first token of the text; no special token lies between the tokens of the text.
        offsets: [T, 2] int64, the characters at which each of the T tokens begins and ends: in the text, or in the word
            if the text was given as words.
        words: [T] int64, the number of the word that each token belongs to; None if the text was not given as words.
    """

    index: int
    ids: list[int]
    first: int
    offsets: NDArray[np.int64]
    words: NDArray[np.int64] | None

    @property
    def own_ids(self) -> list[int]:
        """The ids of the text's own tokens."""
        return self.ids[self.first : self.first + len(self.offsets)]


class TextTokenizer:
    """The tokenizer of a checkpoint. It never changes after construction, so threads may share it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pad_token: str,
        mask_token: str | None,
        clean_up: bool,
        truncation_side: str = "right",
    ) -> None:
        """Take over `tokenizer` and switch off its stored truncation and padding.

        `truncation_side` is the side where a text that is too long loses tokens: its end ("right") or its beginning.
        """
        if truncation_side not in ("right", "left"):
            raise CheckpointError(f"truncation_side is {truncation_side!r}; expected 'right' or 'left'")
        check_rules(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._clean_up = clean_up
        self._cuts_left = truncation_side == "left"
        with failures_as(CheckpointError, "the rules of tokenizer.json fail"):
            self.template = _template(tokenizer, pad_token)
        self.pad_token_id: int | None = tokenizer.token_to_id(pad_token)
        self.mask_token = mask_token
        self.mask_token_id = None if mask_token is None else tokenizer.token_to_id(mask_token)
        if mask_token is not None and self.mask_token_id is None:
            raise CheckpointError(f"the mask token {mask_token!r} is not in tokenizer.json's vocabulary")

    @property
    def truncation_side(self) -> str:
        """The side where a text that is too long loses tokens, "right" or "left"."""
        return "left" if self._cuts_left else "right"

    @property
    def min_length(self) -> int:
        """The least `max_length` for a text: its special tokens and one token of its own."""
        return self._num_special(1) + 1

    @property
    def min_pair_length(self) -> int:
        """The least `max_length` for a pair: its special tokens and one token of each text."""
        return self._num_special(2) + 2

    def check_types(self, type_vocab_size: int) -> None:
        """Check that a model with so many token types knows every type in the template.

        Raises:
            CheckpointError: the model lacks a type.
        """
        given = max(max(part, default=0) for part in (*self.template.types, *self.template.pair_types))
        if given >= type_vocab_size:
            raise CheckpointError(
                f"tokenizer.json gives tokens the type {given}, and the model's type_vocab_size is {type_vocab_size}. "
                "Take the tokenizer that belongs to the checkpoint."
            )

    @cached_property
    def unknown_token_id(self) -> int | None:
        """Id for text that is not in the vocabulary; None if the tokenizer's model has none."""
        token = getattr(self._tokenizer.model, "unk_token", None)
        if token is not None:
            return self.token_to_id(token)
        # A Unigram model gives it only in its file.
        found = json.loads(self._tokenizer.to_str())["model"].get("unk_id")
        return found if type(found) is int else None

    def token_to_id(self, token: str) -> int | None:
        """Id of a vocabulary entry; None if the vocabulary does not have it."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def known_or_unknown_id(self, token: str) -> int | None:
        """The id of a token, or of [UNK] if the vocabulary lacks it, as in transformers' convert_tokens_to_ids."""
        found = self.token_to_id(token)
        return self.unknown_token_id if found is None else found

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id; None if the id only pads the embedding."""
        found: str | None = self._tokenizer.id_to_token(token_id)
        return found

    def vocabulary(self) -> dict[str, int]:
        """Entry -> id, added tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def copied(self) -> Tokenizer:
        """A copy of the tokenizer that others may change."""
        return copy.deepcopy(self._tokenizer)

    def with_prefix(self, token_id: int | None) -> "TextTokenizer":
        """Return this tokenizer with one more token, of type 0, after the first special token of a text; None for none.

        Raises:
            CheckpointError: the tokenizer puts no special token before a text.
        """
        if token_id is None:
            return self
        template = self.template
        if not template.prefix:
            raise CheckpointError("tokenizer.json puts no special token before a text, so no prefix can follow it")

        def joined(values: tuple[int, ...], added: int) -> tuple[int, ...]:
            return (values[0], added, *values[1:])

        other = copy.copy(self)
        other.template = dataclasses.replace(
            template,
            prefix=joined(template.prefix, token_id),
            types=(joined(template.types[0], 0), *template.types[1:]),
            pair_types=(joined(template.pair_types[0], 0), *template.pair_types[1:]),
        )
        return other

    def known_ids(self, vocab_size: int) -> NDArray[np.bool_]:
        """[vocab_size] bool: whether each id has a token. Rows that pad the embedding have none.

        Raises:
            CheckpointError: the tokenizer has an id without a row in the model.
        """
        ids = np.fromiter(self.vocabulary().values(), dtype=np.int64)
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
        """Token ids of each text, special tokens included, at most `max_length` of them; see `Template.row`.

        `indices` are the numbers of the texts in the caller's list, for errors.

        Raises:
            InputError: a text has more tokens and `truncation` is off; the message names the index, count and limit.
        """
        template = self.template
        budget = max_length - self._num_special(1)
        rows = []
        numbers = range(len(texts)) if indices is None else indices
        for index, (ids, whole) in zip(numbers, self._encode_bounded(texts, budget, numbers), strict=True):
            if len(ids) > budget:
                if not truncation:
                    raise _too_many_tokens(index, len(ids) + max_length - budget, max_length, whole=whole)
                ids = self._cut([ids], budget)[0]
            rows.append(template.row(ids))
        return rows

    def encode_pairs(
        self,
        inputs: Sequence[tuple[str, ...]],
        indices: Sequence[int] | None = None,
        *,
        max_length: int,
        truncation: bool,
    ) -> list[list[int]]:
        """Token ids of each text or pair. A pair that is too long loses tokens of its longer text first.

        Raises:
            InputError: as `encode_texts`.
        """
        numbers = range(len(inputs)) if indices is None else indices
        firsts: dict[str, int] = {}  # each text once: many pairs may share a query
        for index, texts in zip(numbers, inputs, strict=True):
            for text in texts:
                firsts.setdefault(text, index)
        flat = list(firsts)
        encoded = dict(zip(flat, self._encode_bounded(flat, max_length, list(firsts.values())), strict=True))
        rows = []
        for index, texts in zip(numbers, inputs, strict=True):
            parts = [encoded[text] for text in texts]
            special = self._num_special(len(parts))
            count = sum(len(ids) for ids, _ in parts) + special
            if count > max_length and not truncation:
                first_fits = len(parts[0][0]) + special <= max_length
                whole = all(whole for _, whole in parts)
                raise _too_many_tokens(index, count, max_length, whole=whole, first_fits=first_fits)
            budget = max_length
            # Two long texts keep equally many tokens, but for the odd one.
            while len(parts) == 2 and (max_length - special) % 2 and not _known_which_is_longer(parts, max_length):
                if min(map(len, texts)) > MAX_TOKENIZED_CHARS:
                    raise InputError(
                        f"input {index} is a pair of {len(texts[0]):,} and {len(texts[1]):,} characters; one of the "
                        f"two may have at most {MAX_TOKENIZED_CHARS:,}. Shorten it."
                    )
                budget *= _LOOK_AHEAD_GROWTH
                parts = self._encode_bounded(texts, budget, [index] * len(texts))
            rows.append(self.template.row(*self._cut([ids for ids, _ in parts], max_length - special)))
        return rows

    def encode_places(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        indices: Sequence[int] | None = None,
        *,
        max_length: int,
        truncation: bool,
        stride: int | None = None,
    ) -> list[Piece]:
        """Return the tokens of each text with their positions in it. A text may be a list of words.

        With `stride`, a text that is too long is cut into windows; each window repeats so many tokens of the one
        before. Without `stride`, a text has one piece. `indices` are the numbers of the texts in the caller's list.

        Raises:
            InputError: as `encode_texts`; or `stride` leaves no new token for a window.
        """
        budget = max_length - self._num_special(1)
        if stride is not None:
            check_integer("stride", stride, 0, budget - 1)
        pieces: list[Piece] = []
        numbers = range(len(texts)) if indices is None else indices
        encodings = self._encodings(texts, None if stride is not None else budget, numbers)
        for index, text, (encoding, kept, whole) in zip(numbers, texts, encodings, strict=True):
            if kept > budget and stride is None and not truncation:
                raise _too_many_tokens(index, kept + max_length - budget, max_length, whole=whole)
            first = max(0, kept - budget) if self._cuts_left else 0
            cuts = [(first, min(kept, first + budget))] if stride is None else _windows(kept, budget, stride)
            as_words = not isinstance(text, str)
            pieces.extend(self._piece(index, encoding, cut, as_words=as_words) for cut in cuts)
        return pieces

    def _encodings(
        self, texts: Sequence[str] | Sequence[Sequence[str]], budget: int | None, indices: Sequence[int]
    ) -> Iterator[tuple[Any, int, bool]]:
        """For each text: its encoding without special tokens, the number of valid tokens, and whether they are all."""
        for index, text in zip(indices, texts, strict=True):
            if isinstance(text, str) and budget is not None and len(text) > self._look_ahead(budget):
                found = next((found for found in self._beginnings(text, budget, index) if found[1] > budget), None)
                if found is not None:
                    yield *found, False
                    continue
            with failures_as(InputError, _fails(f"input {index}")):
                encoding = self._tokenizer.encode(
                    text, is_pretokenized=not isinstance(text, str), add_special_tokens=False
                )
            yield encoding, len(encoding.ids), True

    def _piece(self, index: int, encoding: Any, cut: tuple[int, int], *, as_words: bool) -> Piece:
        chosen = slice(*cut)
        words = np.array(encoding.word_ids[chosen], dtype=np.int64) if as_words else None
        return Piece(
            index=index,
            ids=self.template.row(encoding.ids[chosen]),
            first=len(self.template.prefix),
            offsets=np.array(encoding.offsets[chosen], dtype=np.int64).reshape(-1, 2),
            words=words,
        )

    @cached_property
    def marks_subwords(self) -> bool:
        """Whether tokens mark that they continue a word, as with WordPiece's "##"."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    @cached_property
    def unk_token_id(self) -> int | None:
        """The id for text that is not in the vocabulary; None if the model has none."""
        name = getattr(self._tokenizer.model, "unk_token", None)
        if name is not None:
            return self._id(name)
        # Unigram does not name the id, but returns it for a character that no vocabulary holds.
        found = self._tokenizer.model.tokenize(_NO_CHARACTER)
        return int(found[0].id) if len(found) == 1 else None

    def token(self, token_id: int) -> str:
        """The token as the vocabulary has it, with its marks."""
        return str(self._tokenizer.id_to_token(token_id))

    def joined_tokens(self, tokens: Sequence[str]) -> str:
        """The text of tokens, as from transformers' `convert_tokens_to_string`."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, as transformers decodes them."""
        with failures_as(InputError, "these token ids cannot be decoded"):
            text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return cleaned_up(text) if self._clean_up else text

    def decode_filled(
        self, before: Sequence[int], candidates: Sequence[int], after: Sequence[int], *, skip_special_tokens: bool
    ) -> list[str]:
        """For each candidate the text that `decode` gives for the ids `[*before, candidate, *after]`, in less time."""
        with failures_as(InputError, "these token ids cannot be decoded"):
            return filled_texts(
                self._tokenizer,
                before,
                candidates,
                after,
                skip_special_tokens=skip_special_tokens,
                clean_up=cleaned_up if self._clean_up else None,
            )

    def target_ids(self, targets: Sequence[str]) -> list[int]:
        """Ids of the target words, each once, in the order given.

        If a word is not in the vocabulary, its first piece is used; a word without any piece is ignored. Either gives a
        warning, as in transformers' fill-mask pipeline.

        Raises:
            InputError: no target has a token.
        """
        ids = [token_id for target in targets if (token_id := self._target_id(target)) is not None]
        if not ids:
            raise InputError(f"none of the {len(targets)} targets has a token; at least one must be given")
        return list(dict.fromkeys(ids))

    def _id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def _target_id(self, target: str) -> int | None:
        if (token_id := self._id(target)) is not None:
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
        return self._encode_all([text])[0]

    def _encode_all(self, texts: Sequence[str]) -> Sequence[Any]:
        with failures_as(InputError, _fails("one of the texts")):
            if len(texts) == 1 and len(texts[0]) <= _ALONE_CHARS:
                return [self._tokenizer.encode(texts[0], add_special_tokens=False)]
            found: Sequence[Any] = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else ()
            return found

    def _encode_bounded(
        self, texts: Sequence[str], budget: int, indices: Sequence[int]
    ) -> list[tuple[list[int], bool]]:
        """Ids of each text without special tokens, and whether they are all the ids of the text."""
        look_ahead = self._look_ahead(budget)
        short = [text for text in texts if len(text) <= look_ahead]
        encodings = iter(self._encode_all(short))
        return [
            (next(encodings).ids, True) if len(text) <= look_ahead else self._encode_long(text, budget, index)
            for index, text in zip(indices, texts, strict=True)
        ]

    def _look_ahead(self, budget: int) -> int:
        """The most characters of a text that is tokenised whole."""
        return MAX_TOKENIZED_CHARS if self._cuts_left else min(_CHARS_PER_TOKEN * max(1, budget), MAX_TOKENIZED_CHARS)

    def _cut(self, parts: list[list[int]], budget: int) -> list[list[int]]:
        """The ids of one or two texts, cut to `budget` tokens."""
        sizes = (budget,) if len(parts) == 1 else _longest_first(len(parts[0]), len(parts[1]), budget)
        if self._cuts_left:
            return [ids[max(0, len(ids) - size) :] for ids, size in zip(parts, sizes, strict=True)]
        return [ids[:size] for ids, size in zip(parts, sizes, strict=True)]

    def _encode_long(self, text: str, budget: int, index: int) -> tuple[list[int], bool]:
        """Tokenise longer and longer beginnings of `text` until one has enough tokens that no cut changed."""
        for encoding, safe in self._beginnings(text, budget, index):
            if safe > budget:
                return encoding.ids[:safe], False
        return self._encode(text).ids, True

    def _beginnings(self, text: str, budget: int, index: int) -> Iterator[tuple[Any, int]]:
        """Encodings of longer and longer beginnings of `text`, and the number of their tokens that no cut changed.

        Raises:
            InputError: the longest beginning that is tokenised was not enough.
        """
        if self._cuts_left:
            raise InputError(
                f"input {index} has {len(text):,} characters; a tokenizer that keeps the last tokens of a text reads "
                f"at most {MAX_TOKENIZED_CHARS:,}. Give the end of the text alone."
            )
        size = self._look_ahead(budget)
        while size < len(text):
            with failures_as(InputError, _fails(f"input {index}")):
                # encode_batch_fast gives no word ids
                encoding = self._tokenizer.encode(text[:size], add_special_tokens=False)
            words = [word or 0 for word in encoding.word_ids]
            last_safe = (words[-1] if words else 0) - _UNSAFE_WORDS
            yield encoding, bisect_right(words, last_safe)
            if size == MAX_TOKENIZED_CHARS:
                raise InputError(
                    f"input {index} has {len(text):,} characters, of which at most {size:,} are read to find its first "
                    f"{budget:,} tokens; those have {len(words):,}. Shorten the text."
                )
            size = min(size * _LOOK_AHEAD_GROWTH, MAX_TOKENIZED_CHARS)

    def _num_special(self, num_texts: int) -> int:
        template = self.template
        if num_texts == 1:
            return len(template.prefix) + len(template.suffix)
        return len(template.prefix) + len(template.middle) + len(template.pair_suffix)


def load_tokenizer(folder: Path, verified: Mapping[str, bytes] | None = None) -> TextTokenizer:
    """Load the tokenizer of a checkpoint or bundle folder.

    Args:
        folder: the folder.
        verified: name -> content of those files of `TOKENIZER_NAMES` that a verified bundle has; nothing is read then.
            None reads the folder.

    Raises:
        CheckpointError: tokenizer.json is missing or unreadable, or lacks the special tokens.
    """
    path = folder / "tokenizer.json"
    found = _tokenizer_files(folder) if verified is None else verified
    if path.name not in found:
        raise CheckpointError(
            f"{folder} has no tokenizer.json. Write one with transformers: AutoTokenizer.from_pretrained(…)"
            ".save_pretrained(…)."
        )
    # The Rust library raises Exception for every malformed file, and panics for some.
    with failures_as(CheckpointError, f"{path} cannot be read as a tokenizer"):
        tokenizer = Tokenizer.from_buffer(found[path.name])
    config, special_tokens = (_object(found, folder / name) for name in TOKENIZER_NAMES[1:])
    if tokenizer.decoder is None and str(config.get("tokenizer_class")).startswith("Bert"):
        tokenizer.decoder = decoders.WordPiece(prefix="##")  # the default of that class in transformers
    special = {**special_tokens, **config}
    pad_token = _content(special.get("pad_token"))
    if pad_token is None:
        raise CheckpointError(f"{folder}: neither tokenizer_config.json nor special_tokens_map.json names a pad_token")
    return TextTokenizer(
        tokenizer,
        pad_token=pad_token,
        mask_token=_content(special.get("mask_token")),
        clean_up=config.get("clean_up_tokenization_spaces") is True and type(tokenizer.model).__name__ != "BPE",
        truncation_side=config.get("truncation_side", "right"),
    )


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Read those of `TOKENIZER_NAMES` that are in a folder: name -> content.

    Raises:
        CheckpointError: one cannot be read, or is too large.
    """
    found = {}
    for path in (folder / name for name in TOKENIZER_NAMES):
        if path.is_file():
            try:
                found[path.name] = read_regular(path, MAX_JSON_BYTES)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return found


def _object(found: Mapping[str, bytes], path: Path) -> dict[str, Any]:
    data = found.get(path.name)
    return {} if data is None else checked_object(parse_json(data, path), path)


def checked_max_length(value: int | None, *, low: int, limit: int) -> int:
    """The caller's `max_length`, or the model's own `limit` if the caller gives none.

    Raises:
        InputError: the value is outside its range.
        CheckpointError: the model takes fewer tokens than `low`, which its special tokens and the text need.
    """
    if limit < low:
        raise CheckpointError(
            f"the model takes {limit} tokens, and its special tokens with one token of each text are {low}. Correct "
            "max_seq_length or model_max_length in the checkpoint's files."
        )
    return limit if value is None else check_integer("max_length", value, low, limit)


def _fails(what: str) -> str:
    return f"{what} cannot be tokenised: the rules of tokenizer.json fail on it"


def _content(token: Any) -> str | None:
    # A token is a string, or the fields of an AddedToken.
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _template(tokenizer: Tokenizer, pad_token: str) -> Template:
    """Find the special tokens: encode a marker, the pad token, and read what the post-processor puts around it."""
    marker = tokenizer.token_to_id(pad_token)
    encoded, encoded_pair = tokenizer.encode(pad_token), tokenizer.encode(pad_token, pad_token)
    single, types = encoded.ids, encoded.type_ids
    pair, pair_types = encoded_pair.ids, encoded_pair.type_ids
    if marker is None or single.count(marker) != 1 or pair.count(marker) != 2:
        raise CheckpointError(f"tokenizer.json does not hold the pad token {pad_token!r} as one special token")
    at = single.index(marker)
    first = pair.index(marker)
    second = pair.index(marker, first + 1)
    if pair[:first] != single[:at]:
        raise CheckpointError(
            f"tokenizer.json puts the tokens {single[:at]} before one text and {pair[:first]} before a pair; only "
            "tokenizers with the same tokens before both are supported"
        )
    return Template(
        prefix=tuple(single[:at]),
        suffix=tuple(single[at + 1 :]),
        middle=tuple(pair[first + 1 : second]),
        pair_suffix=tuple(pair[second + 1 :]),
        types=_split(types, at, at + 1),
        pair_types=_split(pair_types, first, first + 1, second, second + 1),
    )


def _split(values: Sequence[int], *places: int) -> tuple[tuple[int, ...], ...]:
    bounds = (0, *places, len(values))
    return tuple(tuple(values[start:end]) for start, end in pairwise(bounds))


def _runs(parts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(type, count) of consecutive tokens. Every second part is a text, whose tokens all have one type."""
    runs: list[tuple[int, int]] = []
    for index, (part, kinds) in enumerate(zip(parts, types, strict=True)):
        counts = [len(part)] if index % 2 else [1] * len(part)
        runs += zip(kinds, counts, strict=True)
    return runs


def _known_which_is_longer(parts: Sequence[tuple[list[int], bool]], budget: int) -> bool:
    """Whether the ids of two texts, which may be incomplete, are enough for `_longest_first`."""
    (first, first_whole), (second, second_whole) = parts
    if first_whole and second_whole or min(len(first), len(second)) <= budget:
        return True  # incomplete ids are more than the budget, so more than the shorter text's
    return (first_whole and len(second) > len(first)) or (second_whole and len(first) > len(second))


def _longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """The number of tokens to keep of each text of a pair: the `longest_first` rule of the tokenizers library."""
    if first + second <= budget:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > budget else max(short, budget - short)
    if short + long > budget:
        short, long = budget // 2, budget // 2 + budget % 2
    return (long, short) if first > second else (short, long)


def _windows(count: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Begin and end of windows of `size` over `count` tokens; each repeats `stride` tokens of the one before."""
    windows = [(0, min(count, size))]
    while windows[-1][1] < count:
        start = windows[-1][0] + size - stride
        windows.append((start, min(count, start + size)))
    return windows


def _too_many_tokens(index: int, count: int, limit: int, *, whole: bool, first_fits: bool = True) -> TooLongError:
    number = f"{count:,}" if whole else f"at least {count:,}"
    return TooLongError(
        index,
        f"has {number} tokens, special tokens included; the limit is {limit:,}. "
        "Pass truncation=True to keep the first ones, or split the text.",
        first_fits=first_fits,
    )

"""gte_tokenizer: converts texts to padded token ids, with the `tokenizers` library only.

The name of the text input depends on the ensemble: TEXT (embeddings; the checkpoint's prompts apply), MASKED_TEXT
(fill-mask; each text needs a mask), PLAIN_TEXT (token classifiers), FIRST with or without SECOND (texts and pairs for a
classifier; the checkpoint's prompts apply to the first), QUERY and DOCUMENT (multi-vector models, whose two sides have
prefixes, lengths and skipped words of their own).

The texts of all requests that arrive together and have the same options are tokenised in one call, and their rows are
padded in one array for each length: Python's cost of a call is then shared.

Triton batches only requests of equal shape. So every request is padded to a length bucket. Among requests that arrive
together, a short one is padded to the bucket of a longer one if that costs less than another run of the encoder.

Shapes: B rows of a request, S tokens, M masks (the most of any row).
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    attempt,
    failed,
    option,
    response,
    shared_texts,
    texts,
)
from gte_deploy.tasks.fill_mask import check_mask
from gte_deploy.tasks.interface import document_prompt, prompt_text, query_prompt
from gte_deploy.tasks.multi_vector import KEPT_TOKENS, MultiVectorRequest
from gte_deploy.text.batching import collate
from gte_deploy.text.inputs import MAX_TEXT_BYTES, as_pairs, as_texts
from gte_deploy.text.padding import bucket_of, mask_width, masks_by_row
from gte_deploy.text.tokenization import checked_max_length, load_tokenizer

_MOST_BYTES = 4  # of a character in UTF-8
_SIDES = {"QUERY": query_prompt, "DOCUMENT": document_prompt}
_TEXT_INPUTS = ("TEXT", "MASKED_TEXT", "PLAIN_TEXT", "FIRST", *_SIDES)


@dataclass(frozen=True)
class Tokenizing:
    """The options of a request: requests with equal options are tokenised in one call.

    Args:
        kind: the name of the text input.
        pairs: whether each row has two texts.
        prompt: the text before each text.
        truncation: whether a text that is too long loses tokens.
        max_length: the most tokens of a row.
        skip_words: tokens without an embedding, of a multi-vector model; None for the checkpoint's own.
    """

    kind: str
    pairs: bool
    prompt: str
    truncation: bool
    max_length: int
    skip_words: tuple[str, ...] | None = None


@dataclass
class Texts:
    """A request's texts; then its token ids, and the length that its rows are padded to."""

    how: Tokenizing
    texts: list[Any]
    rows: list[list[int]] = field(default_factory=list)
    padded: int = 0

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the settings."""
        settings = Settings(args)
        if settings.integer("threads") == 1:
            # Several processes tokenise, so a process that also starts a thread for each core would only wait.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._spec = settings.spec
        self._tokenizer = load_tokenizer(settings.folder)
        self._buckets = settings.integers("length_buckets")
        self._spare_tokens = settings.integer("spare_tokens")
        self._max_rows = settings.integer("max_rows")
        self._positions = "mask_positions" in settings.outputs
        self._max_masks = settings.integer("max_masks") if self._positions else 0
        self._keeps = KEPT_TOKENS in settings.outputs
        self._defaults: dict[str, Tokenizing] = {}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`input_ids`, `attention_mask`, `token_type_ids` [B, S] and `mask_positions` [B, M] for each request.

        The last two only if the encoder takes them; for a multi-vector model also `kept_tokens` [B, S]. A wrong request
        gets its error instead.
        """
        results = [attempt(partial(self._read, request)) for request in requests]
        self._tokenize_together(results)
        pad_together([result for result in results if isinstance(result, Texts)], self._buckets, self._spare_tokens)
        self._collate_together(results)
        return [response(result) for result in results]

    def _read(self, request: Any) -> Texts:
        inputs = Inputs(request)
        kinds = [name for name in _TEXT_INPUTS if name in inputs]
        if len(kinds) != 1:
            raise InputError(
                f"exactly one of {', '.join(_TEXT_INPUTS)} is needed; received {', '.join(kinds) or 'none'}"
            )
        (kind,) = kinds
        given = texts(inputs, kind)
        assert given is not None
        if len(given) > self._max_rows:
            raise InputError(f"the request has {len(given)} rows; the limit is {self._max_rows}")
        check_characters(given)
        if len(inputs) == 1:
            how = self._defaults.get(kind) or self._defaults.setdefault(kind, self._how(inputs, kind))
        else:
            how = self._how(inputs, kind)
        if kind == "FIRST":
            second = texts(inputs, "SECOND")
            columns = (given,) if second is None else (given, second)
            check_characters([text for column in columns for text in column])
            return Texts(how, as_pairs(list(zip(*columns, strict=True)), prompt=how.prompt)[0])
        if _MOST_BYTES * (len(how.prompt) + max(map(len, given))) <= MAX_TEXT_BYTES:
            # Short texts that were UTF-8 need none of the checks of `as_texts`.
            return Texts(how, [how.prompt + text for text in given] if how.prompt else given)
        return Texts(how, as_texts(given, prompt=how.prompt)[0])

    def _how(self, inputs: Inputs, kind: str) -> Tokenizing:
        if kind in _SIDES:
            return self._how_of_side(inputs, kind)
        prompted = kind in ("TEXT", "FIRST")
        low = self._tokenizer.min_pair_length if kind == "FIRST" else self._tokenizer.min_length
        names = option(inputs, "PROMPT"), option(inputs, "PROMPT_NAME")
        return Tokenizing(
            kind=kind,
            pairs=kind == "FIRST",
            prompt=prompt_text(self._spec, *names) if prompted else "",
            truncation=option(inputs, "TRUNCATION", False),
            max_length=checked_max_length(option(inputs, "MAX_LENGTH"), low=low, limit=self._spec.max_length),
        )

    def _how_of_side(self, inputs: Inputs, kind: str) -> Tokenizing:
        names = option(inputs, "PROMPT"), option(inputs, "PROMPT_NAME")
        # An empty word means no word, because a request cannot send a tensor without elements.
        words = shared_texts(inputs, "SKIP_WORDS", "word")
        how = Tokenizing(
            kind=kind,
            pairs=False,
            prompt=_SIDES[kind](self._spec) if names == (None, None) else prompt_text(self._spec, *names),
            truncation=option(inputs, "TRUNCATION", False),
            max_length=0,
            skip_words=None if words is None else tuple(words),
        )
        request = self._side(how)
        low = self._tokenizer.with_prefix(request.prefix).min_length
        return replace(how, max_length=request.limit(option(inputs, "MAX_LENGTH"), low))

    def _side(self, how: Tokenizing) -> MultiVectorRequest:
        return MultiVectorRequest(self._spec, how.kind == "QUERY", how.skip_words).of_tokenizer(self._tokenizer)

    def _tokenize_together(self, results: list[Any]) -> None:
        """Set the rows of each request; a wrong request is replaced by its error."""
        groups: dict[Tokenizing, list[int]] = {}
        for number, result in enumerate(results):
            if isinstance(result, Texts):
                groups.setdefault(result.how, []).append(number)
        for how, numbers in groups.items():
            rows = attempt(partial(self._rows, how, [text for i in numbers for text in results[i].texts]))
            if failed(rows):
                # An error names the number of a text in its own request.
                parts = [attempt(partial(self._rows, how, results[i].texts)) for i in numbers]
            else:
                found = iter(rows)
                parts = [[next(found) for _ in results[i].texts] for i in numbers]
            for i, part in zip(numbers, parts, strict=True):
                if failed(part):
                    results[i] = part
                else:
                    results[i].rows = part

    def _rows(self, how: Tokenizing, given: Sequence[Any]) -> list[list[int]]:
        """Token ids of each text or pair."""
        if how.kind in _SIDES:
            side = self._side(how)
            tokenizer = self._tokenizer.with_prefix(side.prefix)
            return side.rows(tokenizer, given, None, limit=how.max_length, cut=how.truncation)
        options: dict[str, Any] = {"max_length": how.max_length, "truncation": how.truncation}
        if how.pairs:
            return self._tokenizer.encode_pairs(given, **options)
        rows = self._tokenizer.encode_texts(given, **options)
        if how.kind == "MASKED_TEXT":
            for index, (text, row) in enumerate(zip(given, rows, strict=True)):
                check_mask(index, text, row, self._tokenizer)
        return rows

    def _collate_together(self, results: list[Any]) -> None:
        """Replace each request by its tensors. Requests of one length share an array, of which each gets its rows."""
        groups: dict[int, list[int]] = {}
        for number, result in enumerate(results):
            if isinstance(result, Texts):
                groups.setdefault(result.padded, []).append(number)
        for length, numbers in groups.items():
            tensors = self._tensors([row for i in numbers for row in results[i].rows], length)
            counts = self._add_masks(tensors)
            start = 0
            for i in numbers:
                end = start + len(results[i].rows)
                own = {name: values[start:end] for name, values in tensors.items()}
                start = end
                if self._keeps:
                    side = self._side(results[i].how)
                    own[KEPT_TOKENS] = side.kept_in(results[i].rows, own["input_ids"])
                if counts is not None:
                    most = counts[end - len(results[i].rows) : end]
                    results[i] = attempt(partial(self._with_own_masks, own, most))
                else:
                    results[i] = own

    def _tensors(self, rows: Sequence[Sequence[int]], length: int) -> dict[str, NDArray[Any]]:
        batch = collate(rows, pad_token_id=self._spec.pad_token_id, token_types=self._spec.token_types)
        padding = ((0, 0), (0, length - batch.input_ids.shape[1]))
        tensors = {
            "input_ids": np.pad(batch.input_ids, padding, constant_values=self._spec.pad_token_id),
            "attention_mask": np.pad(batch.attention_mask, padding),
        }
        if batch.token_type_ids is not None:
            tensors["token_type_ids"] = np.pad(batch.token_type_ids, padding)
        return tensors

    def _add_masks(self, tensors: dict[str, NDArray[Any]]) -> list[int] | None:
        """Add `mask_positions`, if the encoder takes them; return the number of masks of each row."""
        if not self._positions:
            return None
        assert self._tokenizer.mask_token_id is not None  # a fill-mask checkpoint has a mask token
        positions, counts = masks_by_row(tensors["input_ids"], tensors["attention_mask"], self._tokenizer.mask_token_id)
        tensors["mask_positions"] = positions
        return [int(count) for count in counts]

    def _with_own_masks(self, tensors: dict[str, NDArray[Any]], counts: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The tensors of a request, with as many mask positions as its rows need."""
        if (most := max(counts)) > self._max_masks:
            raise InputError(
                f"input {counts.index(most)} has {most:,} masks; this server answers at most {self._max_masks:,}. "
                "Split it."
            )
        positions = tensors["mask_positions"]
        return {**tensors, "mask_positions": np.ascontiguousarray(positions[:, : mask_width(most)])}


def check_characters(given: Sequence[str]) -> None:
    """Refuse texts of a request that together are too long: one process tokenises for all callers.

    Raises:
        InputError: the message names the number of characters and the limit.
    """
    if len(given) > 1 and (count := sum(map(len, given))) > MAX_TEXT_BYTES:
        raise InputError(
            f"a request has {count:,} characters of text; it may have at most {MAX_TEXT_BYTES:,}. Send its texts in "
            "several requests, or shorten them."
        )


def pad_together(requests: Iterable[Texts], buckets: Sequence[int], spare_tokens: int) -> None:
    """Set `padded` of each request to its bucket, or to that of a longer request if that adds few tokens.

    The encoder runs once for every length. `spare_tokens` is the cost of one more run, in tokens.
    """
    padded = spent = 0
    for longest, request in sorted(((request.longest, request) for request in requests), key=lambda pair: -pair[0]):
        own = bucket_of(longest, buckets)
        spent += (padded - own) * len(request.rows)
        if spent > spare_tokens or not padded:
            padded, spent = own, 0
        request.padded = padded

"""gte_tokenizer: converts texts to padded token ids, with the `tokenizers` library only.

The name of the text input depends on the ensemble: TEXT (embeddings; the checkpoint's prompts apply), MASKED_TEXT
(fill-mask; each text needs a mask), PLAIN_TEXT (token classifiers), FIRST with or without SECOND (texts and pairs for a
classifier; the checkpoint's prompts apply to the first).

Triton batches only requests of equal shape. So every request is padded to a length bucket. Among requests that arrive
together, a short one is padded to the bucket of a longer one if that costs less than another run of the encoder.

Shapes: B rows of a request, S tokens, M masks (the most of any row).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.exporters.triton.serving.exchange import Settings, attempt, option, response, texts
from gte_deploy.tasks.fill_mask import check_mask
from gte_deploy.tasks.interface import prompt_text
from gte_deploy.text.batching import collate
from gte_deploy.text.inputs import as_pairs, as_texts
from gte_deploy.text.tokenization import checked_max_length, load_tokenizer

_TEXT_INPUTS = ("TEXT", "MASKED_TEXT", "PLAIN_TEXT", "FIRST")


@dataclass
class Tokenized:
    """A request's token ids, and the length that its rows are padded to."""

    rows: list[list[int]]
    longest: int
    padded: int


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the settings."""
        settings = Settings(args)
        self._spec = settings.spec
        self._tokenizer = load_tokenizer(settings.folder)
        self._buckets = settings.integers("length_buckets")
        self._spare_tokens = settings.integer("spare_tokens")
        self._max_rows = settings.integer("max_rows")
        # Positions of masks are listed by row; for a plan, which takes (row, token) pairs, for the whole request.
        self._dtypes = settings.outputs
        self._positions = "mask_positions" in settings.outputs
        self._flat = self._positions and settings.integer("flat_positions") == 1
        self._max_masks = settings.integer("max_masks") if self._positions else 0

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """`input_ids`, `attention_mask`, `token_type_ids` [B, S] and `mask_positions` [B, M] for each request.

        The last two only if the encoder takes them. A wrong request gets its error instead.
        """
        results = [attempt(partial(self._tokenize, request)) for request in requests]
        pad_together([result for result in results if isinstance(result, Tokenized)], self._buckets, self._spare_tokens)
        return [
            response(attempt(partial(self._tensors, result)) if isinstance(result, Tokenized) else result)
            for result in results
        ]

    def _tokenize(self, request: Any) -> Tokenized:
        rows = self._rows(request)
        if len(rows) > self._max_rows:
            raise InputError(f"the request has {len(rows)} rows; the limit is {self._max_rows}")
        longest = max(map(len, rows))
        return Tokenized(rows, longest, longest)

    def _rows(self, request: Any) -> list[list[int]]:
        given = {name: found for name in _TEXT_INPUTS if (found := texts(request, name)) is not None}
        if len(given) != 1:
            raise InputError(
                f"exactly one of {', '.join(_TEXT_INPUTS)} is needed; received {', '.join(given) or 'none'}"
            )
        ((kind, batch),) = given.items()
        truncation = option(request, "TRUNCATION", False)
        max_length = option(request, "MAX_LENGTH")
        if kind == "FIRST":
            second = texts(request, "SECOND")
            limit = self._limit(max_length, self._tokenizer.min_pair_length)
            columns = (batch,) if second is None else (batch, second)
            pairs = as_pairs(list(zip(*columns, strict=True)), prompt=self._prompt(request))[0]
            return self._tokenizer.encode_pairs(pairs, max_length=limit, truncation=truncation)
        limit = self._limit(max_length, self._tokenizer.min_length)
        prompted = as_texts(batch, prompt=self._prompt(request) if kind == "TEXT" else "")[0]
        rows = self._tokenizer.encode_texts(prompted, max_length=limit, truncation=truncation)
        if kind == "MASKED_TEXT":
            for index, (text, row) in enumerate(zip(prompted, rows, strict=True)):
                check_mask(index, text, row, self._tokenizer)
        return rows

    def _prompt(self, request: Any) -> str:
        return prompt_text(self._spec, option(request, "PROMPT"), option(request, "PROMPT_NAME"))

    def _limit(self, max_length: int | None, low: int) -> int:
        return checked_max_length(max_length, low=low, limit=self._spec.max_length)

    def _tensors(self, request: Tokenized) -> dict[str, NDArray[Any]]:
        batch = collate(
            request.rows,
            pad_token_id=self._spec.pad_token_id,
            mask_token_id=self._tokenizer.mask_token_id,
            token_types=self._spec.token_types,
        )
        padding = ((0, 0), (0, request.padded - batch.input_ids.shape[1]))
        tensors = {
            "input_ids": np.pad(batch.input_ids, padding, constant_values=self._spec.pad_token_id),
            "attention_mask": np.pad(batch.attention_mask, padding),
        }
        if batch.token_type_ids is not None:
            tensors["token_type_ids"] = np.pad(batch.token_type_ids, padding)
        if self._positions:
            assert batch.mask_positions is not None  # a fill-mask checkpoint has a mask token
            tensors["mask_positions"] = self._mask_positions(batch.mask_positions, len(request.rows))
        return {name: values.astype(self._dtypes[name], copy=False) for name, values in tensors.items()}

    def _mask_positions(self, places: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
        """Mask positions in the form that the encoder takes; extra positions point at the first token."""
        counts = np.bincount(places[:, 0], minlength=num_rows)
        most = int(counts.sum() if self._flat else counts.max())
        if most > self._max_masks:
            where = "the request" if self._flat else f"input {counts.argmax()}"
            raise InputError(f"{where} has {most:,} masks; this server answers at most {self._max_masks:,}. Split it.")
        if self._flat:
            return places if most else np.zeros((1, 2), dtype=np.int64)
        # Padded to a power of two, so that requests with three and with four masks have equal shapes.
        positions = np.zeros((num_rows, 1 << max(0, most - 1).bit_length()), dtype=np.int64)
        positions[np.arange(positions.shape[1]) < counts[:, None]] = places[:, 1]
        return positions


def pad_together(requests: Sequence[Tokenized], buckets: Sequence[int], spare_tokens: int) -> None:
    """Set `padded` of each request to its bucket, or to that of a longer request if that adds few tokens.

    The encoder runs once for every length. `spare_tokens` is the cost of one more run, in tokens.
    """
    padded = spent = 0
    for request in sorted(requests, key=lambda request: -request.longest):
        own = next((bucket for bucket in buckets if bucket >= request.longest), request.longest)
        spent += (padded - own) * len(request.rows)
        if spent > spare_tokens or not padded:
            padded, spent = own, 0
        request.padded = padded

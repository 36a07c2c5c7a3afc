"""`ModelTokenizer`: the tokenizer of a model for its users, with the method names of transformers' tokenizers."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from gte_deploy.core.spec import ModelSpec
from gte_deploy.text.batching import TypedRow
from gte_deploy.text.inputs import as_texts
from gte_deploy.text.tokenization import TextTokenizer, checked_max_length

# More tokens than any text has, because its bytes are limited.
_NO_LIMIT = 1 << 40


class ModelTokenizer:
    """The tokenizer of a model. Methods give what transformers' methods of the same names give.

    Threads may share it. Nothing that a caller does with it changes what the model computes.
    """

    def __init__(self, tokenizer: TextTokenizer, spec: ModelSpec) -> None:
        """Give access to the tokenizer of the model that `spec` describes."""
        self._tokenizer = tokenizer
        self._spec = spec

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask`, and `token_type_ids` for a model that takes token types.

        One text gives lists of S integers, a list of texts gives lists of such lists. They are not padded:
        `Model.tokenize` gives padded arrays.

        Args:
            text: a text or a list of texts.
            add_special_tokens: whether the special tokens around a text are added.
            truncation: keep the first tokens of a text that is too long; without it, all tokens are returned.
            max_length: with `truncation`, the largest number of tokens, special tokens included; by default
                `model_max_length`.

        Raises:
            InputError: `text` is not a text or a list of texts, or `max_length` is out of range.
        """
        texts, single = as_texts(text, name="text")
        limit = _NO_LIMIT
        if truncation:
            limit = checked_max_length(max_length, low=self._tokenizer.min_length, limit=self._spec.max_length)
        template = self._tokenizer.template
        around = 0 if add_special_tokens else len(template.prefix) + len(template.suffix)
        rows = self._tokenizer.encode_texts(texts, max_length=limit + around, truncation=truncation)
        first = 0 if add_special_tokens else len(template.prefix)
        own = [slice(first, first + len(row) - around) for row in rows]
        found = {"input_ids": [list(row[part]) for row, part in zip(rows, own, strict=True)]}
        if self._spec.token_types:
            found["token_type_ids"] = [_types(row)[part] for row, part in zip(rows, own, strict=True)]
        found["attention_mask"] = [[1] * len(row) for row in found["input_ids"]]
        return {name: values[0] for name, values in found.items()} if single else found

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> list[int]:
        """Return the token ids of one text; see the call of the tokenizer itself for the arguments."""
        options: dict[str, Any] = {"truncation": truncation, "max_length": max_length}
        found: list[int] = self(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text as the vocabulary has them, without special tokens."""
        return [self._tokenizer.token(token) for token in self.encode(text, add_special_tokens=False)]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Return the vocabulary entry of each id; None for an id that only pads the vocabulary."""
        return [self._tokenizer.id_to_token(token) for token in ids]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the id of each vocabulary entry; the id of the unknown token for others, None if there is none."""
        return [self._tokenizer.known_or_unknown_id(token) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        """Return entry -> id, added tokens included."""
        return self._tokenizer.vocabulary()

    def __len__(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return len(self.get_vocab())

    @property
    def model_max_length(self) -> int:
        """Largest number of tokens in an input of the model, special tokens included."""
        return self._spec.max_length

    @property
    def truncation_side(self) -> str:
        """The side where a text that is too long loses tokens, "right" or "left"."""
        return self._tokenizer.truncation_side

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows."""
        return self._spec.pad_token_id

    @property
    def mask_token(self) -> str | None:
        """The token that `fill_mask` replaces; None if the checkpoint has none."""
        return self._tokenizer.mask_token

    @property
    def mask_token_id(self) -> int | None:
        """The id of `mask_token`."""
        return self._tokenizer.mask_token_id

    @property
    def unk_token_id(self) -> int | None:
        """The id of text that is not in the vocabulary; None if the tokenizer has none."""
        return self._tokenizer.unknown_token_id

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """A copy of the `tokenizers.Tokenizer`, without truncation and padding, for libraries that take one."""
        return self._tokenizer.copied()


def _types(row: Sequence[int]) -> list[int]:
    """The token type of each token of a row."""
    if not isinstance(row, TypedRow):
        return [0] * len(row)
    return [kind for kind, count in row.type_runs for _ in range(count)]

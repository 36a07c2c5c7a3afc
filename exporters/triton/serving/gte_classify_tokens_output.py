"""gte_classify_tokens_output: converts logits of tokens to the answers that `Model.classify_tokens` returns.

It tokenises the texts again to find the places of the tokens.

Shapes: B rows of a request, S tokens, T tokens without special tokens (the most of any row), N entities (the most of
any row), L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    answer_each,
    check_finite,
    floats,
    option,
    required,
    shared_texts,
    texts,
)
from gte_deploy.tasks.base import counted
from gte_deploy.tasks.token_classify import (
    TaggedTexts,
    TaggingRequest,
    entities_to_tensors,
)
from gte_deploy.text.tokenization import Piece, checked_max_length, load_tokenizer


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer, which finds the places of tokens."""
        settings = Settings(args)
        self._spec = settings.spec
        self._tokenizer = load_tokenizer(settings.folder)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """For each request: the entities of each row and their number; the logits of its tokens and their number.

        `ENTITIES` [B, 1]; `LABEL`, `SCORE`, `INDEX`, `WORD`, `START` and `END` [B, N]; `TOKENS` [B, 1], `LOGITS`
        [B, T, L].
        """
        return answer_each(requests, self._answer)

    def _answer(self, request: Inputs) -> dict[str, NDArray[Any]]:
        # An empty name means no label, because a request cannot send a tensor without elements.
        ignored = shared_texts(request, "IGNORE_LABELS", "label")
        wanted = TaggingRequest.of(option(request, "AGGREGATION_STRATEGY"), ignored, None)
        given = TaggedTexts.of(texts(request, "TEXT"), is_split_into_words=False, delimiter=None, offset_mapping=None)
        limit = checked_max_length(
            option(request, "MAX_LENGTH"), low=self._tokenizer.min_length, limit=self._spec.max_length
        )
        truncation = option(request, "TRUNCATION", False)
        pieces = self._tokenizer.encode_places(given.texts, max_length=limit, truncation=truncation)
        logits = self._own_logits(request, pieces)
        found = wanted.answers(given, pieces, enumerate(logits), self._tokenizer, self._spec)
        return {**entities_to_tensors(found), **counted(logits, "LOGITS", self._spec.num_labels)}

    def _own_logits(self, request: Inputs, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """Logits [T, L] of each row's own tokens."""
        mask = required(request, "attention_mask") == 1
        logits = np.where(mask[:, :, None], floats(request, "logits"), np.float32(0))
        check_finite("logits", logits)
        return [row[piece.first : piece.first + len(piece.offsets)] for row, piece in zip(logits, pieces, strict=True)]

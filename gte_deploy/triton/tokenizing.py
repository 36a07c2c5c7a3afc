"""Tokenises texts on the client's machine, so that the server gets token ids.

The rules are the server's: its limits, its truncation, its length buckets and its mask positions. The server publishes
the fingerprint of its tokenizer, so that another tokenizer is refused.

Shapes: B rows of a request, S tokens, M masks of the row with the most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tasks.fill_mask import check_mask
from gte_deploy.tasks.multi_vector import KEPT_TOKENS, MultiVectorRequest
from gte_deploy.text.batching import collate
from gte_deploy.text.fingerprint import fingerprint
from gte_deploy.text.padding import bucket_of, masks_by_row
from gte_deploy.text.tokenization import TextTokenizer, checked_max_length, load_tokenizer
from gte_deploy.triton.answers import ServedDescription

TextKind = Literal["plain", "masked", "pairs"] | MultiVectorRequest
"""Plain texts, texts with masks, pairs for a classifier; or queries or documents of a multi-vector model."""


@dataclass(frozen=True)
class ClientTokenizer:
    """The tokenizer of a served model, on this machine.

    Args:
        tokenizer: the tokenizer.
        spec: the facts about the served model.
        buckets: the lengths that rows are padded to.
        max_masks: the most masks of a text; None if the server answers no masks.
    """

    tokenizer: TextTokenizer
    spec: ModelSpec
    buckets: tuple[int, ...]
    max_masks: int | None

    def rows(
        self,
        columns: Sequence[Sequence[str]],
        indices: Sequence[int],
        *,
        max_length: int | None,
        truncation: bool,
        kind: TextKind,
    ) -> list[list[int]]:
        """Token ids of texts or pairs; `columns` are the texts, and the second texts if there are pairs.

        Args:
            columns: one or two texts for each row.
            indices: the numbers of the rows in the caller's list, for errors.
            max_length: the most tokens of a row; None for the model's own limit.
            truncation: whether a row that is too long loses tokens.
            kind: what the texts are.

        Raises:
            InputError: a text is too long, has no mask, or has more masks than the server answers.
        """
        if isinstance(kind, MultiVectorRequest):
            tokenizer = self.tokenizer.with_prefix(kind.prefix)
            own = kind.limit(max_length, tokenizer.min_length)
            return kind.rows(tokenizer, columns[0], indices, limit=own, cut=truncation)
        low = self.tokenizer.min_pair_length if kind == "pairs" else self.tokenizer.min_length
        limit = checked_max_length(max_length, low=low, limit=self.spec.max_length)
        if kind == "pairs":
            pairs = list(zip(*columns, strict=True))
            return self.tokenizer.encode_pairs(pairs, indices, max_length=limit, truncation=truncation)
        rows = self.tokenizer.encode_texts(columns[0], indices, max_length=limit, truncation=truncation)
        if kind == "masked":
            for index, text, row in zip(indices, columns[0], rows, strict=True):
                check_mask(index, text, row, self.tokenizer)
                self._check_number_of_masks(index, row)
        return rows

    def tensors(self, rows: Sequence[Sequence[int]], kind: TextKind) -> dict[str, NDArray[Any]]:
        """The inputs of an ensemble for token ids: INPUT_IDS, ATTENTION_MASK [B, S], and what else the model takes."""
        batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
        length = batch.input_ids.shape[1]
        padding = ((0, 0), (0, bucket_of(length, self.buckets) - length))
        tensors: dict[str, NDArray[Any]] = {
            "INPUT_IDS": np.pad(batch.input_ids, padding, constant_values=self.spec.pad_token_id),
            "ATTENTION_MASK": np.pad(batch.attention_mask, padding),
        }
        if batch.token_type_ids is not None:
            tensors["TOKEN_TYPE_IDS"] = np.pad(batch.token_type_ids, padding)
        if isinstance(kind, MultiVectorRequest):
            tensors[KEPT_TOKENS.upper()] = kind.kept_in(rows, tensors["INPUT_IDS"])
        if self.max_masks is not None:
            positions = np.zeros((len(rows), 1), dtype=np.int64)
            if kind == "masked":
                assert self.tokenizer.mask_token_id is not None  # a fill-mask model has a mask token
                ids, mask = tensors["INPUT_IDS"], tensors["ATTENTION_MASK"]
                positions, _ = masks_by_row(ids, mask, self.tokenizer.mask_token_id)
            tensors["MASK_POSITIONS"] = positions
        return tensors

    def _check_number_of_masks(self, index: int, row: Sequence[int]) -> None:
        assert self.max_masks is not None  # the model is for fill-mask
        if (count := row.count(self.tokenizer.mask_token_id)) > self.max_masks:
            raise InputError(
                f"input {index} has {count:,} masks; this server answers at most {self.max_masks:,}. Split it."
            )


def open_tokenizer(folder: Path, served: ServedDescription, url: str) -> ClientTokenizer:
    """Load the tokenizer of a bundle or checkpoint, and compare it with the server's.

    Raises:
        InputError: the server has another tokenizer.
        BackendError: the server's repository does not take token ids.
        CheckpointError: the folder has no tokenizer.
    """
    if served.tokenizer is None:
        raise BackendError(
            f"{url} takes only texts. Export its repository again with gte-export --format triton, or leave tokenizer "
            "out."
        )
    tokenizer = load_tokenizer(folder)
    own = fingerprint(folder, tokenizer)
    if own != served.tokenizer:
        raise InputError(
            f"the tokenizer of {folder} (SHA-256 {own[:12]}…) is not that of {url} (SHA-256 "
            f"{served.tokenizer[:12]}…). Give the bundle or checkpoint that the server's repository comes from."
        )
    return ClientTokenizer(tokenizer, served.spec, served.buckets, served.max_masks)

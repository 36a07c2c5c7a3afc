"""Batches of real text: what quantization is calibrated with, and what its accuracy is measured on.

Both are Addresses on the State of the Union, in the public domain; none is in the built-in model's training text, and
the two files share none.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np

from gte_deploy.backends.base import Batch
from gte_deploy.batching import collate
from gte_deploy.errors import InputError
from gte_deploy.spec import ModelSpec
from gte_deploy.tokenization import TextTokenizer

MASK_PROBABILITY = 0.15
_WINDOWS = (32, 128, 512, 2048)
_ROWS_OF_A_BATCH = 4
_SEED = 20240729


def builtin_texts(name: str) -> list[str]:
    """The paragraphs of "calibration" or "evaluation"."""
    file = resources.files("gte_deploy.exporters") / "texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").split("\n")


def read_texts(path: Path) -> list[str]:
    """The lines of a user's file that are not blank.

    Raises:
        InputError: the file cannot be read as UTF-8 text, or has no such line.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}. Expected UTF-8 with one text a line.") from error
    if not texts:
        raise InputError(f"{path} holds no text; expected UTF-8 with one text a line")
    return texts


def text_batches(
    texts: Sequence[str], tokenizer: TextTokenizer, spec: ModelSpec, *, max_tokens: int
) -> list[tuple[Batch, np.ndarray]]:
    """Token ids of `texts` in all lengths: every text alone, sorted and padded in batches of four, and the whole run
    together and cut into windows of 32 to 2,048 tokens, up to the model's own limit.

    With a classifier that is fed token types, half of the texts are pairs, and every second window is a pair of its
    halves. With a fill-mask model, 15 % of the words are masked (seeded); the array holds what stood there,
    [num_masks] int64, empty for other tasks.

    Args:
        texts: at least one.
        tokenizer: of the model.
        spec: of the model.
        max_tokens: real tokens of each kind (texts, and windows of each length) at most.
    """
    rng = np.random.default_rng(_SEED)
    whole_texts = [text for text in texts if text.strip()]
    rows = tokenizer.encode_texts(whole_texts, max_length=spec.max_length, truncation=True)
    prefix, suffix = list(tokenizer.template.prefix), list(tokenizer.template.suffix)
    words = [token for row in rows for token in row[len(prefix) : len(row) - len(suffix)]]
    has_pairs = spec.task == "classify" and spec.token_types
    if has_pairs:
        pairs = tokenizer.encode_pairs(list(pairwise(whole_texts)), max_length=spec.max_length, truncation=True)
        rows = [*_at_most(rows, max_tokens // 2), *_at_most(pairs, max_tokens // 2)]
    groups = list(_grouped(_at_most(rows, max_tokens)))
    for window in _WINDOWS:
        inner = window - len(prefix) - len(suffix)
        if window <= spec.max_length:
            whole = [words[i : i + inner] for i in range(0, len(words) - inner + 1, inner)]
            for index, row in enumerate(_at_most(whole, max_tokens // len(_WINDOWS))):
                is_pair = has_pairs and index % 2 == 0
                groups.append([_pair_of(row, tokenizer) if is_pair else tokenizer.template.row(row)])
    return [_masked(group, tokenizer, spec, rng) for group in groups]


def _pair_of(words: Sequence[int], tokenizer: TextTokenizer) -> list[int]:
    """A row as long as one text of these words, of their two halves; the last ones give way to special tokens."""
    template = tokenizer.template
    inner = len(words) - (tokenizer.min_pair_length - 2) + (tokenizer.min_length - 1)
    return template.row(words[: inner // 2], words[inner // 2 : inner])


def _at_most(rows: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Rows spread evenly over `rows` that hold no more than `max_tokens`; at least one where there is one."""
    total = sum(map(len, rows))
    keep = min(len(rows), max(1, len(rows) * max_tokens // max(total, 1)))
    return [rows[i] for i in np.linspace(0, len(rows) - 1, keep).round().astype(int)] if rows else []


def _grouped(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    by_length = sorted(rows, key=len)
    for start in range(0, len(by_length), _ROWS_OF_A_BATCH):
        yield by_length[start : start + _ROWS_OF_A_BATCH]


def _masked(
    rows: Sequence[list[int]], tokenizer: TextTokenizer, spec: ModelSpec, rng: np.random.Generator
) -> tuple[Batch, np.ndarray]:
    batch = collate(rows, pad_token_id=spec.pad_token_id, token_types=spec.token_types)
    if spec.task != "fill-mask" or tokenizer.mask_token_id is None:
        return batch, np.empty(0, np.int64)
    special = (*tokenizer.template.prefix, *tokenizer.template.suffix)
    words = (batch.attention_mask == 1) & ~np.isin(batch.input_ids, special)
    positions = np.argwhere(words & (rng.random(words.shape) < MASK_PROBABILITY))
    if not len(positions):  # a batch without any would say nothing of the vocabulary projection
        positions = np.argwhere(words if words.any() else batch.attention_mask == 1)[:1]
    wanted = batch.input_ids[tuple(positions.T)]
    batch.input_ids[tuple(positions.T)] = tokenizer.mask_token_id
    return dataclasses.replace(batch, mask_positions=positions.astype(np.int64)), wanted

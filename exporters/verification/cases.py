"""The batches of a parity check: their shapes and token ids.

Shapes: B rows, S tokens of the longest row, M masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import ModelSpec
from gte_deploy.text.batching import collate
from gte_deploy.text.tokenization import Template, TextTokenizer

LENGTHS = (1, 2, 17, 128, 512, 2048)
_MAX_PAIR_LENGTH = 2048
_MAX_EIGHT_LENGTH = 128
_MASKS_PER_ROW = 4
# Logits of every token of longer inputs would take over 1 GiB on each side (250,048 words × 8,192 tokens: 8 GB).
_MAX_LOGIT_ELEMENTS = 1 << 28

# Charles Darwin, On the Origin of Species, 1859 (public domain), with numbers, accents and code for variety.
_PASSAGE = """
When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the inhabitants
of South America, and in the geological relations of the present to the past inhabitants of that continent. These facts
seemed to me to throw some light on the origin of species, that mystery of mysteries, as it has been called by one of
our greatest philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be made out on
this question by patiently accumulating and reflecting on all sorts of facts which could possibly have any bearing on
it. After five years' work I allowed myself to speculate on the subject, and drew up some short notes; these I enlarged
in 1844 into a sketch of the conclusions, which then seemed to me probable: from that period to the present day I have
steadily pursued the same object. Größe, naïveté, 東京, 3.14159 and `for i in range(10): print(i)` end the sample.
"""


@dataclass(frozen=True)
class Case:
    """One batch to compare: the tokens of its longest row, the number of rows, and whether the others are shorter."""

    length: int
    batch: int = 1
    ragged: bool = False

    def row_lengths(self) -> list[int]:
        """Return the tokens of each row, the longest first; the shortest row of a ragged batch has an eighth."""
        shortest = max(1, self.length // 8) if self.ragged else self.length
        return [round(n) for n in np.linspace(self.length, shortest, self.batch)]


@dataclass(frozen=True)
class TokenSource:
    """The source of token ids for the batches: real text and random ids, with the special tokens in place.

    Args:
        text: ids of a passage without special tokens.
        prefix: ids that every input starts with, such as [CLS].
        suffix: ids that every input ends with, such as [SEP].
        mask: id put at mask positions; None if the tokenizer has none.
        template: the tokenizer's template for pairs, which models with token types need; None for other models.
    """

    text: NDArray[np.int64]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    mask: int | None
    template: Template | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: TextTokenizer) -> "TokenSource":
        """Make a source of real text, split by this tokenizer."""
        prefix, suffix = tokenizer.template.prefix, tokenizer.template.suffix
        (row,) = tokenizer.encode_texts([_PASSAGE], max_length=len(_PASSAGE), truncation=True)
        text = np.array(row[len(prefix) : len(row) - len(suffix)], np.int64)
        return cls(text, prefix, suffix, tokenizer.mask_token_id, tokenizer.template)

    def row(self, length: int, *, vocab_size: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
        """Return `length` ids: random ids below `vocab_size` if `rng` is given, else the passage, repeated."""
        inner = max(0, length - len(self.prefix) - len(self.suffix))
        body = np.resize(self.text, inner) if rng is None else rng.integers(0, vocab_size, inner)
        return np.concatenate([self.prefix, body, self.suffix])[:length].astype(np.int64)

    def pair(
        self, length: int, *, vocab_size: int, rng: np.random.Generator | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return `length` ids like `row`, but of a pair of texts of equal length, and their token types."""
        assert self.template is not None  # sources made from a tokenizer have one
        special = len(self.template.row([], []))
        inner = max(0, length - special)
        body = (np.resize(self.text, inner) if rng is None else rng.integers(0, vocab_size, inner)).tolist()
        first = inner // 2
        batch = collate([self.template.row(body[:first], body[first:])], pad_token_id=0, token_types=True)
        assert batch.token_type_ids is not None  # requested above
        return batch.input_ids[0, :length], batch.token_type_ids[0, :length]


def parity_cases(max_length: int, *, max_tokens: int | None = None) -> tuple[Case, ...]:
    """Return the batches of one export: every length alone, and cheap lengths in two and eight rows, padded or not.

    Long lengths run alone because PyTorch's time on them is most of the cost of the check.

    Args:
        max_length: the longest row; always a case of its own.
        max_tokens: leave out batches with more tokens (rows × longest row); None keeps all.
    """
    longest = max_length if max_tokens is None else min(max_length, max_tokens)
    lengths = sorted({length for length in LENGTHS if length < longest} | {longest})
    cases = [Case(length) for length in lengths]
    cases += [Case(length, 2, ragged=length > 1) for length in lengths if length <= _MAX_PAIR_LENGTH]
    cases += [Case(length, 8, ragged=True) for length in lengths if 2 < length <= _MAX_EIGHT_LENGTH]
    cases += [Case(length, 8) for length in lengths if length == 17]
    kept = [case for case in cases if max_tokens is None or case.length * case.batch <= max_tokens]
    return tuple(sorted(kept, key=lambda case: (case.length, case.batch, case.ragged)))


def max_tokens_of(spec: ModelSpec) -> int | None:
    """Return the most tokens of a compared batch; None, no limit, unless the graph gives logits of every token."""
    if spec.task == "fill-mask" and spec.logits == "all":
        return _MAX_LOGIT_ELEMENTS // spec.vocab_size
    return None


def make_batch(
    case: Case, spec: ModelSpec, tokens: TokenSource, rng: np.random.Generator, *, text_first: bool
) -> Batch:
    """Make a batch of real text and random ids in turn, padded on the right, with masks spread over the real tokens.

    If the model takes token types, two of three rows are pairs.
    """
    lengths = case.row_lengths()
    input_ids = np.full((case.batch, case.length), spec.pad_token_id, np.int64)
    attention_mask = np.zeros((case.batch, case.length), np.int64)
    types = np.zeros_like(attention_mask) if spec.token_types else None
    for i, length in enumerate(lengths):
        source = None if (i % 2 == 0) == text_first else rng
        if types is not None and i % 3 != 1:
            input_ids[i, :length], types[i, :length] = tokens.pair(length, vocab_size=spec.vocab_size, rng=source)
        else:
            input_ids[i, :length] = tokens.row(length, vocab_size=spec.vocab_size, rng=source)
        attention_mask[i, :length] = 1
    if spec.task != "fill-mask":
        return Batch(input_ids, attention_mask, None, types)
    positions = _mask_positions(lengths)
    if tokens.mask is not None:
        input_ids[positions[:, 0], positions[:, 1]] = tokens.mask
    return Batch(input_ids, attention_mask, positions, types)


def last_row_alone(batch: Batch) -> Batch:
    """Return the last (shortest) row without its padding."""
    row, length = len(batch.input_ids) - 1, int(batch.attention_mask[-1].sum())
    positions = batch.mask_positions
    if positions is not None:
        positions = positions[positions[:, 0] == row] * np.array([0, 1])
    types = None if batch.token_type_ids is None else batch.token_type_ids[row:, :length]
    return Batch(batch.input_ids[row:, :length], batch.attention_mask[row:, :length], positions, types)


def _mask_positions(lengths: Sequence[int]) -> NDArray[np.int64]:
    # Masks lie between the special tokens if there is room; a text of one or two tokens is masked at its first.
    pairs = []
    for row, length in enumerate(lengths):
        columns = np.linspace(min(1, length - 1), max(0, length - 2), _MASKS_PER_ROW).round().astype(np.int64)
        pairs += [(row, column) for column in np.unique(columns)]
    return np.array(pairs, np.int64)

"""The inputs of the contestants: texts, and the same texts as token ids.

Shapes: B texts, S tokens of the longest, M masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gte_deploy.exporters.verification.texts import builtin_texts
from gte_deploy.text.batching import collate
from gte_deploy.text.tokenization import TextTokenizer
from gte_deploy.tuning.bench import synthetic_texts

DENSE = ("1x16", "1x128", "1x512", "8x128", "1x2048")
LONG = ("1x4096", "1x8192")
LISTS = ("list-256x32", "list-64x128", "list-mixed", "short-corpus", "corpus")
NAMES = (*DENSE, "mixed", "mixed-padded", *LONG, *LISTS)
SEED = 0

# One longer text takes seconds and gigabytes, so it runs with no other contestant in memory.
_ALONE_TOKENS = 4096
_MASK_EVERY = 8


@dataclass(frozen=True)
class Job:
    """Texts as a public interface takes them, and as one batch padded on the right for a bare session.

    `input_ids` and `attention_mask` [B, S] int64; `mask_positions` [M, 2] int64 of (row, token), and `labels` [M] the
    ids that the masks hide.
    """

    texts: list[str]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    mask_positions: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    def batches(self, rows: int) -> Iterator[Job]:
        """Yield batches of so many texts in the given order, each padded to its longest text, for a bare session."""
        for start in range(0, len(self.texts), rows):
            part = slice(start, start + rows)
            mask = self.attention_mask[part]
            longest = int(mask.sum(axis=1).max())
            ids, mask = (np.ascontiguousarray(value[:, :longest]) for value in (self.input_ids[part], mask))
            yield Job(self.texts[part], ids, mask)


@dataclass(frozen=True)
class Workload:
    """Texts of these lengths in tokens, special tokens included."""

    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Number of tokens of one padded batch of all texts."""
        return len(self.lengths) * max(self.lengths)

    @property
    def is_list(self) -> bool:
        """Whether this has many texts, which every contestant divides into batches: nobody runs them as one batch."""
        return is_list(self.name)

    @property
    def is_alone(self) -> bool:
        """Whether this is too large for several contestants in memory."""
        return not self.is_list and self.padded_tokens >= _ALONE_TOKENS and len(self.lengths) == 1

    def job(self, tokenizer: TextTokenizer, *, texts: int | None = None) -> Job:
        """Make seeded texts of these lengths; only the first `texts`, if given, for a warm-up."""
        rows = synthetic_texts(tokenizer, self.lengths[:texts], seed=SEED)
        return padded_job(rows, tokenizer)


def is_list(name: str) -> bool:
    """Whether the workload of this name is a list, see `Workload.is_list`."""
    return name in LISTS or name.startswith("list-")


def make_workload(name: str, *, corpus_texts: int = 2000) -> Workload:
    """Make a workload of NAMES, or any ROWSxTOKENS or list-ROWSxTOKENS."""
    rng = np.random.default_rng(SEED)
    if name in ("mixed", "mixed-padded"):
        # 32 texts, 16 to 512 tokens: 56 % of the padded batch is real tokens.
        lengths = 16 + 496 * np.linspace(0, 1, 32) ** 0.83
        return Workload(name, tuple(rng.permutation(lengths.round().astype(int)).tolist()))
    if name == "list-mixed":  # sentences and passages
        return Workload(name, _log_normal(rng, min(128, corpus_texts), median=48, deviation=0.9, longest=512))
    if name == "short-corpus":  # queries
        return Workload(name, _log_normal(rng, min(256, corpus_texts), median=10, deviation=0.5, longest=32))
    if name == "corpus":  # sentences and passages, a few long ones
        return Workload(name, _log_normal(rng, corpus_texts, median=32, deviation=0.9, longest=512))
    rows, _, tokens = name.removeprefix("list-").partition("x")
    return Workload(name, (int(tokens),) * int(rows))


def heldout_job(tokenizer: TextTokenizer, *, texts: int, longest: int) -> Job:
    """Make a job of real texts with all lengths up to `longest` tokens."""

    def tokens(text: str) -> list[int]:
        return tokenizer.encode_texts([text], max_length=longest, truncation=True)[0]

    # Long texts are cut, decoded and tokenised again, so that texts and sessions have exactly the same tokens.
    whole = [tokenizer.decode(tokens(text), skip_special_tokens=True) for text in builtin_texts("evaluation")]
    lengths = [len(row) for row in tokenizer.encode_texts(whole, max_length=1 << 20, truncation=True)]
    fitting = sorted((length, text) for length, text in zip(lengths, whole, strict=True) if length <= longest)
    chosen = np.linspace(0, len(fitting) - 1, min(texts, len(fitting))).round().astype(int)
    return padded_job([fitting[i][1] for i in chosen], tokenizer)


def masked(job: Job, mask_token_id: int) -> Job:
    """Return the same batch with every eighth real token masked."""
    real = job.attention_mask.copy()
    real[:, 0] = 0
    real[np.arange(len(real)), job.attention_mask.sum(axis=1) - 1] = 0
    positions = np.argwhere(real == 1)[::_MASK_EVERY]
    input_ids = job.input_ids.copy()
    labels = input_ids[positions[:, 0], positions[:, 1]]
    input_ids[positions[:, 0], positions[:, 1]] = mask_token_id
    return Job([], input_ids, job.attention_mask, positions, labels)


def padded_job(texts: Sequence[str], tokenizer: TextTokenizer) -> Job:
    """Make a job of the texts; the padding id is 0, as in all models of the benchmark."""
    rows = tokenizer.encode_texts(texts, max_length=1 << 20, truncation=False)
    batch = collate(rows, pad_token_id=0)
    return Job(list(texts), batch.input_ids, batch.attention_mask)


def _log_normal(
    rng: np.random.Generator, count: int, *, median: float, deviation: float, longest: int
) -> tuple[int, ...]:
    lengths = np.exp(rng.normal(np.log(median), deviation, count)).round().clip(4, longest)
    return tuple(lengths.astype(int).tolist())

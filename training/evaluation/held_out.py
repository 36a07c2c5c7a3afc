"""Held-out text for masked language models: which chunks are read, which tokens are hidden, and the scores.

Legend: T tokens of a batch, M masked tokens of a batch, D documents that have a masked token.

Which tokens are hidden is a pure function of the seed, the document and the token's place in it. So two models, or one
model at two times, predict the same tokens, and their scores can be compared document by document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gte_deploy.core.errors import InputError, NonFiniteError
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking, mask_places
from gte_deploy.training.data.packing import MicroBatch, pack
from gte_deploy.training.data.random import STREAM_ORDER, permute, stream_key
from gte_deploy.training.data.sampling import NUM_SPECIAL, ChunkIndex, Chunking

TOP = (1, 5)

Predict = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""Returns the cross-entropy in nats `[M] float32`, and the rank from 0 `[M] int64`, of each masked token of a batch."""


@dataclass(frozen=True)
class HeldOutText:
    """The part of a corpus that an evaluation reads, cut into chunks as training cuts it.

    Args:
        corpus: text that the models were not trained on.
        max_length: tokens of a chunk, at most, with [CLS] and [SEP].
        masking: how tokens are hidden.
        max_tokens: tokens to read of each source (language) of the corpus, at most; the seed draws the chunks.
        seed: seed of the chunks and of the masks.

    Raises:
        InputError: a number is out of its range, or no token is masked.
    """

    corpus: TokenCorpus
    max_length: int
    masking: Masking
    max_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens {self.max_tokens} is below 1: give the number of tokens to read")
        if not len(self.documents):
            raise InputError(f"no token of {self.corpus.folder} is masked: hold out more text, or raise max_tokens")

    @cached_property
    def index(self) -> ChunkIndex:
        """All chunks of the corpus."""
        return ChunkIndex(self.corpus, Chunking(self.max_length), seed=self.seed)

    @cached_property
    def chunks(self) -> NDArray[np.int64]:
        """The chunks to read, `[C]`, ascending."""
        return np.concatenate(
            [self._drawn(start, stop) for start, stop in pairwise(self.index.language_bounds.tolist())]
        )

    def _drawn(self, start: int, stop: int) -> NDArray[np.int64]:
        """Draw chunks out of start..stop, at least one, until `max_tokens` are reached."""
        # A chunk has 3 tokens or more, so that a prefix of the permutation is enough, however large the corpus is.
        most = min(stop - start, self.max_tokens // (NUM_SPECIAL + 1) + 1)
        if not most:
            return np.empty(0, dtype=np.int64)
        key = stream_key(self.seed, STREAM_ORDER)
        drawn = start + permute(np.arange(most), size=stop - start, epochs=0, key=key)
        ends = np.cumsum(self.index.lengths_of(drawn))
        return np.sort(drawn[: max(1, int(np.searchsorted(ends, self.max_tokens, side="right")))])

    @cached_property
    def tokens(self) -> int:
        """Number of tokens to read."""
        return int(self.index.lengths_of(self.chunks).sum())

    @cached_property
    def _masked(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents that have a masked token, ascending, and the number of their masked tokens, `[D]` each."""
        found: dict[int, int] = {}
        for part in np.array_split(self.chunks, -(-self.tokens // (1 << 20))):
            _, documents = self.batch(part)
            for document, count in zip(*np.unique(documents, return_counts=True), strict=True):
                found[int(document)] = found.get(int(document), 0) + int(count)
        documents = np.array(sorted(found), dtype=np.int64)
        return documents, np.array([found[int(document)] for document in documents], dtype=np.int64)

    @property
    def documents(self) -> NDArray[np.int64]:
        """The documents that have a masked token, ascending, `[D]`."""
        return self._masked[0]

    @property
    def masked_tokens(self) -> NDArray[np.int64]:
        """Number of masked tokens of each document, `[D]`."""
        return self._masked[1]

    def batch(self, chunks: NDArray[np.int64]) -> tuple[MicroBatch, NDArray[np.int64]]:
        """Return chunks end to end with their masks, and the document of each masked token, `[M]`."""
        token_ids, ends = self.index.chunks(chunks)
        lengths = np.diff(ends)
        documents, starts, _ = self.index.locate(chunks)
        positions = np.arange(int(ends[-1])) - np.repeat(ends[:-1], lengths)
        of_token = np.repeat(documents, lengths)
        input_ids, masked, labels = mask_places(
            token_ids,
            positions + np.repeat(starts, lengths),  # the place in the document, which no chunk length moves
            vocab=self.corpus.vocab,
            masking=self.masking,
            seed=self.seed,
            epochs=0,
            chunks=of_token,
        )
        batch = MicroBatch(
            input_ids=input_ids,
            position_ids=positions,
            cu_seqlens=ends.astype(np.int32),
            max_seqlen=int(lengths.max()),
            masked_positions=masked,
            labels=labels,
            num_sequences=len(chunks),
        )
        return batch, of_token[masked]

    def packed(self, token_budget: int) -> list[NDArray[np.int64]]:
        """Distribute the chunks over batches of at most `token_budget` tokens.

        Raises:
            InputError: a chunk is longer than the budget.
        """
        bins = pack(self.index.lengths_of(self.chunks), token_budget=token_budget)
        return [self.chunks[members] for members in bins]

    def rectangles(self, token_budget: int) -> list[NDArray[np.int64]]:
        """Distribute the chunks over batches that, padded to their longest chunk, have at most `token_budget` tokens.

        Raises:
            InputError: a chunk is longer than the budget.
        """
        lengths = self.index.lengths_of(self.chunks)
        order = np.argsort(-lengths, kind="stable")
        if int(lengths.max()) > token_budget:
            raise InputError(f"a chunk of {lengths.max()} tokens exceeds the token budget {token_budget}: raise it")
        batches, at = [], 0
        while at < len(order):
            rows = token_budget // int(lengths[order[at]])
            batches.append(self.chunks[order[at : at + rows]])
            at += rows
        return batches


@torch.no_grad()
def scored(
    text: HeldOutText,
    predict: Predict,
    batches: Sequence[NDArray[np.int64]],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> NDArray[np.float64]:
    """Let a model predict the masked tokens, and sum up over each document.

    Args:
        text: the text.
        predict: the model.
        batches: the chunks of each batch.
        rank: number of this rank; it computes every `world_size`-th batch.
        world_size: number of ranks. All of them call `predict` equally often, because a sharded model needs that.

    Returns:
        `[D, 3] float64`: for each document the sum of the losses in nats, and the number of masked tokens whose true
        word is the best answer, and among the five best. The sum over the ranks is the result.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    sums = np.zeros((len(text.documents), 1 + len(TOP)))
    for turn in range(-(-len(batches) // world_size)):
        number = turn * world_size + rank
        batch, documents = text.batch(batches[min(number, len(batches) - 1)])
        losses, ranks = (tensor.cpu().numpy() for tensor in predict(batch))
        if number >= len(batches):
            continue  # computed only because the other ranks compute
        if not np.isfinite(losses).all():
            raise NonFiniteError("the model computes a loss of NaN or infinity; check the checkpoint")
        rows = np.searchsorted(text.documents, documents)
        values = np.stack([losses.astype(np.float64), *(ranks < best for best in TOP)], axis=1)
        np.add.at(sums, rows, values)
    return sums


# --- statistics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MaskedTokenScores:
    """How well the masked tokens of a source, or of a whole corpus, are predicted.

    Args:
        source: name of the source (language); "" for a corpus without names.
        documents: number of documents that have a masked token.
        masked_tokens: number of masked tokens.
        loss: mean cross-entropy in nats per masked token.
        top1: share of the masked tokens whose true word is the best answer.
        top5: share of the masked tokens whose true word is among the five best answers.
        errors: standard errors of loss, top1 and top5 over documents; None for fewer than two documents.
    """

    source: str
    documents: int
    masked_tokens: int
    loss: float
    top1: float
    top5: float
    errors: tuple[float, float, float] | None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss: among how many equally likely words the model chooses."""
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data, with the perplexity."""
        names = ("loss_error", "top1_error", "top5_error")
        errors = dict(zip(names, self.errors or (None, None, None), strict=True))
        facts = {name: value for name, value in asdict(self).items() if name != "errors"}
        return {**facts, "perplexity": self.perplexity, **errors}


def scores_of(text: HeldOutText, sums: NDArray[np.float64]) -> tuple[MaskedTokenScores, ...]:
    """Return the scores of all tokens, and then of each source if there are several; `sums` as `scored` returns them.

    Given the difference of two models' sums, these are the differences of their scores, with errors of pairs.
    """
    names = text.corpus.languages
    sources = np.searchsorted(text.corpus.language_bounds, text.documents, side="right") - 1
    groups = [("all", np.ones(len(sources), dtype=bool))]
    if len(names) > 1:
        groups += [(name, sources == number) for number, name in enumerate(names)]
    return tuple(_scores(name, sums[rows], text.masked_tokens[rows]) for name, rows in groups if rows.any())


def _scores(source: str, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> MaskedTokenScores:
    means, errors = ratio_of_sums(sums, counts)
    loss, top1, top5 = means.tolist()
    return MaskedTokenScores(
        source=source,
        documents=len(counts),
        masked_tokens=int(counts.sum()),
        loss=loss,
        top1=top1,
        top5=top5,
        errors=None if errors is None else tuple(errors.tolist()),
    )


def ratio_of_sums(
    sums: NDArray[np.float64], counts: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the means over all tokens, and their standard errors over the clusters that the tokens come from.

    The tokens of a cluster, such as a document, are not independent; the clusters are. The error is that of a ratio of
    two sums over n clusters, by the delta method: sqrt(n / (n - 1) * sum (sum_i - mean * count_i)^2) / sum count_i
    (Cochran, "Sampling Techniques", 1977, section 6.4, without the correction for finite populations).

    Args:
        sums: `[n, K]`, the sums of K quantities over the tokens of each cluster.
        counts: `[n]`, the number of tokens of each.

    Returns:
        The means `[K]`, and their errors `[K]`, or None for fewer than two clusters.
    """
    total = int(counts.sum())
    means = sums.sum(axis=0) / total
    n = len(counts)
    if n < 2:
        return means, None
    residuals = sums - means * counts[:, None]
    return means, np.sqrt(n / (n - 1) * (residuals**2).sum(axis=0)) / total

"""Sequences of one optimizer step, packed into micro-batches of a token budget and dealt to ranks.

Legend: T tokens of a micro-batch, N sequences in it, M masked tokens; B sequences of a step.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.errors import InputError
from gte_deploy.training.data.masking import Masking, mask_places
from gte_deploy.training.data.sampling import ChunkIndex


@dataclass(frozen=True)
class MicroBatch:
    """Sequences laid end to end; attention stays inside each, position_ids restart at 0 in each."""

    input_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T]
    cu_seqlens: NDArray[np.int32]  # [N + 1], where each sequence begins, and T
    max_seqlen: int  # no sequence is longer
    masked_positions: NDArray[np.int64]  # [M], index into T, ascending; M may be 0
    labels: NDArray[np.int64]  # [M], the ids before masking
    num_sequences: int  # of the data; with static padding, cu_seqlens names further, empty of meaning


@dataclass(frozen=True)
class PaddedMicroBatch:
    """The same samples as a rectangle, for the comparison with packing."""

    input_ids: NDArray[np.int64]  # [B, S]
    attention_mask: NDArray[np.int64]  # [B, S], 1 for tokens, 0 for padding
    masked_positions: NDArray[np.int64]  # [M], index into B * S
    labels: NDArray[np.int64]  # [M]
    num_sequences: int


@dataclass(frozen=True)
class Step:
    """What one rank computes in one optimizer step."""

    number: int
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How the optimizer steps of a stage are made, and which part of each one rank computes.

    Args:
        batch_size: sequences of a step, over all ranks.
        token_budget: tokens that a micro-batch may hold.
        seed: seed of the order of samples and of the masks.
        masking: how tokens are masked.
        rank: number of this rank, from 0.
        world_size: number of ranks.

    Raises:
        InputError: no sequence, or a rank that is not one of `world_size`.
    """

    batch_size: int
    token_budget: int
    seed: int
    masking: Masking
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise InputError(
                f"batch_size {self.batch_size}, rank {self.rank} of {self.world_size}: expected at least one sequence, "
                "and 0 <= rank < world_size"
            )


def pack(lengths: Sequence[int] | NDArray[np.int64], *, token_budget: int) -> list[list[int]]:
    """Indices of sequences per bin of `token_budget` tokens, by best fit decreasing; ties go by index.

    Raises:
        InputError: a sequence longer than the budget.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > token_budget:
        raise InputError(f"a sequence of {sizes.max()} tokens exceeds the token budget {token_budget}: raise it")
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens free, bin), ascending
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        slot = bisect.bisect_left(spaces, (size, -1))
        if slot < len(spaces):
            free, number = spaces.pop(slot)
        else:
            free, number = token_budget, len(bins)
            bins.append([])
        bins[number].append(index)
        bisect.insort(spaces, (free - size, number))
    return bins


def micro_batches(index: ChunkIndex, step: int, settings: StepSettings) -> list[MicroBatch]:
    """This rank's part of one optimizer step: over all ranks it is exactly `batch_size` sequences.

    Bins are dealt in turn, so that ranks differ by one micro-batch at most; a rank may get none.

    Raises:
        InputError: a negative step, or a chunk longer than the budget.
    """
    epochs, chunks = _samples(index, step, settings)
    bins = pack(index.lengths_of(chunks), token_budget=settings.token_budget)
    mine = bins[settings.rank :: settings.world_size]
    return [_packed(index, epochs[members], chunks[members], settings) for members in mine]


def padded_micro_batches(index: ChunkIndex, step: int, settings: StepSettings) -> list[PaddedMicroBatch]:
    """The same step without packing: rows of `max_length`, `token_budget` // `max_length` of them at a time.

    Raises:
        InputError: a negative step, or a budget below one row.
    """
    rows = settings.token_budget // index.max_length
    if rows < 1:
        raise InputError(
            f"the token budget {settings.token_budget} is below one row of {index.max_length}: raise the budget"
        )
    epochs, chunks = _samples(index, step, settings)
    starts = range(0, settings.batch_size, rows)[settings.rank :: settings.world_size]
    return [_rectangle(_packed(index, epochs[i : i + rows], chunks[i : i + rows], settings), index) for i in starts]


def _samples(index: ChunkIndex, step: int, settings: StepSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(epochs, chunks) of all the sequences of one step, [B] each."""
    if step < 0:
        raise InputError(f"step {step} is negative")
    size = settings.batch_size
    return index.samples_at(np.arange(step * size, (step + 1) * size), seed=settings.seed)


def _packed(
    index: ChunkIndex, epochs: NDArray[np.int64], chunks: NDArray[np.int64], settings: StepSettings
) -> MicroBatch:
    token_ids, ends = index.chunks(chunks)
    lengths = np.diff(ends)
    places = _places(ends)
    input_ids, positions, labels = mask_places(
        token_ids,
        places,
        vocab=index.corpus.vocab,
        masking=settings.masking,
        seed=settings.seed,
        epochs=np.repeat(epochs, lengths),
        chunks=np.repeat(chunks, lengths),
    )
    return MicroBatch(
        input_ids=input_ids,
        position_ids=places,
        cu_seqlens=ends.astype(np.int32),
        max_seqlen=int(lengths.max()),
        masked_positions=positions,
        labels=labels,
        num_sequences=len(chunks),
    )


def _places(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2 … anew in each segment [ends[i], ends[i + 1])."""
    return np.arange(int(ends[-1])) - np.repeat(ends[:-1], np.diff(ends))


def pad_to_static(batch: MicroBatch, *, num_tokens: int, max_length: int, pad_id: int) -> MicroBatch:
    """Fill up to `num_tokens` with padding in segments of its own, at most `max_length` each, never labelled.

    One long segment would need positions beyond the model's and cost attention by its square. `max_seqlen` becomes
    `max_length`, so that it is the same for every batch.

    Raises:
        InputError: the batch is already larger.
    """
    held = len(batch.input_ids)
    if held > num_tokens:
        raise InputError(f"a micro-batch of {held} tokens does not fit into {num_tokens}")
    ends = np.unique(np.append(np.arange(held, num_tokens, max_length), num_tokens))
    return replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, np.full(num_tokens - held, pad_id, dtype=np.int64)]),
        position_ids=np.concatenate([batch.position_ids, _places(ends - held)]),
        cu_seqlens=np.concatenate([batch.cu_seqlens, ends[1:]]).astype(np.int32),
        max_seqlen=max_length,
    )


def _rectangle(batch: MicroBatch, index: ChunkIndex) -> PaddedMicroBatch:
    width = index.max_length
    flat = np.repeat(np.arange(batch.num_sequences) * width, np.diff(batch.cu_seqlens)) + batch.position_ids
    input_ids = np.full(batch.num_sequences * width, index.corpus.vocab.pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    input_ids[flat], attention_mask[flat] = batch.input_ids, 1
    return PaddedMicroBatch(
        input_ids=input_ids.reshape(-1, width),
        attention_mask=attention_mask.reshape(-1, width),
        masked_positions=flat[batch.masked_positions],
        labels=batch.labels,
        num_sequences=batch.num_sequences,
    )


class StepLoader:
    """Iterates `Step`s from `start_step` to `stop_step`, prepared ahead by one background thread.

    A step is a pure function of its number, so a resume is another `start_step`. The work is vectorised numpy, which
    leaves the interpreter free for the training loop. `static_tokens` pads every micro-batch to that many tokens (see
    pad_to_static), for `torch.compile`. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        index: ChunkIndex,
        settings: StepSettings,
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        prefetch: int = 4,
        static_tokens: int | None = None,
    ) -> None:
        budget = settings.token_budget
        if budget < index.max_length:
            raise InputError(f"token budget {budget} is below max_length {index.max_length}: raise the budget")
        if static_tokens is not None and static_tokens < budget:
            raise InputError(f"static_tokens {static_tokens} is below the token budget {budget}")
        if prefetch < 1:
            raise InputError(f"prefetch {prefetch} is below 1")
        self._index, self._settings, self._static_tokens = index, settings, static_tokens
        _samples(index, start_step, settings)  # refuse here what the thread would meet later
        self._steps: Iterable[int] = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        self._ready: queue.Queue[Step | Exception | None] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="step-loader", daemon=True)
        self._thread.start()

    def step(self, number: int) -> Step:
        """Compute one step here and now."""
        batches = micro_batches(self._index, number, self._settings)
        if self._static_tokens is not None:
            batches = [
                pad_to_static(
                    batch,
                    num_tokens=self._static_tokens,
                    max_length=self._index.max_length,
                    pad_id=self._index.corpus.vocab.pad_id,
                )
                for batch in batches
            ]
        return Step(number, tuple(batches))

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._closing.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Step):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it. May be called twice."""
        self._closing.set()
        while self._thread.is_alive():
            _drain(self._ready)
            self._thread.join(timeout=0.05)
        _drain(self._ready)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        try:
            for number in self._steps:
                if self._closing.is_set():
                    return
                self._ready.put(self.step(number))
            self._ready.put(None)
        except Exception as error:  # whatever it is, the consumer's thread raises it again
            self._ready.put(error)


def _drain(items: queue.Queue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            items.get_nowait()

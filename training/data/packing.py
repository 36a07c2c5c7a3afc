"""Packing: the sequences of an optimizer step are packed into micro-batches, which are dealt to the ranks.

Legend: T tokens of a micro-batch, N sequences in it, M masked tokens in it, B sequences of a step, S tokens of a row.
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

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.masking import Masking, mask_places
from gte_deploy.training.data.sampling import NUM_SPECIAL, ChunkIndex


@dataclass(frozen=True)
class MicroBatch:
    """Sequences laid end to end in one row. Attention stays inside each sequence."""

    input_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T], from 0 in each sequence
    cu_seqlens: NDArray[np.int32]  # [N + 1], the offset of each sequence, and T
    max_seqlen: int  # no sequence is longer
    masked_positions: NDArray[np.int64]  # [M], positions in the row, ascending; M may be 0
    labels: NDArray[np.int64]  # [M], the ids before masking
    num_sequences: int  # sequences of the data; static padding adds further, meaningless ones to cu_seqlens


@dataclass(frozen=True)
class PaddedMicroBatch:
    """The same samples as a rectangle of padded rows, for the comparison with packing."""

    input_ids: NDArray[np.int64]  # [N, S]
    attention_mask: NDArray[np.int64]  # [N, S], 1 for tokens, 0 for padding
    masked_positions: NDArray[np.int64]  # [M], positions in the flattened rows, N * S
    labels: NDArray[np.int64]  # [M]
    num_sequences: int


@dataclass(frozen=True)
class Step:
    """The micro-batches of one rank in one optimizer step."""

    number: int
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of a stage's optimizer steps, and of the part of each step that one rank computes.

    Args:
        batch_size: sequences of a step, over all ranks.
        token_budget: tokens that a micro-batch may hold.
        seed: seed of the order of samples and of the masks.
        masking: how tokens are masked.
        rank: number of this rank, from 0.
        world_size: number of ranks.

    Raises:
        InputError: batch_size is below 1, or rank is not in 0..world_size - 1.
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
    """Distribute sequences over bins of `token_budget` tokens, by best fit decreasing; ties go by index.

    Returns:
        The indices of the sequences in each bin.

    Raises:
        InputError: a sequence is longer than the budget.
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
    """Pack one optimizer step and return this rank's micro-batches.

    All ranks together get exactly `batch_size` sequences. Micro-batches are dealt in turn, so that the ranks differ by
    one at most; a rank may get none.

    Raises:
        InputError: the step is negative, or a chunk is longer than the budget.
    """
    epochs, chunks = _samples(index, step, settings)
    places = np.stack(index.locate(chunks))
    bins = pack(places[2] + NUM_SPECIAL, token_budget=settings.token_budget)
    mine = bins[settings.rank :: settings.world_size]
    return [_packed(index, epochs[members], chunks[members], places[:, members], settings) for members in mine]


def padded_micro_batches(index: ChunkIndex, step: int, settings: StepSettings) -> list[PaddedMicroBatch]:
    """Return the same step without packing: micro-batches of `token_budget` // `max_length` padded rows.

    Raises:
        InputError: the step is negative, or the budget is below one row.
    """
    width = index.chunking.max_length
    rows = settings.token_budget // width
    if rows < 1:
        raise InputError(f"the token budget {settings.token_budget} is below one row of {width}: raise the budget")
    epochs, chunks = _samples(index, step, settings)
    starts = range(0, settings.batch_size, rows)[settings.rank :: settings.world_size]
    mine = [slice(start, start + rows) for start in starts]
    places = np.stack(index.locate(chunks))
    return [_rectangle(_packed(index, epochs[i], chunks[i], places[:, i], settings), index) for i in mine]


def _samples(index: ChunkIndex, step: int, settings: StepSettings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the epochs and the chunks of all sequences of a step, [B] each."""
    if step < 0:
        raise InputError(f"step {step} is negative")
    size = settings.batch_size
    return index.samples_at(np.arange(step * size, (step + 1) * size), seed=settings.seed)


def _packed(
    index: ChunkIndex,
    epochs: NDArray[np.int64],
    chunks: NDArray[np.int64],
    places: NDArray[np.int64],
    settings: StepSettings,
) -> MicroBatch:
    """Pack and mask chunks, of which `places` has what `locate` returned, `[3, N]`."""
    token_ids, ends = index.read(*places)
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
    """Number the positions of each segment [ends[i], ends[i + 1]) from 0."""
    return np.arange(int(ends[-1])) - np.repeat(ends[:-1], np.diff(ends))


def pad_to_static(batch: MicroBatch, *, num_tokens: int, max_length: int, pad_id: int) -> MicroBatch:
    """Pad a micro-batch to `num_tokens` tokens. The padding has no labels and forms segments of its own.

    A segment of padding has at most `max_length` tokens: a longer one would need positions that the model does not
    have, and its attention would cost the square of its length. `max_seqlen` becomes `max_length`, so that it is the
    same for every batch.

    Raises:
        InputError: the batch is larger than `num_tokens`.
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
    width = index.chunking.max_length
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
    """Iterates over the steps from `start_step` to `stop_step`. A background thread prepares them ahead.

    A step is a pure function of its number, so a resumed run only passes another `start_step`. The thread's work is
    vectorised numpy, which leaves the interpreter free for the training loop. With `static_tokens` every micro-batch is
    padded to that many tokens (see `pad_to_static`), for `torch.compile`. Use a loader as a context manager, or call
    `close`.

    Raises:
        InputError: the settings, the first step or an option cannot be used.
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
        if budget < index.chunking.max_length:
            raise InputError(f"token budget {budget} is below max_length {index.chunking.max_length}: raise the budget")
        if static_tokens is not None and static_tokens < budget:
            raise InputError(f"static_tokens {static_tokens} is below the token budget {budget}")
        if prefetch < 1:
            raise InputError(f"prefetch {prefetch} is below 1")
        self._index, self._settings, self._static_tokens = index, settings, static_tokens
        _samples(index, start_step, settings)  # an error is raised here and not later in the thread
        self._steps: Iterable[int] = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        self._ready: queue.Queue[Step | Exception | None] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="step-loader", daemon=True)
        self._thread.start()

    def step(self, number: int) -> Step:
        """Compute one step in the caller's thread."""
        size = self._settings.batch_size
        self._index.fetch_ahead(number * size, (number + 1) * size, seed=self._settings.seed)
        batches = micro_batches(self._index, number, self._settings)
        if self._static_tokens is not None:
            batches = [
                pad_to_static(
                    batch,
                    num_tokens=self._static_tokens,
                    max_length=self._index.chunking.max_length,
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
        """Stop the thread and wait for its end. A second call does nothing."""
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
        except Exception as error:  # of any kind: the consumer's thread raises it again
            self._ready.put(error)


def _drain(items: queue.Queue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            items.get_nowait()

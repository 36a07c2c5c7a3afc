import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking, mask_tokens
from gte_deploy.training.data.packing import (
    StepLoader,
    StepSettings,
    micro_batches,
    pack,
    pad_to_static,
    padded_micro_batches,
)
from gte_deploy.training.data.sampling import ChunkIndex, Chunking, samples_at

MAX_LENGTH = 64
STEP = StepSettings(batch_size=96, token_budget=256, seed=4, masking=Masking())


def c4_like_lengths(count, *, seed, cut=512):
    """Log-normal document lengths, median 245 tokens, cut at the stage's length."""
    return np.clip(np.random.default_rng(seed).lognormal(5.5, 1.1, count).astype(int), 3, cut)


def open_index(folder, lengths, *, max_length):
    """An index over random ordinary ids, written by hand: vocabulary 256, special ids 0 … 4."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(5, 256, int(np.sum(lengths)))
    (folder / "s.tokens").write_bytes(tokens.astype("<u2").tobytes())
    (folder / "s.offsets").write_bytes(np.cumsum([0, *lengths]).astype("<i8").tobytes())
    vocabulary = {"size": 256, "pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    shard = {"name": "s", "language": "", "documents": len(lengths), "tokens": len(tokens)}
    index = {"format": "gte-token-corpus", "version": 1, "languages": [""]}
    index["vocabulary"] = {**vocabulary, "special_ids": [0, 1, 2, 3, 4]}
    index["shards"] = [{**shard, "tokens_sha256": "", "offsets_sha256": ""}]
    (folder / "index.json").write_text(json.dumps(index))
    return ChunkIndex(TokenCorpus.open(folder), Chunking(max_length), seed=1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    lengths = np.random.default_rng(1).integers(1, 150, 300)
    return open_index(tmp_path_factory.mktemp("packing") / "corpus", lengths, max_length=MAX_LENGTH)


def sequences(batches):
    """Each sequence as (masked ids, where its labels are, labels): comparable across any packing."""
    found = []
    for batch in batches:
        for i in range(batch.num_sequences):
            start, stop = batch.cu_seqlens[i : i + 2]
            here = (batch.masked_positions >= start) & (batch.masked_positions < stop)
            positions, labels = batch.masked_positions[here] - start, batch.labels[here]
            found.append(tuple(map(tuple, (batch.input_ids[start:stop], positions, labels))))
    return sorted(found)


# --- pack -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_pack_uses_every_sequence_once_within_the_budget(seed):
    lengths = c4_like_lengths(1_000, seed=seed)
    bins = pack(lengths, token_budget=4_096)
    assert sorted(i for members in bins for i in members) == list(range(1_000))
    assert max(int(lengths[members].sum()) for members in bins) <= 4_096
    assert bins == pack(lengths.tolist(), token_budget=4_096)


def test_pack_fills_c4_like_lengths():
    """The published first stage: 4,096 sequences cut at 512. The last, partly filled bin counts as well."""
    fills = []
    for seed in range(10):
        lengths = c4_like_lengths(4_096, seed=seed)
        fills += [lengths.sum() / (len(pack(lengths, token_budget=b)) * b) for b in (8_192, 16_384)]
    assert np.mean(fills) >= 0.99
    assert min(fills) >= 0.985


def test_pack_takes_the_fullest_bin_that_fits():
    # 6 and 5 open two bins of 10; 4 fits both and takes the one with exactly 4 left; so 5 can follow.
    assert pack([6, 5, 4, 5], token_budget=10) == [[0, 2], [1, 3]]
    assert pack([6, 7, 3], token_budget=10) == [[1, 2], [0]]


@pytest.mark.parametrize(("lengths", "expected"), [([], []), ([10], [[0]]), ([10, 10], [[0], [1]])])
def test_pack_at_the_edges(lengths, expected):
    assert pack(lengths, token_budget=10) == expected


def test_pack_refuses_a_sequence_beyond_the_budget():
    with pytest.raises(InputError, match="11 tokens exceeds the token budget 10"):
        pack([3, 11], token_budget=10)


# --- micro-batches --------------------------------------------------------------------------------------------------


def test_a_micro_batch_holds_what_it_says(index):
    batches = micro_batches(index, 2, STEP)
    assert sum(batch.num_sequences for batch in batches) == 96
    for batch in batches:
        lengths = np.diff(batch.cu_seqlens)
        assert len(batch.input_ids) == len(batch.position_ids) == batch.cu_seqlens[-1] <= 256
        assert batch.cu_seqlens[0] == 0 and batch.num_sequences == len(lengths)
        assert batch.max_seqlen == lengths.max() <= MAX_LENGTH
        assert batch.position_ids.tolist() == [i for length in lengths for i in range(length)]
        assert np.all(batch.input_ids[batch.cu_seqlens[:-1]] == 2)
        assert np.all(batch.input_ids[batch.cu_seqlens[1:] - 1] == 3)
        kinds = {n: getattr(batch, n).dtype for n in ("input_ids", "position_ids", "masked_positions", "labels")}
        assert set(kinds.values()) == {np.dtype(np.int64)} and batch.cu_seqlens.dtype == np.int32


def test_a_step_is_the_samples_of_its_indices_masked_one_by_one(index):
    """Against the plain way: one chunk at a time, no packing."""
    epochs, chunks = samples_at(np.arange(5 * 96, 6 * 96), num_chunks=index.num_chunks, seed=4)
    expected = []
    for epoch, chunk in zip(epochs.tolist(), chunks.tolist(), strict=True):
        arguments = {"vocab": index.corpus.vocab, "masking": Masking(), "seed": 4, "epoch": epoch, "chunk": chunk}
        expected.append(tuple(map(tuple, mask_tokens(index.chunk(chunk), **arguments))))
    batches = micro_batches(index, 5, STEP)
    assert sequences(batches) == sorted(expected)


@pytest.mark.parametrize("world_size", [2, 3, 8, 200])
def test_ranks_together_see_the_same_samples(index, world_size):
    alone = micro_batches(index, 1, STEP)
    parts = [micro_batches(index, 1, replace(STEP, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sequences(batch for part in parts for batch in part) == sequences(alone)
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    assert (min(counts) == 0) == (world_size > len(alone))


@pytest.mark.parametrize("token_budget", [64, 100, 1_024, 10_000])
def test_the_token_budget_changes_no_sample(index, token_budget):
    expected = sequences(micro_batches(index, 3, STEP))
    other = micro_batches(index, 3, replace(STEP, token_budget=token_budget))
    assert sequences(other) == expected


def test_an_epoch_visits_every_chunk_once(index):
    """Batches that divide the corpus: the steps of an epoch are the corpus, whatever the ranks."""
    size = next(n for n in range(20, 0, -1) if index.num_chunks % n == 0)
    labels_only = replace(STEP, batch_size=size, masking=Masking(1.0, 0.0, 0.0), world_size=2)  # nothing is replaced
    steps = range(index.num_chunks // size)
    parts = [micro_batches(index, s, replace(labels_only, rank=r)) for s in steps for r in (0, 1)]
    seen = [ids for ids, _, _ in sequences(batch for part in parts for batch in part)]
    assert seen == sorted(tuple(index.chunk(i)) for i in range(index.num_chunks))


def test_the_next_epoch_is_masked_anew(index):
    epoch = replace(STEP, batch_size=index.num_chunks)
    first, second = (sequences(micro_batches(index, s, epoch)) for s in (0, 1))
    assert len(set(first) & set(second)) < 0.2 * len(first)  # chunks of a few tokens may be masked alike


@pytest.mark.parametrize(
    ("step", "change"),
    [(-1, {}), (0, {"batch_size": 0}), (0, {"rank": 2}), (0, {"rank": -1}), (0, {"token_budget": 63})],
    ids=str,
)
def test_impossible_steps_are_refused(index, step, change):
    with pytest.raises(InputError):
        micro_batches(index, step, replace(STEP, **({"world_size": 2} | change)))


def test_loading_is_faster_than_a_million_tokens_per_second(tmp_path):
    """Processor time of one core for chunk, mask and pack: other work on the machine does not count."""
    index = open_index(tmp_path / "corpus", c4_like_lengths(8_000, seed=2, cut=100_000), max_length=512)
    settings = StepSettings(batch_size=2_048, token_budget=16_384, seed=0, masking=Masking())
    start = time.thread_time()
    steps = [micro_batches(index, s, settings) for s in range(2)]
    seconds = time.thread_time() - start
    tokens = sum(len(batch.input_ids) for batches in steps for batch in batches)
    assert tokens / seconds >= 1_000_000


# --- static shapes and rectangles -----------------------------------------------------------------------------------


def test_static_padding_adds_segments_without_labels(index):
    batch = micro_batches(index, 0, STEP)[-1]
    held = len(batch.input_ids)
    padded = pad_to_static(batch, num_tokens=held + 150, max_length=MAX_LENGTH, pad_id=0)
    assert np.diff(padded.cu_seqlens)[batch.num_sequences :].tolist() == [64, 64, 22]
    assert padded.num_sequences == batch.num_sequences
    assert padded.max_seqlen == MAX_LENGTH and padded.position_ids.max() < MAX_LENGTH
    assert padded.position_ids[held:].tolist() == [*range(64), *range(64), *range(22)]
    assert padded.input_ids[held:].tolist() == [0] * 150
    assert sequences([padded]) == sequences([batch])
    assert np.array_equal(padded.masked_positions, batch.masked_positions)
    assert padded.cu_seqlens.dtype == np.int32 and padded.cu_seqlens[-1] == held + 150


def test_static_padding_of_a_full_batch_changes_only_the_bound(index):
    batch = micro_batches(index, 0, STEP)[0]
    full = pad_to_static(batch, num_tokens=len(batch.input_ids), max_length=MAX_LENGTH, pad_id=0)
    assert np.array_equal(full.cu_seqlens, batch.cu_seqlens) and np.array_equal(full.input_ids, batch.input_ids)
    with pytest.raises(InputError, match="does not fit"):
        pad_to_static(batch, num_tokens=len(batch.input_ids) - 1, max_length=MAX_LENGTH, pad_id=0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_padded_micro_batches_hold_the_same_samples(index, world_size):
    expected = sequences(micro_batches(index, 6, STEP))
    found = []
    for rank in range(world_size):
        for batch in padded_micro_batches(index, 6, replace(STEP, rank=rank, world_size=world_size)):
            assert batch.input_ids.shape == batch.attention_mask.shape == (batch.num_sequences, MAX_LENGTH)
            assert batch.num_sequences <= 256 // MAX_LENGTH
            assert np.all(batch.input_ids[batch.attention_mask == 0] == 0)
            rows, columns = np.divmod(batch.masked_positions, MAX_LENGTH)
            for row, mask in enumerate(batch.attention_mask):
                length = int(mask.sum())
                assert mask.tolist() == [1] * length + [0] * (MAX_LENGTH - length)
                here = rows == row
                found.append(tuple(map(tuple, (batch.input_ids[row, :length], columns[here], batch.labels[here]))))
    assert sorted(found) == expected


def test_padded_micro_batches_refuse_less_than_a_row(index):
    with pytest.raises(InputError, match="below one row of 64"):
        padded_micro_batches(index, 0, replace(STEP, token_budget=63))


# --- the loader -----------------------------------------------------------------------------------------------------


def same(first, second):
    return (
        first.number == second.number
        and len(first.micro_batches) == len(second.micro_batches)
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for a, b in zip(first.micro_batches, second.micro_batches, strict=True)
            for name in ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "masked_positions", "labels")
        )
    )


def test_a_resume_needs_only_the_step(index):
    with StepLoader(index, STEP, stop_step=12) as loader:
        undisturbed = list(loader)
    with StepLoader(index, STEP, start_step=7, stop_step=12, prefetch=1) as loader:
        resumed = list(loader)
    assert [step.number for step in undisturbed] == list(range(12))
    assert len(resumed) == 5 and all(map(same, undisturbed[7:], resumed))
    assert not any(map(same, undisturbed[:5], resumed))


def test_the_loader_gives_what_micro_batches_gives(index):
    settings = replace(STEP, rank=1, world_size=3)
    with StepLoader(index, settings, stop_step=3) as loader:
        for step in loader:
            expected = micro_batches(index, step.number, settings)
            assert sequences(step.micro_batches) == sequences(expected)


def test_the_loader_pads_to_a_static_shape(index):
    with StepLoader(index, STEP, stop_step=2, static_tokens=300) as loader:
        shapes = {(len(b.input_ids), len(b.position_ids), b.max_seqlen) for s in loader for b in s.micro_batches}
    assert shapes == {(300, 300, MAX_LENGTH)}


def test_the_loader_runs_ahead_and_no_further(index, monkeypatch):
    computed = []
    original = StepLoader.step
    monkeypatch.setattr(StepLoader, "step", lambda self, number: computed.append(number) or original(self, number))
    with StepLoader(index, STEP, prefetch=2) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while len(computed) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    # one taken, two waiting, one in the thread's hand; the one after it may begin while `close` drains
    assert computed[:4] == [0, 1, 2, 3] and len(computed) <= 6


def loader_threads():
    return sum(thread.name == "step-loader" for thread in threading.enumerate())


def test_close_ends_the_thread_and_the_iteration(index):
    loader = StepLoader(index, STEP)
    next(loader)
    assert loader_threads() == 1
    loader.close()
    loader.close()
    assert loader_threads() == 0
    assert list(loader) == []


def test_an_error_in_the_thread_reaches_the_consumer(index, monkeypatch):
    def broken(self, number):
        raise OSError("the disk is gone")

    monkeypatch.setattr(StepLoader, "step", broken)
    with StepLoader(index, STEP) as loader, pytest.raises(OSError, match="the disk is gone"):
        next(loader)


@pytest.mark.parametrize(
    ("change", "options"),
    [({"token_budget": 63}, {}), ({}, {"static_tokens": 255}), ({}, {"prefetch": 0}), ({}, {"start_step": -1})],
    ids=str,
)
def test_the_loader_refuses_at_once(index, change, options):
    with pytest.raises(InputError):
        StepLoader(index, replace(STEP, **change), **options)
    assert loader_threads() == 0

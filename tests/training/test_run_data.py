"""A run's corpus: what is verified, when it is verified again, and who makes the table of chunks."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from corpora import random_documents, write_corpus
from gte_deploy.core.errors import GteDeployError, InputError
from gte_deploy.training import run_data
from gte_deploy.training.data import sampling
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.sampling import Chunking
from gte_deploy.training.distributed import World
from gte_deploy.training.log import LOG_FILE, read_log
from gte_deploy.training.options import CorpusSource
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.run import StopRequested
from gte_deploy.training.run_data import VERIFIED_FILE, remove_shared_tables, shared_index, verify_once
from gte_deploy.training.train import train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    texts = {f"l{i}": random_documents([20] * 30, seed=i) for i in range(4)}
    return write_corpus(tmp_path / "corpus", texts)


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def flip(path, at=100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def verify(folder, output):
    verify_once([TokenCorpus.open(folder)], output, ALONE)


@pytest.mark.parametrize("name", ["shard-00000.tokens", "shard-00003.tokens", "shard-00002.offsets"])
def test_a_flipped_bit_is_found(folder, output, name):
    flip(folder / name, at=8 if name.endswith("offsets") else 100)
    with pytest.raises(InputError, match=f"{name} does not match its sha256"):
        verify(folder, output)
    assert not (output / VERIFIED_FILE).exists()


def refuse(*_):
    raise AssertionError("the corpus is read again")


def test_a_verified_corpus_is_not_read_again(folder, output, monkeypatch):
    verify(folder, output)
    monkeypatch.setattr(run_data, "verify_shard", refuse)
    verify(folder, output)
    before = (output / VERIFIED_FILE).stat().st_mtime_ns
    verify(folder, output)
    assert (output / VERIFIED_FILE).stat().st_mtime_ns == before


CHANGES = {
    "altered": lambda folder, output: flip(folder / "shard-00001.tokens"),
    "written again": lambda folder, output: os.utime(folder / "shard-00001.tokens", ns=(1, 1)),
    "another index": lambda folder, output: (folder / "index.json").write_text(
        (folder / "index.json").read_text() + " "
    ),
    "record damaged": lambda folder, output: (output / VERIFIED_FILE).write_text("{"),
    "record of another form": lambda folder, output: (output / VERIFIED_FILE).write_text('{"verified": 3}'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_corpus_that_changed_is_verified_again(folder, output, monkeypatch, name):
    verify(folder, output)
    CHANGES[name](folder, output)
    if name == "altered":
        with pytest.raises(InputError, match="sha256"):
            verify(folder, output)
        return
    with monkeypatch.context() as patched, pytest.raises(AssertionError, match="read again"):
        patched.setattr(run_data, "verify_shard", refuse)
        verify(folder, output)
    verify(folder, output)
    assert len(json.loads((output / VERIFIED_FILE).read_text())["verified"]) == 1


def test_the_ranks_of_a_node_share_the_work(folder, output, monkeypatch):
    flip(folder / "shard-00001.tokens")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    verify(folder, output)
    (output / VERIFIED_FILE).unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="shard-00001"):
        verify(folder, output)


def test_the_held_out_text_is_verified_and_remembered_too(folder, output, tmp_path, monkeypatch):
    held_out = write_corpus(tmp_path / "held-out", random_documents([20] * 3))

    def both():
        verify_once([TokenCorpus.open(folder), TokenCorpus.open(held_out)], output, ALONE)

    both()
    with monkeypatch.context() as patched:
        patched.setattr(run_data, "verify_shard", refuse)
        both()
    flip(held_out / "shard-00000.tokens")
    with pytest.raises(InputError, match="held-out/shard-00000.tokens does not match its sha256"):
        both()


class Ranks:
    """Worlds of threads that vote as processes do."""

    def __init__(self, size):
        self._barrier = threading.Barrier(size, timeout=20)
        self._rows: list[list[Any]] = [[]] * size
        self.worlds = [self._World(self, rank) for rank in range(size)]

    class _World:
        def __init__(self, ranks, rank):
            self._ranks, self.rank, self.is_main = ranks, rank, rank == 0

        def any(self, flag):
            return any(row[0] for row in self.gather([flag]))

        def gather(self, values):
            self._ranks._rows[self.rank] = list(values)
            self._ranks._barrier.wait()
            found = list(self._ranks._rows)
            self._ranks._barrier.wait()
            return found


def on_ranks(work, size=2):
    """Call work(world) on each rank; return the results or errors."""
    found: list[Any] = [None] * size

    def run(world):
        try:
            found[world.rank] = work(world)
        except Exception as error:
            found[world.rank] = error

    threads = [threading.Thread(target=run, args=(world,)) for world in Ranks(size).worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_damage_that_one_rank_finds_stops_all(folder, output, monkeypatch):
    corpus = TokenCorpus.open(folder)

    def share_of(corpus, stopped):
        if threading.current_thread().name == "finds":
            raise InputError("shard-00001.tokens does not match")

    monkeypatch.setattr(run_data, "_verify_share", share_of)

    def work(world):
        threading.current_thread().name = "finds" if world.rank else "finds nothing"
        verify_once([corpus], output, world)

    first, second = on_ranks(work)
    assert "another rank" in str(first) and "does not match" in str(second)
    assert not (output / VERIFIED_FILE).exists()


def test_a_signal_ends_the_verification_on_all_ranks(folder, output, monkeypatch):
    corpus, read = TokenCorpus.open(folder), []
    monkeypatch.setattr(run_data, "verify_shard", lambda *_: read.append(time.sleep(0.3)))
    monkeypatch.setattr(run_data, "available_cpus", lambda: 1)

    def work(world):
        verify_once([corpus], output, world, stopped=lambda: world.rank == 1)

    first, second = on_ranks(work)
    assert isinstance(first, StopRequested) and isinstance(second, StopRequested)
    assert len(read) < 2 * len(corpus.shards) and not (output / VERIFIED_FILE).exists()


@pytest.mark.usefixtures("without_plots")
def test_a_run_that_is_stopped_while_it_verifies_has_no_step(make_recipe, corpus_folder, tmp_path, monkeypatch):
    original = run_data.verify_shard

    def signalled(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)  # which the main thread handles

    monkeypatch.setattr(run_data, "verify_shard", signalled)
    recipe = recipe_from_dict(make_recipe(steps=(1,)))
    result = train(recipe, data=corpus_folder, output=tmp_path / "run", device="cpu")
    assert (result.finished, result.checkpoint, result.model) == (False, None, None)
    monkeypatch.setattr(run_data, "verify_shard", original)
    assert train(recipe, data=corpus_folder, output=tmp_path / "run", device="cpu").finished


def open_shared(corpus, place, world):
    options = {"seed": 1, "shuffle_shards": None, "batch_size": 8}
    return shared_index(corpus, Chunking(12), **options, folder=place, world=world)


def test_one_rank_makes_the_table_and_all_map_it(folder, tmp_path, monkeypatch):
    corpus, made = TokenCorpus.open(folder), []
    build = sampling.build_chunk_table
    monkeypatch.setattr(sampling, "build_chunk_table", lambda *a, **k: made.append(1) or build(*a, **k))

    def work(world):
        return shared_index(
            corpus, Chunking(12), seed=1, shuffle_shards=None, batch_size=8, folder=tmp_path / "chunks", world=world
        )

    indexes = on_ranks(work, size=3)
    assert made == [1]
    samples = indexes[0].samples_at(np.arange(50), seed=2)
    for index in indexes:
        assert isinstance(index._table.first_chunk, np.memmap)
        np.testing.assert_array_equal(index.samples_at(np.arange(50), seed=2), samples)
    remove_shared_tables(tmp_path / "chunks")
    assert not (tmp_path / "chunks").exists()
    remove_shared_tables(tmp_path / "chunks")


def test_a_rank_that_does_not_see_the_folder_makes_its_own(folder, tmp_path):
    corpus = TokenCorpus.open(folder)

    def work(world):
        place = tmp_path / f"disk-of-{world.rank}"
        return open_shared(corpus, place, world)

    first, second = on_ranks(work)
    np.testing.assert_array_equal(first.samples_at(np.arange(50), seed=2), second.samples_at(np.arange(50), seed=2))


def test_a_table_that_cannot_be_made_stops_all(folder, tmp_path):
    corpus = TokenCorpus.open(folder)
    (tmp_path / "chunks").write_text("a file")

    def work(world):
        shared_index(
            corpus, Chunking(12), seed=1, shuffle_shards=None, batch_size=8, folder=tmp_path / "chunks", world=world
        )

    first, second = on_ranks(work)
    assert isinstance(first, FileExistsError)
    assert isinstance(second, GteDeployError) and "main process" in str(second)


@pytest.mark.usefixtures("without_plots")
def test_a_run_from_a_url_equals_one_from_a_folder_bit_by_bit(make_recipe, corpus_folder, tmp_path, monkeypatch):
    tokens = TokenCorpus.open(corpus_folder).lengths
    documents = random_documents(tokens, seed=2)
    data = write_corpus(tmp_path / "data", {f"l{i}": documents[i::6] for i in range(6)})
    shutil.copytree(corpus_folder / "tokenizer", data / "tokenizer")
    index = json.loads((data / "index.json").read_text())
    known = json.loads((corpus_folder / "index.json").read_text())
    index.update(vocabulary=known["vocabulary"], tokenizer_sha256=known["tokenizer_sha256"])
    (data / "index.json").write_text(json.dumps(index))
    recipe = recipe_from_dict(make_recipe(steps=(4,), shuffle_shards=1, checkpoint_every=2))
    sizes = sorted(path.stat().st_size for path in data.glob("*.tokens"))
    remote = CorpusSource(data=data.as_uri(), cache=tmp_path / "cache", cache_bytes=sum(sizes[2:]))

    train(recipe, data=data, output=tmp_path / "folder", device="cpu")
    train(recipe, data=remote, output=tmp_path / "url", device="cpu")
    # Begun with the folder, and continued with the URL.
    shutil.copytree(tmp_path / "folder", tmp_path / "both")
    shutil.rmtree(sorted((tmp_path / "both" / "checkpoints").iterdir())[-1])
    train(recipe, data=remote, output=tmp_path / "both", device="cpu")
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("folder", "url", "both")]
    for model in models[1:]:
        assert all(torch.equal(model[key], models[0][key]) for key in models[0])
    losses = [[step["loss"] for step in read_log(tmp_path / name / LOG_FILE)] for name in ("folder", "url")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tokens")) <= sum(sizes[2:])

    small = dataclasses.replace(remote, cache_bytes=sizes[0])
    with pytest.raises(InputError, match="cache_bytes"):
        train(recipe, data=small, output=tmp_path / "small", device="cpu")


def test_what_is_verified_is_said(folder, output, caplog):
    with caplog.at_level(logging.INFO):
        verify(folder, output)
    assert "verifying" in caplog.text and "verified in" in caplog.text

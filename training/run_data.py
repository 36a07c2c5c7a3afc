"""The corpus of a run: verified once, and its chunk tables shared by the ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path

from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import GteDeployError, InputError
from gte_deploy.core.files import read_json_object, write_text
from gte_deploy.models.checkpoint import TOKENIZER_FILES
from gte_deploy.training.data.chunk_table import remove_tables
from gte_deploy.training.data.corpus import TokenCorpus, corpus_fingerprint, shard_files, verify_shard
from gte_deploy.training.data.remote import is_url, open_remote_corpus
from gte_deploy.training.data.sampling import ChunkIndex, Chunking, open_chunk_table
from gte_deploy.training.distributed import World
from gte_deploy.training.options import CorpusSource
from gte_deploy.training.run import StopRequested
from gte_deploy.training.state import TOKENIZER_FOLDER

logger = logging.getLogger(__name__)

TABLES_FOLDER = "chunks"
"""The chunk table of the present stage, in the folder of a run."""
VERIFIED_FILE = "corpus-verified.json"
"""Which states of the corpus were verified, in the folder of a run."""
_MOST_THREADS = 8
_POLL_S = 0.2


def open_corpus(source: CorpusSource) -> TokenCorpus:
    """Open the corpus of a run: a folder, or a URL. Call its `close` at the end.

    Raises:
        InputError: there is no corpus, or a file of it is missing, incomplete or altered.
        UnavailableError: the storage did not answer, however often it was asked.
    """
    if not is_url(source.data):
        return TokenCorpus.open(Path(source.data))
    rank, size = _local_rank()
    return open_remote_corpus(
        str(source.data),
        cache=source.cache,
        cache_bytes=source.cache_bytes,
        part=(rank, size),
        others=[f"{TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES],
    )


def verify_once(
    corpora: Sequence[TokenCorpus], output: Path, world: World, *, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Compare every file of the corpora with its sha256, unless this run did so before and no file has changed since.

    The ranks of a node share the work; each node reads its own copy, or the shared one. A file counts as unchanged if
    it has the same size, time of modification and inode. Every rank has to call this.

    Of a corpus at a URL each shard is verified when it has been fetched, and nothing is left to do here.

    Args:
        corpora: the corpora of the run.
        output: the folder of the run, which remembers what was verified.
        world: the ranks of the run.
        stopped: says whether a signal has asked this rank to stop.

    Raises:
        InputError: a file was altered, on this rank or on another one.
        StopRequested: a signal has asked one of the ranks to stop.
    """
    here = [corpus for corpus in corpora if corpus.files.cache_bytes is None]
    own_states, record = [_state(corpus) for corpus in here], output / VERIFIED_FILE
    known = _verified_states(record)
    damaged = True
    try:
        for corpus, state in zip(here, own_states, strict=True):
            if state in known:
                continue
            start = time.perf_counter()
            size = sum(stat.st_size for stat in _stats(corpus))
            logger.info("verifying %s, %.1f GB; it is remembered for this run", corpus.folder, size / 1e9)
            _verify_share(corpus, stopped)
            logger.info("verified in %.0f s", time.perf_counter() - start)
        damaged = False
    except StopRequested:
        damaged = False  # as far as was read
    finally:
        damaged_anywhere = world.any(damaged)
    if damaged_anywhere:
        raise InputError("a corpus is damaged, as another rank found; its message names the file")
    if world.any(stopped()):
        raise StopRequested
    states = sorted({state for row in world.gather(own_states) for state in row})
    if world.is_main and states != known:
        write_text(record, json.dumps({"verified": states}) + "\n")


def shared_index(
    corpus: TokenCorpus,
    chunking: Chunking,
    *,
    seed: int,
    shuffle_shards: int | None,
    batch_size: int,
    folder: Path,
    world: World,
) -> ChunkIndex:
    """Open the index of a stage. The main process makes its table in `folder`, if it is not there; every rank maps it.

    A rank that does not see the folder makes a table for itself. Every rank has to call this.

    Raises:
        InputError: no chunk is left, the weights are not those of the corpus's languages, or the cache of a corpus at a
            URL cannot hold the shards that a step needs.
        GteDeployError: the main process could not make the table.
    """
    table, failed = None, world.is_main
    try:
        if world.is_main:
            table = open_chunk_table(corpus, chunking, seed=seed, folder=folder, write=True)
            failed = False
    finally:
        failed_anywhere = world.any(failed)
    if failed_anywhere:
        raise GteDeployError(f"the main process could not make a table in {folder}; its message says why")
    if not world.is_main:
        table = open_chunk_table(corpus, chunking, seed=seed, folder=folder, write=False)
    index = ChunkIndex(corpus, chunking, seed=seed, shuffle_shards=shuffle_shards, table=table)
    index.require_cache(batch_size)
    return index


def remove_shared_tables(folder: Path) -> None:
    """Remove the tables of a finished run."""
    if folder.is_dir():
        remove_tables(folder)
        folder.rmdir()


def _verify_share(corpus: TokenCorpus, stopped: Callable[[], bool]) -> None:
    """Verify this rank's share of the shards.

    Raises:
        InputError: a file was altered.
        StopRequested: a signal has asked this rank to stop.
    """
    rank, size = _local_rank()
    threads = min(_MOST_THREADS, max(1, available_cpus() // size))
    executor = futures.ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        pending = {executor.submit(_verify, corpus, shard) for shard in range(rank, len(corpus.shards), size)}
        while pending:
            if stopped():
                raise StopRequested
            done, pending = futures.wait(pending, _POLL_S, futures.FIRST_COMPLETED)
            for each in done:
                each.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _local_rank() -> tuple[int, int]:
    """Return the number of this rank among those of its node, and how many these are, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _verify(corpus: TokenCorpus, shard: int) -> None:
    verify_shard(corpus.folder, corpus.shards[shard], corpus.vocab)


def _stats(corpus: TokenCorpus) -> list[os.stat_result]:
    return [(corpus.folder / name).stat() for shard in corpus.shards for name in shard_files(shard, corpus.vocab)]


def _state(corpus: TokenCorpus) -> int:
    """Return a number that stands for the corpus and the present state of its files."""
    stamps = [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in _stats(corpus)]
    digest = hashlib.sha256(json.dumps([corpus_fingerprint(corpus), stamps]).encode()).digest()
    return int.from_bytes(digest[:7], "big")  # as a signed 64-bit integer, which the ranks exchange


def _verified_states(record: Path) -> list[int]:
    try:
        states = read_json_object(record, error=InputError).get("verified", [])
    except InputError:  # it is written again
        return []
    return [state for state in states if isinstance(state, int)] if isinstance(states, list) else []

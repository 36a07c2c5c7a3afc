"""A corpus in object storage or on a hub: its shards are fetched when they are needed, into a bounded cache.

It lies at a URL that fsspec opens (`s3://`, `gs://`, `hf://datasets/…`, `https://`), in the files that `prepare` wrote.
Its index, tokenizer and offsets, 8 bytes for each document, are fetched when it is opened. A shard of token ids is
fetched before its first use, and compared with the sha256 of the index before each process maps it. The processes of a
machine share the cache folder: a lock lets one of them fetch a file, and the least recently used shards make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from gte_deploy.core.errors import GteDeployError, InputError, MissingDependencyError, UnavailableError
from gte_deploy.core.files import cache_folder, write_bytes
from gte_deploy.core.locks import try_lock
from gte_deploy.training.data.corpus import (
    INDEX_FILE,
    TokenCorpus,
    Vocabulary,
    map_tokens,
    open_index,
    read_corpus_vocabulary,
    read_index,
    shard_files,
    verify_file,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FETCHES = 4  # at once, in each process
_PAUSES_S = (1.0, 4.0, 16.0, 60.0, 60.0)  # before the second try of a fetch, and before those after it
_WRONG_PAUSES = 2  # of them, for a file that came, and does not match its sha256
_POLL_S = 0.05
_TRIES = 4  # of a file that another process removes, or that is damaged in the cache


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL, and no folder."""
    return "://" in str(place) and not isinstance(place, Path)


def open_remote_corpus(
    url: str, *, cache: Path | None = None, cache_bytes: int, part: tuple[int, int] = (0, 1), others: Sequence[str] = ()
) -> TokenCorpus:
    """Open a corpus at a URL. Call its `close` at the end.

    Args:
        url: the folder that `prepare` wrote, such as s3://bucket/tokens or hf://datasets/owner/name/tokens.
        cache: folder for what is fetched; None for a folder of this user's cache.
        cache_bytes: bytes that all shards of token ids in the cache may take.
        part: number of this process among those that open the corpus at the same time, and how many these are. Each
            begins with another part of the offsets, so that they share the work.
        others: further files to fetch, where there are any, such as those of the tokenizer.

    Raises:
        InputError: there is no corpus, or a file of it is missing or altered.
        UnavailableError: the storage did not answer, however often it was asked.
        MissingDependencyError: fsspec is not installed.
        GteDeployError: the package for this kind of URL is not installed.
    """
    storage = _Storage(url)
    root = cache_folder() / "corpora" if cache is None else cache
    root.mkdir(parents=True, exist_ok=True)
    folder = _fetch_index(storage, root)
    index = read_index(folder)
    try:
        vocab = read_corpus_vocabulary(index)
        files = [shard_files(shard, vocab) for shard in index["shards"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{url}/{INDEX_FILE} is damaged ({error!r}): run `gte-train prepare` again") from error
    shelf = _Shelf(storage, folder, cache_bytes)
    _fetch_others(storage, folder, others)
    offsets = [(name, *facts) for shard in files for name, facts in shard.items() if name.endswith(".offsets")]
    first = len(offsets) * part[0] // part[1]
    _fetch_all(shelf, offsets[first:] + offsets[:first])
    return open_index(folder, index, files=RemoteTokens(shelf, index["shards"], vocab))


class RemoteTokens:
    """The token ids of each shard, fetched and mapped when they are asked for, or ahead of that.

    Args:
        shelf: the cache of the corpus.
        shards: the shards of its index.
        vocab: its vocabulary.
    """

    def __init__(self, shelf: _Shelf, shards: Sequence[Any], vocab: Vocabulary) -> None:
        self._shelf, self._shards, self._vocab = shelf, shards, vocab
        self._futures: dict[int, Future[NDArray]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch")

    @property
    def cache_bytes(self) -> int:
        """Bytes that the shards of token ids in the cache may take."""
        return self._shelf.cache_bytes

    def __getitem__(self, shard: int, /) -> NDArray:
        with self._lock:
            future = self._future(shard)
        try:
            return future.result()
        except Exception:
            with self._lock:  # the next call tries again
                if self._futures.get(shard) is future:
                    del self._futures[shard]
            raise

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, in this order; forget all others, which may now make room for them."""
        wanted = set(shards)
        self._shelf.keep({self._name(shard) for shard in wanted})
        with self._lock:
            for shard in [shard for shard in self._futures if shard not in wanted]:
                self._futures.pop(shard).cancel()
            for shard in shards:
                self._future(shard)

    def close(self) -> None:
        """End the fetches."""
        self._shelf.closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _future(self, shard: int) -> Future[NDArray]:
        if shard not in self._futures:
            self._futures[shard] = self._pool.submit(self._load, shard)
        return self._futures[shard]

    def _name(self, shard: int) -> str:
        return f"{self._shards[shard]['name']}.tokens"

    def _load(self, shard: int) -> NDArray:
        """Fetch, verify and map a shard."""
        facts = self._shards[shard]
        tokens, _ = shard_files(facts, self._vocab).items()

        def mapped() -> NDArray:
            return map_tokens(self._shelf.folder, facts, self._vocab)

        return self._shelf.use(tokens[0], *tokens[1], vocab=self._vocab, then=mapped)


class _Storage:
    """The files at a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec.core
        except ImportError as error:
            raise MissingDependencyError("fsspec", "train") from error
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # fsspec says which package opens such URLs
            raise GteDeployError(f"{url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise InputError(f"{url} is no URL of a corpus: {error}") from error

    def fetch(self, name: str, target: Path) -> None:
        """Write a file of the corpus to `target`."""
        self._files.get_file(f"{self._root}/{name}", str(target))

    def read(self, name: str) -> bytes:
        """Return a small file of the corpus."""
        return bytes(self._files.cat_file(f"{self._root}/{name}"))


class _Shelf:
    """The folder of one corpus in the cache. Its files are complete: they are fetched aside, verified and renamed."""

    def __init__(self, storage: _Storage, folder: Path, cache_bytes: int) -> None:
        self._storage, self.folder, self.cache_bytes = storage, folder, cache_bytes
        self.closing = threading.Event()
        self._kept: set[str] = set()
        self._parts: dict[str, int] = {}  # the size that each part of this process is going to have

    def keep(self, names: set[str]) -> None:
        """Keep these files from making room for others, and count them as used now."""
        self._kept = names
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder / name)

    def use(self, name: str, size: int, sha256: str, *, vocab: Vocabulary | None, then: Callable[[], T]) -> T:
        """Fetch a file unless it is there, verify it, and return what `then` makes of it."""
        path = self.folder / name
        for attempt in range(_TRIES):
            fetched = self._fetch_if_missing(name, size, sha256, vocab)
            try:
                if not fetched:
                    verify_file(path, size, sha256, vocab=vocab)
                return then()
            except InputError as error:  # altered in the cache, or removed by another process since
                if attempt == _TRIES - 1:
                    raise
                if path.is_file():
                    logger.warning("%s; it is fetched again", error)
                    path.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _fetch_if_missing(self, name: str, size: int, sha256: str, vocab: Vocabulary | None) -> bool:
        path = self.folder / name
        while not path.is_file():
            release = try_lock(self.folder / f".{name}.lock")
            if release is None:  # another process or thread fetches it
                time.sleep(_POLL_S)
                continue
            try:
                if path.is_file():
                    return False
                self._fetch(name, size, sha256, vocab)
                return True
            finally:
                release()
        return False

    def _fetch(self, name: str, size: int, sha256: str, vocab: Vocabulary | None) -> None:
        part, url = self.folder / f".{name}.part", f"{self._storage.url}/{name}"
        if name.endswith(".tokens"):
            self._make_room(part, size)

        def fetch() -> None:
            self._storage.fetch(name, part)
            try:
                verify_file(part, size, sha256, vocab=vocab)
            except InputError as error:
                raise InputError(f"{url} is not the file that the index of the corpus describes: {error}") from error

        try:
            persistently(fetch, url, self.closing)
            part.replace(self.folder / name)
        finally:
            self._parts.pop(part.name, None)
            part.unlink(missing_ok=True)

    def _make_room(self, part: Path, size: int) -> None:
        """Remove the least recently used shards of all corpora in the cache until `size` bytes are free for `part`."""
        root = self.folder.parent
        while (release := try_lock(root / ".room.lock")) is None:
            time.sleep(_POLL_S)
        try:
            sizes: dict[Path, int] = {}
            used: list[tuple[float, Path]] = []
            for path in (*root.glob("*/*.tokens"), *root.glob("*/.*.tokens.part")):
                if path != part and path.suffix == ".part" and _remove_abandoned(path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    sizes[path] = max(stat.st_size, self._parts.get(path.name, 0))
                    if path.suffix != ".part" and not (path.parent == self.folder and path.name in self._kept):
                        used.append((stat.st_mtime, path))
            excess = sum(sizes.values()) + size - self.cache_bytes
            for _, path in sorted(used):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)  # a process that has mapped it keeps it until it is done with it
                excess -= sizes[path]
            if excess > 0:  # what is in use stays, whatever the bound
                logger.warning("%s holds %d bytes more than cache_bytes %d", root, excess, self.cache_bytes)
            self._parts[part.name] = size
            part.touch()
        finally:
            release()


def _remove_abandoned(part: Path) -> bool:
    """Remove an unfinished file that no living process fetches, which would hold its lock; return whether it was one.

    No time is compared: the clock may jump, and a fetch may wait for long.
    """
    release = try_lock(part.with_suffix(".lock"))
    if release is None:
        return False
    part.unlink(missing_ok=True)
    release()
    return True


def persistently(work: Callable[[], T], what: str, closing: threading.Event) -> T:
    """Call `work` until it succeeds, a few times, with growing pauses; return what it returns.

    Raises:
        InputError: the file does not exist or may not be read, or did not match its sha256 each time.
        UnavailableError: the storage failed each time, or `closing` was set.
    """
    for number, pause in enumerate((*_PAUSES_S, None)):
        try:
            return work()
        except FileNotFoundError as error:
            raise InputError(f"{what} does not exist: check the URL, or copy the corpus again") from error
        except PermissionError as error:
            raise InputError(f"{what} may not be read: check the credentials ({error})") from error
        except Exception as error:  # each storage has exceptions of its own
            ours = isinstance(error, GteDeployError)
            said = str(error) if ours else f"{what} could not be fetched: {type(error).__name__}: {error}"
            if pause is None or closing.is_set() or (ours and number == _WRONG_PAUSES):
                if ours:
                    raise
                raise UnavailableError(f"{said}; try again later") from error
            logger.warning("%s; the next try is in %g s", said, pause)
            closing.wait(pause)
    raise AssertionError("unreachable")


def _fetch_index(storage: _Storage, root: Path) -> Path:
    """Fetch the index, and return the folder that the cache has for this state of the corpus."""
    index = _read(storage, INDEX_FILE)
    folder = root / hashlib.sha256(index).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    if not (folder / INDEX_FILE).is_file() or (folder / INDEX_FILE).read_bytes() != index:
        write_bytes(folder / INDEX_FILE, index)
    return folder


def _fetch_others(storage: _Storage, folder: Path, names: Sequence[str]) -> None:
    """Fetch those of the files that exist."""
    for name in names:
        path = folder / name
        if path.is_file():
            continue
        with contextlib.suppress(InputError):
            content = _read(storage, name)
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, content)


def _read(storage: _Storage, name: str) -> bytes:
    """Return a small file of the corpus; see `persistently`."""
    return persistently(partial(storage.read, name), f"{storage.url}/{name}", threading.Event())


def _fetch_all(shelf: _Shelf, files: Iterable[tuple[str, int, str]]) -> None:
    with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") as pool:
        jobs = [pool.submit(partial(shelf.use, *each, vocab=None, then=lambda: None)) for each in files]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            shelf.closing.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

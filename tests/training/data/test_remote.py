"""A corpus at a URL against the same corpus in a folder; storages that fail; a cache that processes share."""

import contextlib
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from urllib.parse import parse_qs

import fsspec
import numpy as np
import pytest

from corpora import random_documents, write_corpus
from gte_deploy.core.errors import GteDeployError, InputError, UnavailableError
from gte_deploy.core.locks import try_lock
from gte_deploy.training.data import remote
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.packing import StepLoader, StepSettings
from gte_deploy.training.data.remote import is_url, open_remote_corpus
from gte_deploy.training.data.sampling import ChunkIndex, Chunking

SHARD_BYTES = 1_200
NUM_SHARDS = 12
ROOM = 6 * SHARD_BYTES  # two windows of two shards, and one more at the end of a window


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve shards of 30 documents of 20 tokens."""
    texts = {f"l{i}": random_documents([20] * 30, seed=i) for i in range(NUM_SHARDS)}
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", texts)


@pytest.fixture
def memory(folder):
    """The corpus in fsspec's memory; the URL."""
    fsspec.filesystem("memory").put(str(folder), "/bucket/tokens", recursive=True)
    yield "memory://bucket/tokens"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, counts the answers, and fails as `faults` says: {name: [kind of each answer, ...]}."""

    counts: Counter[str]
    faults: dict[str, list[str]]

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        type(self).counts[name] += 1
        fault = (self.faults.get(name) or [""]).pop(0)
        if fault == "error":
            self.send_error(503)
        elif fault == "cut":
            path = self.translate_path(self.path)
            content = open(path, "rb").read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:100])
        elif fault == "wait":
            self.send_response(200)
            self.send_header("Content-Length", "1200")
            self.end_headers()
            self.wfile.write(bytes(100))
            self.rfile.read(1)  # until the client goes away
        elif fault == "short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(bytes(100))
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    """An HTTP server of the corpus: its URL, the counts of its answers, its faults."""
    kind = type("OwnHandler", (Handler,), {"counts": Counter(), "faults": {}})
    with serving(kind, folder) as url:
        yield url, kind.counts, kind.faults


@contextlib.contextmanager
def serving(kind, folder):
    """Serve a folder on a port of this machine; the URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(folder))) as running:
        poll = partial(running.serve_forever, poll_interval=0.02)
        threading.Thread(target=poll, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def open_at(tmp_path, monkeypatch):
    """Open a corpus at a URL with a cache in tmp_path, and close it at the end."""
    monkeypatch.setattr(remote, "_PAUSES_S", (0.01, 0.01, 0.01))
    opened = []

    def call(url, *, cache_bytes=ROOM, **options):
        opened.append(open_remote_corpus(url, cache=tmp_path / "cache", cache_bytes=cache_bytes, **options))
        return opened[-1]

    yield call
    for corpus in opened:
        corpus.close()


def held(tmp_path, pattern="*.tokens"):
    return sorted((tmp_path / "cache").glob(f"*/{pattern}"))


def settle(tmp_path, names):
    """Wait until the cache has these files and no fetch is in progress."""
    deadline = time.monotonic() + 20
    while {path.name for path in held(tmp_path)} != set(names) or held(tmp_path, ".*.part"):
        assert time.monotonic() < deadline, (held(tmp_path), names)
        time.sleep(0.01)


# --- what is read -----------------------------------------------------------------------------------------------------


SETTINGS = StepSettings(batch_size=32, token_budget=256, seed=3, masking=Masking())
WEIGHTS = {f"l{i}": float(i > 0) for i in range(NUM_SHARDS)}


@pytest.mark.parametrize("options", [{}, {"source_weights": WEIGHTS}], ids=["all alike", "weighted"])
def test_steps_are_those_of_the_folder_in_a_cache_that_never_overflows(folder, memory, open_at, tmp_path, options):
    room = ROOM if not options else NUM_SHARDS * SHARD_BYTES
    chunking = Chunking(12, **options)
    corpora = TokenCorpus.open(folder), open_at(memory, cache_bytes=room)
    indexes = [ChunkIndex(corpus, chunking, seed=1, shuffle_shards=2) for corpus in corpora]
    indexes[1].require_cache(SETTINGS.batch_size)
    most = 0
    steps = 8 if options else 40  # of 32 out of 720 chunks, so nearly two epochs
    loaders = [StepLoader(index, SETTINGS, stop_step=steps) for index in indexes]
    with loaders[0], loaders[1]:
        for local, fetched in zip(*loaders, strict=True):
            assert len(local.micro_batches) == len(fetched.micro_batches)
            for one, other in zip(local.micro_batches, fetched.micro_batches, strict=True):
                for field in ("input_ids", "position_ids", "cu_seqlens", "masked_positions", "labels"):
                    np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
            sizes = [path.stat().st_size for path in held(tmp_path) if path.exists()]
            most = max(most, sum(sizes))
    assert 0 < most <= room
    if not options:
        assert most < NUM_SHARDS * SHARD_BYTES / 2 + 1


def test_the_shards_of_the_next_window_are_fetched_ahead(memory, open_at, tmp_path):
    index = ChunkIndex(open_at(memory), Chunking(12), seed=1, shuffle_shards=2)
    order = index._orders[0]
    index.fetch_ahead(0, 32, seed=3)
    shards = {shard for window in (0, 1) for shard in order.shards_of(window, seed=3)}
    settle(tmp_path, {f"shard-{shard:05d}.tokens" for shard in shards})
    before = [path.stat().st_ino for path in held(tmp_path)]
    index.fetch_ahead(32, 64, seed=3)  # the same window
    assert [path.stat().st_ino for path in held(tmp_path)] == before


def test_only_what_is_needed_is_fetched_once(server, open_at, tmp_path):
    url, counts, _ = server
    corpus = open_at(url)
    assert corpus.num_tokens == NUM_SHARDS * 600
    assert not any(count for name, count in counts.items() if name.endswith(".tokens"))
    for _ in range(3):
        corpus.tokens(65, 0, 20)
    assert counts["shard-00002.tokens"] == 1 and sum(counts[f"shard-{i:05d}.tokens"] for i in range(12)) == 1
    again = open_at(url)
    again.tokens(65, 0, 20)
    assert (counts["shard-00002.tokens"], counts["shard-00002.offsets"], counts["index.json"]) == (1, 1, 2)


def test_a_corpus_that_changes_at_its_url_is_another_corpus(folder, tmp_path, open_at):
    place = tmp_path / "storage"
    write_corpus(place, random_documents([20] * 3))
    first = open_at(place.as_uri())
    write = random_documents([20] * 4, seed=1)
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    second = open_at(write_corpus(place, write).as_uri())
    assert first.folder != second.folder and (first.num_documents, second.num_documents) == (3, 4)


def test_other_files_come_where_there_are_any(memory, open_at):
    fsspec.filesystem("memory").pipe(f"{memory.removeprefix('memory:/')}/tokenizer/tokenizer.json", b"{}")
    corpus = open_at(memory, others=["tokenizer/tokenizer.json", "tokenizer/vocab.txt"])
    assert [path.name for path in (corpus.folder / "tokenizer").iterdir()] == ["tokenizer.json"]


class HubHandler(Handler):
    """Answers what huggingface_hub asks of a dataset owner/name that has the corpus in its folder tokens."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/owner/name/tree/main"):
            self.answer([self.entry(file) for file in os.listdir(self.directory)])
        elif path in ("/api/datasets/owner/name", "/api/datasets/owner/name/revision/main"):
            self.answer({"id": "owner/name", "sha": "a" * 40, "siblings": []})
        else:
            self.path = path.removeprefix("/datasets/owner/name/resolve/main/tokens")
            super().do_GET()

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        files = [os.path.basename(name) for name in asked if name.startswith("tokens/")]
        self.answer([self.entry(file) for file in files if os.path.exists(os.path.join(self.directory, file))])

    def entry(self, file):
        size = os.path.getsize(os.path.join(self.directory, file))
        return {"type": "file", "path": f"tokens/{file}", "size": size, "oid": "b" * 40}

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


READ = """
import sys
from pathlib import Path
from gte_deploy.training.data.remote import open_remote_corpus
corpus = open_remote_corpus(sys.argv[1], cache=Path(sys.argv[2]), cache_bytes=10**6)
print(corpus.tokens(90, 0, 20).tolist())
corpus.close()
"""


def test_a_dataset_on_the_hub(folder, tmp_path):
    kind = type("OwnHandler", (HubHandler,), {"counts": Counter(), "faults": {}})
    with serving(kind, folder) as url:
        hub = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        found = subprocess.run(
            [sys.executable, "-c", READ, "hf://datasets/owner/name/tokens", str(tmp_path / "cache")],
            env={**os.environ, **hub},
            capture_output=True,
            text=True,
            check=True,
        )
    assert json.loads(found.stdout) == TokenCorpus.open(folder).tokens(90, 0, 20).tolist()
    assert kind.counts["shard-00003.tokens"] == 1


# --- storages that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error", "cut", "short"])
def test_a_fetch_that_breaks_off_is_repeated(server, open_at, caplog, folder, fault):
    url, counts, faults = server
    faults["shard-00003.tokens"] = [fault, fault]
    corpus = open_at(url)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(corpus.tokens(90, 0, 20), TokenCorpus.open(folder).tokens(90, 0, 20))
    assert counts["shard-00003.tokens"] == 3 and caplog.text.count("the next try is in") == 2


def test_a_storage_that_stays_away_is_named(server, open_at):
    url, counts, faults = server
    corpus = open_at(url)
    faults["shard-00003.tokens"] = ["error"] * 9
    with pytest.raises(UnavailableError, match=f"{url}/shard-00003.tokens could not be fetched.*503"):
        corpus.tokens(90, 0, 20)
    assert counts["shard-00003.tokens"] == 4
    faults.clear()
    corpus.tokens(90, 0, 20)  # it comes back


def test_a_file_that_is_another_one_is_fetched_three_times(server, open_at):
    url, counts, faults = server
    corpus = open_at(url)
    faults["shard-00003.tokens"] = ["short"] * 9
    with pytest.raises(InputError, match="is not the file that the index"):
        corpus.tokens(90, 0, 20)
    assert counts["shard-00003.tokens"] == 3


def test_a_truncated_shard_is_refused(memory, open_at, tmp_path):
    files, name = fsspec.filesystem("memory"), f"{memory.removeprefix('memory:/')}/shard-00003.tokens"
    files.pipe(name, files.cat(name)[:-2])
    corpus = open_at(memory)
    corpus.tokens(0, 0, 20)
    with pytest.raises(InputError, match="shard-00003.tokens is not the file.*has 1198 bytes, expected 1200"):
        corpus.tokens(90, 0, 20)
    assert [path.name for path in held(tmp_path)] == ["shard-00000.tokens"] and not held(tmp_path, ".*.part")


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
def test_an_altered_file_is_refused(memory, open_at, kind):
    files, name = fsspec.filesystem("memory"), f"{memory.removeprefix('memory:/')}/shard-00003.{kind}"
    content = bytearray(files.cat(name))
    content[16] ^= 1
    files.pipe(name, bytes(content))
    with pytest.raises(InputError, match=f"{memory}/shard-00003.{kind} is not the file.*sha256"):
        open_at(memory).tokens(90, 0, 20)


def test_a_missing_shard_is_refused_at_once(server, open_at, folder, tmp_path):
    url, counts, _ = server
    corpus = open_at(url)
    gone = folder / "shard-00003.tokens"
    gone.rename(tmp_path / "aside")
    try:
        with pytest.raises(InputError, match="shard-00003.tokens does not exist"):
            corpus.tokens(90, 0, 20)
    finally:
        (tmp_path / "aside").rename(gone)
    assert counts["shard-00003.tokens"] == 1


def test_an_error_while_fetching_ahead_reaches_the_step(memory, open_at):
    fsspec.filesystem("memory").rm(f"{memory.removeprefix('memory:/')}/shard-00003.tokens")
    index = ChunkIndex(open_at(memory, cache_bytes=NUM_SHARDS * SHARD_BYTES), Chunking(12), seed=1)
    with StepLoader(index, SETTINGS) as loader, pytest.raises(InputError, match="shard-00003.tokens does not exist"):
        for _ in loader:
            pass


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://nothing/here", InputError, "nothing/here/index.json does not exist"),
        ("nonsense://a/b", InputError, "no URL of a corpus"),
        ("s3://bucket/tokens", GteDeployError, "s3fs"),
    ],
)
def test_places_that_cannot_be_opened(open_at, url, kind, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(kind, match=message):
        open_at(url)


def test_an_index_that_is_no_index_is_refused(open_at):
    fsspec.filesystem("memory").pipe("/odd/index.json", b'{"format": "gte-token-corpus", "version": 1}')
    with pytest.raises(InputError, match="damaged"):
        open_at("memory://odd")
    fsspec.filesystem("memory").pipe("/odd/index.json", b"{}")
    with pytest.raises(InputError, match="no index of a token corpus"):
        open_at("memory://odd")


def test_a_path_is_no_url(tmp_path):
    assert is_url("s3://bucket/tokens") and is_url("hf://datasets/a/b")
    assert not is_url("tokens") and not is_url(tmp_path)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_file_damaged_in_the_cache_is_fetched_again(server, open_at, tmp_path, caplog):
    url, counts, _ = server
    expected = open_at(url).tokens(0, 0, 20).tolist()
    for name, at in (("shard-00000.tokens", 1_000), ("shard-00000.offsets", 16)):
        [path] = held(tmp_path, name)
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.unlink()  # the first corpus has the old file mapped
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert open_at(url).tokens(0, 0, 20).tolist() == expected
    assert (counts["shard-00000.tokens"], counts["shard-00000.offsets"]) == (2, 2)
    assert caplog.text.count("it is fetched again") == 2


def test_processes_share_what_they_fetch(server, open_at):
    url, counts, _ = server
    corpora = [open_at(url, cache_bytes=NUM_SHARDS * SHARD_BYTES, part=(i, 4)) for i in range(4)]
    start = threading.Barrier(4)

    def read(corpus):
        start.wait()
        for document in range(0, 360, 30):
            corpus.tokens(document, 0, 20)

    threads = [threading.Thread(target=read, args=(corpus,)) for corpus in corpora]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {counts[f"shard-{i:05d}.tokens"] for i in range(NUM_SHARDS)} == {1}
    assert {counts[f"shard-{i:05d}.offsets"] for i in range(NUM_SHARDS)} == {1}


def test_the_least_recently_used_shards_make_room_and_what_is_mapped_stays(memory, open_at, tmp_path, folder):
    corpus = open_at(memory, cache_bytes=3 * SHARD_BYTES)
    views = [corpus.tokens(30 * shard, 0, 20) for shard in range(3)]
    for age, path in enumerate(reversed(held(tmp_path))):
        os.utime(path, (1_000 + age, 1_000 + age))
    corpus.tokens(30 * 3, 0, 20)
    assert [path.name for path in held(tmp_path)] == [f"shard-{i:05d}.tokens" for i in (0, 1, 3)]
    local = TokenCorpus.open(folder)
    for shard, view in enumerate(views):
        np.testing.assert_array_equal(view, local.tokens(30 * shard, 0, 20))


def test_shards_that_are_needed_do_not_make_room(memory, open_at, tmp_path):
    corpus = open_at(memory, cache_bytes=3 * SHARD_BYTES)
    corpus.files.fetch_ahead([0, 1])
    settle(tmp_path, ["shard-00000.tokens", "shard-00001.tokens"])
    for path in held(tmp_path):
        os.utime(path, (1_000, 1_000))
    for shard in (4, 5):
        corpus.tokens(30 * shard, 0, 20)
    assert [path.name for path in held(tmp_path)] == [f"shard-{i:05d}.tokens" for i in (0, 1, 5)]


def test_a_bound_that_cannot_be_kept_is_told(memory, open_at, tmp_path, caplog):
    corpus = open_at(memory, cache_bytes=SHARD_BYTES)
    corpus.files.fetch_ahead([0])
    settle(tmp_path, ["shard-00000.tokens"])
    with caplog.at_level(logging.WARNING):
        corpus.tokens(30, 0, 20)
    assert f"{SHARD_BYTES} bytes more than cache_bytes {SHARD_BYTES}" in caplog.text


def test_what_a_killed_fetch_left_is_written_over_or_removed(memory, open_at, tmp_path):
    corpus = open_at(memory)
    for name in ("shard-00000", "shard-00007"):
        (corpus.folder / f".{name}.tokens.part").write_bytes(b"half")
    corpus.tokens(0, 0, 20)
    assert [path.name for path in held(tmp_path)] == ["shard-00000.tokens"] and not held(tmp_path, ".*.part")


def test_what_a_living_process_fetches_stays_whatever_the_clock_says(memory, open_at, tmp_path, monkeypatch):
    corpus = open_at(memory)
    part = corpus.folder / ".shard-00007.tokens.part"
    part.write_bytes(b"half")
    os.utime(part, (1_000, 1_000))
    release = try_lock(part.with_suffix(".lock"))  # as its process holds it
    now = time.time()
    for shard, years in enumerate((-50, 50)):
        monkeypatch.setattr(time, "time", lambda years=years: now + years * 31_557_600)
        corpus.tokens(30 * shard, 0, 20)
        assert part.read_bytes() == b"half"
    release()
    corpus.tokens(60, 0, 20)
    assert not part.exists()


def test_the_next_process_fetches_what_a_killed_one_had_begun(server, open_at, tmp_path, folder):
    url, counts, faults = server
    faults["shard-00003.tokens"] = ["wait"]
    process = subprocess.Popen([sys.executable, "-c", READ, url, str(tmp_path / "cache")])
    deadline = time.monotonic() + 30
    while not counts["shard-00003.tokens"]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert held(tmp_path, ".shard-00003.tokens.lock")
    process.kill()
    process.wait()
    np.testing.assert_array_equal(open_at(url).tokens(90, 0, 20), TokenCorpus.open(folder).tokens(90, 0, 20))
    assert counts["shard-00003.tokens"] == 2 and not held(tmp_path, ".*")


@pytest.mark.parametrize(("width", "needed"), [(None, 12), (1, 4), (2, 6), (4, 12)])
def test_a_cache_that_cannot_hold_a_step_is_refused(memory, open_at, width, needed):
    # A step of 60 samples can begin anywhere in a window of 60 or more, and the window after it is fetched, too.
    corpora = [open_at(memory, cache_bytes=needed * SHARD_BYTES - less) for less in (0, 1)]
    enough, short = [ChunkIndex(corpus, Chunking(12), seed=1, shuffle_shards=width) for corpus in corpora]
    batch_size = 60 if width != 1 else 120
    enough.require_cache(batch_size)
    with pytest.raises(InputError, match=rf"up to {needed * SHARD_BYTES} bytes .*shuffle_shards"):
        short.require_cache(batch_size)


def test_a_corpus_in_a_folder_needs_no_cache(folder):
    ChunkIndex(TokenCorpus.open(folder), Chunking(12), seed=1).require_cache(10**9)


def test_closing_ends_a_fetch_that_waits_for_its_next_try(server, open_at, monkeypatch):
    url, _, faults = server
    corpus = open_at(url)
    monkeypatch.setattr(remote, "_PAUSES_S", (60.0,))
    faults["shard-00003.tokens"] = ["error"] * 9
    corpus.files.fetch_ahead([3])
    time.sleep(0.3)
    start = time.monotonic()
    corpus.close()
    assert time.monotonic() - start < 10

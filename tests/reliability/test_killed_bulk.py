"""kill -9 of a run over files: repeated, it ends in the same bytes, and no finished part is computed again."""

import json
import random
import re
import signal
import time

import pytest

from fork_server import ForkServer, spread, stages_of
from runtime_models import make_texts

ROWS, SHARD_ROWS, UNREADABLE = 40, 8, 3

BULK = """
import json, sys
from pathlib import Path
from fork_server import die_at, serve
import numpy, onnxruntime, pyarrow.parquet
import gte_deploy.backends.onnxruntime, gte_deploy.text.tokenization
from gte_deploy.bulk import BulkOptions, encode_files

def work(source, output, folder, stage="", stages=""):
    die_at(folder, stage, stages)
    options, engine = BulkOptions(shard_rows=int(sys.argv[2])), {"backend": "onnx", "num_threads": 1}
    summary = encode_files(source, output, model=sys.argv[1], options=options, load_options=engine)
    Path(folder).with_suffix(".summary").write_text(json.dumps(summary.to_json()))

serve(work)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("source") / "in.jsonl"
    texts = [None if number % 15 == 7 else text for number, text in enumerate(make_texts(ROWS, seed=3, most_words=12))]
    file.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    assert texts.count(None) == UNREADABLE
    return file


@pytest.fixture(scope="module")
def encoding(bundle_of, word_checkpoints):
    server = ForkServer(BULK, bundle_of(word_checkpoints["embed"]), SHARD_ROWS)
    yield server
    server.close()


class BulkRun:
    """Runs over one source into `out.KIND` in a folder of their own."""

    def __init__(self, server, source, folder, kind):
        self.server, self.folder = server, folder
        folder.mkdir()
        self.output = folder / f"out.{kind}"
        self.request = {"source": source, "output": self.output, "folder": folder}

    def contents(self):
        return {file.name: file.read_bytes() for file in self.folder.iterdir() if file.is_file()}

    def parts(self):
        """Rows with vectors in the finished parts."""
        files = self.folder.glob("out.*.parts/part-*/part.json")
        return sum(json.loads(file.read_text())["rows"] for file in files)

    def finish(self):
        """Run to the end, and return the summary."""
        assert self.server.run(**self.request) == 0
        return json.loads(self.folder.with_suffix(".summary").read_text())


@pytest.fixture(scope="module")
def undisturbed(encoding, source, tmp_path_factory):
    """`undisturbed(kind)`: the files of a run that nothing disturbs, its stages, and its seconds."""
    known = {}

    def undisturbed(kind):
        if kind not in known:
            run = BulkRun(encoding, source, tmp_path_factory.mktemp("undisturbed") / kind, kind)
            names, started = run.folder.with_suffix(".stages"), time.monotonic()
            assert encoding.run(**run.request, stages=names) == 0
            known[kind] = run.contents(), stages_of(names), time.monotonic() - started
            assert sorted(known[kind][0]) == [run.output.name, f"{run.output.name}.failures.jsonl"]
            assert not [path for path in run.folder.iterdir() if path.is_dir()]
        return known[kind]

    return undisturbed


def check_resumed(run, expected):
    """After a kill: the output is not there, or whole; the next run keeps every part, and ends in the same bytes."""
    if run.output.exists():
        assert run.contents()[run.output.name] == expected[run.output.name]
    kept = run.parts()
    summary = run.finish()
    assert summary["resumed_rows"] == kept and summary["rows"] == ROWS - UNREADABLE
    assert run.contents() == expected
    assert not [path for path in run.folder.iterdir() if path.is_dir()], "the parts are gone"


def kill_at_stages(encoding, source, undisturbed, folder, kind, attempts, most):
    expected, stages, _ = undisturbed(kind)
    text = "\n".join(stages)
    for named in (r"os.mkdir out.\w+.parts$", r"open .*journal", r"open .*part-N.*part.json", r"os.rename .*part-N",
                  r"open .*parts/\.out", r"os.rename .*parts/\.out", r"shutil.rmtree out.\w+.parts$"):  # fmt: skip
        assert re.search(named, text, re.MULTILINE), (named, text)
    chosen = spread(stages, most)
    attempts("runs over files killed at a stage, and repeated", len(chosen))
    for number, stage in enumerate(chosen):
        run = BulkRun(encoding, source, folder / str(number), kind)
        assert encoding.run(**run.request, stage=stage) == -signal.SIGKILL, stage
        check_resumed(run, expected)


@pytest.mark.parametrize("kind", ["parquet"])
def test_files_killed_at_named_stages(encoding, source, undisturbed, tmp_path, kind, attempts):
    kill_at_stages(encoding, source, undisturbed, tmp_path, kind, attempts, most=12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "npy", "jsonl"])
def test_files_killed_at_every_stage(encoding, source, undisturbed, tmp_path, kind, attempts):
    kill_at_stages(encoding, source, undisturbed, tmp_path, kind, attempts, most=1000)


def kill_at_random(encoding, source, undisturbed, folder, kind, attempts, runs):
    expected, _, seconds = undisturbed(kind)
    rng, struck = random.Random(f"{kind} {runs}"), 0
    for number in range(runs):
        run = BulkRun(encoding, source, folder / str(number), kind)
        for _ in range(3):  # the later ones go on from what the earlier left
            struck += encoding.killed_after(encoding.start(**run.request), rng.uniform(0, seconds))
        check_resumed(run, expected)
    attempts("runs over files killed at random moments, and repeated", struck)
    assert struck >= runs, f"{struck} of {3 * runs} kills struck"


def test_files_killed_at_random_moments(encoding, source, undisturbed, tmp_path, attempts):
    kill_at_random(encoding, source, undisturbed, tmp_path, "npy", attempts, runs=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "npy", "jsonl"])
def test_files_killed_at_many_random_moments(encoding, source, undisturbed, tmp_path, kind, attempts):
    kill_at_random(encoding, source, undisturbed, tmp_path, kind, attempts, runs=25)


def test_an_old_output_stays_until_the_new_one_is_whole(encoding, source, undisturbed, tmp_path):
    expected, stages, _ = undisturbed("npy")
    last = next(stage for stage in stages if re.match(r"os.rename .*parts/\.out", stage))
    run = BulkRun(encoding, source, tmp_path / "run", "npy")
    run.output.write_bytes(b"old")
    for stage in (*spread(stages[: stages.index(last)], 4), last):
        assert encoding.run(**run.request, stage=stage) == -signal.SIGKILL
        assert run.output.read_bytes() == b"old", stage
    assert run.finish()["resumed_rows"] == ROWS - UNREADABLE, "all was done but the last rename"
    assert run.contents() == expected

"""Killed runs go on where they were: no row is lost or repeated, and the vectors are those of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.bulk.parts import PartsFolder
from gte_deploy.core.errors import InputError
from runtime_models import make_texts

ROWS = 600


@pytest.fixture(scope="module")
def bundle(word_checkpoints, bundle_of):
    """For processes: a bundle loads without importing torch."""
    return bundle_of(word_checkpoints["embed"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("source") / "docs.jsonl"
    rows = [{"id": i, "text": text if i % 97 else None} for i, text in enumerate(make_texts(ROWS, seed=3))]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def command(bundle, source, output, *more):
    arguments = ["encode", "-m", bundle, "--input", source, "--output", output, "--shard-rows", 20, *more]
    return [sys.executable, "-m", "gte_deploy", *map(str, arguments)]


def finished(output):
    return len(list(output.with_name(f"{output.name}.parts").glob("part-*")))


def wait_for_parts(process, output, count):
    until = time.monotonic() + 120
    while process.poll() is None and finished(output) < count and time.monotonic() < until:
        time.sleep(0.002)


def test_a_run_that_is_killed_again_and_again(bundle, source, tmp_path):
    """SIGKILL at some moment after each few parts, also while one is written."""
    whole, output = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    run = command(bundle, source, whole, "--max-failures", ROWS, "--json")
    summary = json.loads(subprocess.run(run, capture_output=True, check=True, timeout=120).stdout)
    assert summary["rows"] + summary["failures"] == ROWS and summary["resumed_rows"] == 0
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(
            command(bundle, source, output, "--max-failures", ROWS, "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        wait_for_parts(process, output, finished(output) + 4 + attempt % 5)
        time.sleep(0.003 * (attempt % 7))
        process.kill()
        out, err = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
        assert not output.exists()
    assert kills >= 3
    last = json.loads(out)
    assert 0 < last["resumed_rows"] <= last["rows"] == summary["rows"] and last["failures"] == summary["failures"]
    left, right = (pyarrow.parquet.read_table(file) for file in (whole, output))
    assert left.equals(right), "the same rows, columns and bytes of vectors"
    assert left.column("id").to_pylist() == [i for i in range(ROWS) if i % 97]
    kept = [file.with_name(f"{file.name}.failures.jsonl").read_text() for file in (whole, output)]
    assert kept[0] == kept[1] and kept[0].count("\n") == summary["failures"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.parquet", "out.parquet.failures.jsonl", "whole.parquet", "whole.parquet.failures.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_and_says_how_to_go_on(number, bundle, source, tmp_path):
    output = tmp_path / "out.npy"
    process = subprocess.Popen(command(bundle, source, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_parts(process, output, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert b"out.npy.parts keeps what is done; repeat the command to go on" in err and b"Traceback" not in err
    assert not output.exists() and finished(output) >= 2


class Stop(Exception):
    pass


def interrupted(source, output, model, after=3, **options):
    """A run that ends after some parts."""
    write, count = PartsFolder.write, iter(range(after))

    def some(self, *arguments):
        if next(count, None) is None:
            raise Stop
        return write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartsFolder, "write", some)
        with pytest.raises(Stop):
            encode_files(source, output, model=model, options=BulkOptions(shard_rows=20), **options)


def test_what_has_changed_is_named(embedder, source, tmp_path, word_checkpoints):
    output = tmp_path / "out.npy"
    interrupted(source, output, embedder)
    assert finished(output) == 3

    def again(**changes):
        return encode_files(source, output, **{"model": embedder, "options": BulkOptions(shard_rows=20), **changes})

    for changes, message in (
        ({"options": BulkOptions(shard_rows=21)}, r"options: shard_rows \(there 20, here 21\)"),
        ({"encode_options": {"precision": "int8"}}, r'encode: precision \(there null, here "int8"\)'),
        ({"model": word_checkpoints["classify"]}, "model"),
        ({"model": word_checkpoints["embed"], "load_options": {"backend": "torch"}}, r'load: backend .*"torch"'),
    ):
        with pytest.raises(InputError, match=f"unfinished run with another {message}.*--restart"):
            again(**changes)
    assert finished(output) == 3
    summary = again()
    assert summary.resumed_rows == sum(1 for i in range(60) if i % 97) and summary.rows + summary.failures == ROWS


def test_another_engine_may_go_on_with_a_warning(embedder, source, tmp_path, caplog):
    """As on a machine for which another engine is the default."""
    output = tmp_path / "out.npy"
    interrupted(source, output, embedder)
    for file in output.with_name("out.npy.parts").glob("part-*/part.json"):
        file.write_text(file.read_text().replace("torch fp32", "onnx fp32"))
    encode_files(source, output, model=embedder, options=BulkOptions(shard_rows=20))
    assert "computed by onnx fp32 cpu, and this run goes on with torch fp32 cpu" in caplog.text


def test_a_changed_input_is_another_run(embedder, tmp_path):
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("\n".join(make_texts(100)))
    interrupted(source, output, embedder)
    source.write_text("\n".join(make_texts(101)))
    with pytest.raises(InputError, match="another input: bytes .*--restart"):
        encode_files(source, output, model=embedder, options=BulkOptions(shard_rows=20))
    summary = encode_files(source, output, model=embedder, options=BulkOptions(shard_rows=20, restart=True))
    assert summary.resumed_rows == 0 and summary.rows == len(np.load(output)) == 101


def test_a_run_that_was_killed_while_it_joined(embedder, source, tmp_path, monkeypatch):
    output = tmp_path / "out.parquet"
    monkeypatch.setattr("gte_deploy.bulk.joining._put", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        encode_files(source, output, model=embedder)
    monkeypatch.undo()
    summary = encode_files(source, output, model=embedder)
    assert summary.resumed_rows == summary.rows == len(pyarrow.parquet.read_table(output)) and summary.tokens == 0
    assert not output.with_name("out.parquet.parts").exists()


@pytest.mark.parametrize("removed", [0, 2, 6])
def test_a_run_that_was_killed_while_it_removed_its_parts(embedder, source, tmp_path, monkeypatch, removed):
    """Its output is there; a repetition takes over the parts that are left, and gives the same output."""
    output, options, rename, hidden = tmp_path / "out.npy", BulkOptions(shard_rows=100), Path.rename, []

    def stops(self, target):
        if self.name.startswith("part-"):
            if len(hidden) == removed:
                raise Stop
            hidden.append(self)
        return rename(self, target)

    def stops_at_the_folder(folder, **_):
        if folder.name == "out.npy.parts" and len(hidden) < 7:
            hidden.append(folder)
            raise Stop

    monkeypatch.setattr(Path, "rename", stops)
    monkeypatch.setattr("gte_deploy.bulk.parts.shutil.rmtree", stops_at_the_folder)
    with pytest.raises(Stop):
        encode_files(source, output, model=embedder, options=options)
    monkeypatch.undo()
    whole = output.read_bytes()
    assert finished(output) == 6 - removed
    summary = encode_files(source, output, model=embedder, options=options)
    assert output.read_bytes() == whole and summary.rows + summary.failures == ROWS
    assert (summary.resumed_rows == 0) == (removed == 6)
    assert not output.with_name("out.npy.parts").exists()


def test_two_runs_do_not_write_one_output(embedder, source, tmp_path):
    output, refused = tmp_path / "out.npy", []

    def report(state):
        if not refused:
            with pytest.raises(InputError, match="another process writes"):
                encode_files(source, output, model=embedder)
            refused.append(state)

    encode_files(source, output, model=embedder, report=report)
    assert refused and len(np.load(output)) == ROWS - 7


def test_damaged_parts_are_named(embedder, source, tmp_path):
    output = tmp_path / "out.npy"
    interrupted(source, output, embedder)
    (output.with_name("out.npy.parts") / "part-000001" / "part.json").write_text("{}")
    with pytest.raises(InputError, match=r"part.json is not of a finished part.*--restart"):
        encode_files(source, output, model=embedder, options=BulkOptions(shard_rows=20))
    (output.with_name("out.npy.parts") / "journal.json").write_text("{")
    with pytest.raises(InputError, match=r"journal.json is not valid JSON.*--restart"):
        encode_files(source, output, model=embedder, options=BulkOptions(shard_rows=20))


def test_progress(embedder, source, tmp_path):
    states = []
    encode_files(source, tmp_path / "out.npy", model=embedder, options=BulkOptions(shard_rows=50), report=states.append)
    last = states[-1]
    assert last.rows == ROWS and last.failures == 7 and last.share == 1.0 and last.seconds_left == 0
    assert last.tokens > ROWS and last.tokens_per_second == pytest.approx(last.tokens / last.seconds)
    assert [state.share for state in states] == sorted(state.share for state in states)
    assert "600 rows (7 failed), 100%" in last.describe()


def memory_of(source, output, bundle):
    """The most memory of a run in bytes."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "gte_deploy",
            "encode",
            "-m",
            bundle,
            "-i",
            source,
            "-o",
            output,
            "--shard-rows",
            "1000",
        ],
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_memory_does_not_grow_with_the_input(kind, bundle, tmp_path):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    lines = [json.dumps({"text": text, "more": "x" * 2000}) + "\n" for text in make_texts(4000, most_words=8)]
    few.write_text("".join(lines))
    with many.open("w") as file:
        for _ in range(12):
            file.writelines(lines)
    assert many.stat().st_size > 90e6
    small, large = (memory_of(file, tmp_path / f"{file.stem}.{kind}", bundle) for file in (few, many))
    assert large < small + 60e6

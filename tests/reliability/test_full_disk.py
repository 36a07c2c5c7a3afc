"""A disk that is full at each write, or read only: an error that names the file, no old data lost, and the next run.

The disk is a real one, with room for so many pages of 4 kB, or so many files, and one more at each try.
"""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import gte_deploy
from gte_deploy import cli
from gte_deploy.backends import picks
from gte_deploy.backends.bf16_speed import bf16_speed
from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.bundle.manifest import GraphEntry, Manifest, open_bundle
from gte_deploy.core import exit_codes
from gte_deploy.core.arrays import array_writer
from gte_deploy.core.errors import GteDeployError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.bundle import writer
from runtime_models import make_texts
from small_disk import PAGE, mounted

MOST_STEPS = 400


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder) as disk:
        yield disk


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def told(error: BaseException, folder: Path) -> None:
    """The error is one of a full disk, and names a file there."""
    assert isinstance(error, (OSError, GteDeployError)), repr(error)
    text = f"{error}"
    assert os.strerror(errno.ENOSPC) in text and str(folder) in text, text


@pytest.fixture
def fill(disk, attempts):
    """`fill(kind, prepare, work, after_failure, steps)`: do work with more and more room until it succeeds.

    Args:
        kind: "pages" or "files".
        prepare: makes what is there before, on an empty disk.
        work: what is done.
        after_failure: called when there is room again, after each failure.
        steps: the numbers of pages or files that are free.

    Returns:
        How often the disk was full.
    """

    def fill(kind, prepare, work, after_failure, steps=range(MOST_STEPS)):
        for full, free in enumerate(steps):
            disk.leave()
            clear(disk.folder)
            prepare()
            disk.leave(**{kind: free})
            try:
                work()
            except Exception as error:
                told(error, disk.folder)
            else:
                assert full >= 2, "the disk was never full"
                attempts("writes to a full disk", full)
                return full
            disk.leave()
            after_failure()
        raise AssertionError(f"{free} {kind} are not enough")

    return fill


KINDS = pytest.mark.parametrize("kind", ["pages", "files"])


def test_one_file(disk, fill):
    """Also one that numpy writes: its own error would not say what is wrong."""
    array = np.arange(6000, dtype=np.float32)
    file = disk.folder / "file"
    for new, write in (
        (b"n" * 20_000, lambda: write_text(file, "n" * 20_000)),
        (None, lambda: write_with(file, array_writer(array))),
    ):

        def is_old():
            assert contents(disk.folder) == {"file": b"old"}

        assert fill("pages", lambda: file.write_bytes(b"old"), write, is_old) >= 3
        if new is None:
            np.testing.assert_array_equal(np.load(file), array)
        else:
            assert file.read_bytes() == new
    with pytest.raises(OSError, match="file"):
        disk.leave(files=0)
        write_text(file, "new")


@pytest.fixture(scope="module")
def embedder(word_checkpoints, bundle_of):
    with gte_deploy.load(bundle_of(word_checkpoints["embed"]), backend="onnx", num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("source") / "in.jsonl"
    texts = [None if number == 7 else text for number, text in enumerate(make_texts(12, seed=5, most_words=8))]
    file.write_text("".join(json.dumps({"n": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    return file


@KINDS
@pytest.mark.parametrize("form", ["parquet", "npy", "jsonl"])
def test_vectors_of_files(disk, embedder, source, tmp_path, form, kind, fill):
    """What was finished stays, and the same call goes on from it to the bytes of an unbroken run."""
    output, whole = disk.folder / f"out.{form}", tmp_path / f"out.{form}"
    options = BulkOptions(shard_rows=4)
    encode_files(source, whole, model=embedder, options=options)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def encode():
        return encode_files(source, output, model=embedder, options=options)

    def goes_on():
        assert output.read_bytes() == b"old"
        finished = [json.loads(file.read_text())["rows"] for file in disk.folder.glob("*.parts/part-*/part.json")]
        assert encode().resumed_rows == sum(finished)
        assert contents(disk.folder) == expected

    assert fill(kind, lambda: output.write_bytes(b"old"), encode, goes_on) >= 5


def test_the_command_says_which_file(disk, embedder, capsys, tmp_path):
    output = disk.folder / "out.npy"
    encode = ["encode", "-m", str(embedder.path), "--backend", "onnx", "-o", str(output)]
    disk.leave(pages=0)
    for words in (["a river"] * 64, ["-i", str(tmp_path / "in.txt")]):
        (tmp_path / "in.txt").write_text("a river\n" * 64)
        code = cli.main([*encode, *words])
        out, err = capsys.readouterr()
        assert (code, out) == (exit_codes.FAILURE, "")
        assert str(disk.folder) in err and "No space left on device" in err and "Traceback" not in err
    disk.leave()
    assert cli.main([*encode, "-i", str(tmp_path / "in.txt")]) == exit_codes.OK
    assert np.load(output).shape[0] == 64 and list(contents(disk.folder)) == ["out.npy"]


def write_bundle(target: Path, mark: str) -> None:
    spec = ModelSpec(task="embed", max_length=64, vocab_size=256, hidden_size=32, pad_token_id=0)
    with writer.staging(target, force=True) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx/model.onnx").write_bytes(b"\x12" + bytes([len(mark)]) + mark.encode())  # producer_name
        (folder / "onnx/weights").write_bytes(mark[:1].encode() * 20_000)
        graphs = {"onnxruntime": GraphEntry("onnx/model.onnx", 20, (), (), {})}
        writer.seal(folder, Manifest(spec, "fp32", graphs, files={}, versions={}, source={"name": mark}))
        writer.publish(folder, target, force=True)


@KINDS
def test_a_bundle(disk, kind, fill):
    """The old bundle stays as it is, and nothing lies beside it."""
    target = disk.folder / "bundle"

    def is_old():
        assert open_bundle(target).source["name"] == "old"
        assert [path.name for path in disk.folder.iterdir()] == ["bundle"]

    assert fill(kind, lambda: write_bundle(target, "old"), lambda: write_bundle(target, "new"), is_old) >= 4
    assert open_bundle(target).source["name"] == "new"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_whole_export(disk, tmp_path, precision, fill):
    """The disk fills while the graphs, their copies for INT8, the report or the manifest are written."""
    from factories import make_checkpoint
    from gte_deploy.exporters.export import export

    old, new = (make_checkpoint(tmp_path / name, seed=seed, layers=1) for name, seed in (("old", 0), ("new", 3)))
    bundles = [tmp_path / "old-bundle", tmp_path / "new-bundle"]
    for checkpoint, bundle in zip((old, new), bundles, strict=True):
        export(checkpoint, bundle, max_length=32, precision=precision)
    target = disk.folder / "bundle"
    needed = sum(path.stat().st_size // PAGE + 1 for path in bundles[1].rglob("*"))

    def is_old():
        assert contents(target) == contents(bundles[0])
        assert [path.name for path in disk.folder.iterdir()] == ["bundle"]

    steps = [*(round(needed * share) for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)), 3 * needed]
    fill(
        "pages",
        lambda: shutil.copytree(bundles[0], target),
        lambda: export(new, target, max_length=32, precision=precision, force=True),
        is_old,
        steps,
    )
    assert open_bundle(target).source["name"] == "new"


@KINDS
def test_a_checkpoint_of_a_training_run(disk, kind, fill):
    import torch

    from gte_deploy.training.state import CheckpointStore, TensorPart, TrainingState

    store = CheckpointStore(disk.folder / "checkpoints", keep=5)
    part = {"w": TensorPart.whole(torch.zeros(5000))}

    def save(step):
        state = TrainingState(
            stage=0, stage_name="s", step=step, stage_steps=9, total_step=step, tokens=0, seconds=0.0, seed=0,
            learning_rate=0.1, recipe={}, model_config={}, corpus="", versions={},
        )  # fmt: skip
        store.save(state, model=part, optimizer=part)

    def goes_on():
        assert [path.name for path in store.folder.iterdir()] == ["00-s-00000001"]
        assert store.latest().state.step == 1
        save(2)
        assert store.latest().state.step == 2

    assert fill(kind, lambda: save(1), lambda: save(2), goes_on) >= 3


@KINDS
def test_a_corpus(disk, kind, tiny_mlm, tmp_path, fill):
    from gte_deploy.training.data.prepare import prepare

    (tmp_path / "t.txt").write_text("\n\n".join("w5 w6 w7 w8 " * 400 for _ in range(9)))
    prepare([str(tmp_path / "t.txt")], tmp_path / "whole", tokenizer=tiny_mlm)
    output = disk.folder / "out"

    def run():
        prepare([str(tmp_path / "t.txt")], output, tokenizer=tiny_mlm)

    def goes_on():
        assert not output.exists()
        run()
        assert contents(output) == contents(tmp_path / "whole")
        assert [path.name for path in disk.folder.iterdir()] == ["out"]

    assert fill(kind, lambda: None, run, goes_on) >= 4


def test_the_cache(disk, monkeypatch, caplog, fill):
    """A pick that cannot be recorded is told; what is measured for each process anew is not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.folder))
    pick = picks.Pick("onnx", None, {"onnx": {str(number): 0.5 for number in range(400)}}, "2026-01-01", {})
    other = picks.Pick("openvino", None, {}, "2026-01-01", {})

    def is_old():
        assert picks.lookup("sum") == other and not caplog.records

    for kind in ("pages", "files"):
        if kind == "pages":
            fill(kind, lambda: picks.save("sum", other), lambda: picks.save("sum", pick), is_old)
        else:
            fill(kind, lambda: None, lambda: picks.save("sum", pick), lambda: None)
        assert picks.lookup("sum") == pick
    clear(disk.folder)
    disk.leave(pages=0, files=0)
    bf16_speed()


# --- read-only disks, and folders that are not there ------------------------------------------------------------------


def test_a_read_only_disk(disk, embedder, source, tiny_mlm, tmp_path, monkeypatch, capsys):
    """Reading goes on; every write is refused by name."""
    bundle = shutil.copytree(embedder.path, disk.folder / "bundle")
    old = disk.folder / "old.npy"
    old.write_bytes(b"old")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.folder / "cache"))
    disk.be_read_only()
    before = contents(disk.folder)
    with gte_deploy.load(bundle, num_threads=1) as model:
        np.testing.assert_allclose(model.encode("a river"), embedder.encode("a river"), atol=1e-5)
    (tmp_path / "t.txt").write_text("a text")
    for words in (
        ["gte-deploy", "encode", "-m", bundle, "a river", "-o", disk.folder / "new.npy"],
        ["gte-deploy", "encode", "-m", bundle, "a river", "-o", old],
        ["gte-deploy", "encode", "-m", bundle, "-i", source, "-o", disk.folder / "new.npy"],
        ["gte-deploy", "encode", "-m", bundle, "-i", source, "-o", old],
        ["gte-export", tiny_mlm, disk.folder / "new"],
        ["gte-export", tiny_mlm, bundle, "--force"],
        ["gte-export", "convert", tiny_mlm, disk.folder / "converted", "--layout", "native"],
        ["gte-train", "prepare", tmp_path / "t.txt", "--tokenizer", tiny_mlm, "-o", disk.folder / "corpus"],
    ):
        code, err = run_command_line(words, capsys)
        assert code == exit_codes.FAILURE, err
        assert "Read-only file system" in err and str(disk.folder) in err, err
    assert contents(disk.folder) == before


def run_command_line(words, capsys) -> tuple[int, str]:
    from gte_deploy.exporters import cli as export_cli
    from gte_deploy.training import cli as train_cli

    mains = {"gte-deploy": cli.main, "gte-export": export_cli.main, "gte-train": train_cli.main}
    program, *arguments = map(str, words)
    try:
        code = mains[program](arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return code, err


MISSING = [
    ("gte-deploy", "encode", "a river", "-o", "nowhere/new.npy"),
    ("gte-deploy", "encode", "-i", "t.txt", "-o", "nowhere/new.npy"),
    ("gte-deploy", "encode", "-i", "nowhere/t.txt", "-o", "new.npy"),
    ("gte-deploy", "encode", "-i", "nowhere/t.txt"),
    ("gte-deploy", "encode", "-m", "nowhere/model", "a river"),
    ("gte-deploy", "compare", "nowhere/a", "nowhere/b"),
    ("gte-deploy", "compare", "bundle", "bundle", "--html", "nowhere/c.html"),
    ("gte-deploy", "verify", "nowhere/bundle"),
    ("gte-deploy", "info", "nowhere/bundle"),
    ("gte-deploy", "bench", "nowhere/bundle"),
    ("gte-deploy", "serve", "./nowhere/bundle"),
    ("gte-deploy", "push", "nowhere/bundle", "a/b"),
    ("gte-export", "nowhere/model", "out"),
    ("gte-export", "check", "nowhere/repository"),
    ("gte-export", "convert", "nowhere/model", "out", "--layout", "native"),
    ("gte-export", "adopt", "nowhere/model.plan", "nowhere/checkpoint"),
    ("gte-export", "--calibration", "nowhere/t.txt", "--precision", "int8"),
    ("gte-train", "prepare", "nowhere/t.txt", "-o", "out"),
    ("gte-train", "run", "gte-en-mlm-tiny", "--data", "nowhere/data", "-o", "out"),
    ("gte-train", "run", "nowhere/recipe.yaml", "--data", "nowhere/data", "-o", "out"),
    ("gte-train", "estimate", "gte-en-mlm-tiny", "--data", "nowhere/data"),
    ("gte-train", "export", "nowhere/run", "out"),
    ("gte-train", "embed", "--data", "nowhere/pairs.csv", "-o", "out"),
    ("gte-train", "retrieval", "nowhere/model", "--data", "nowhere/set"),
    ("gte-train", "glue", "nowhere/model", "-o", "out"),
]


@pytest.mark.parametrize("words", MISSING, ids=" ".join)
def test_what_is_missing_is_named_and_nothing_is_made(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("a river\n")
    monkeypatch.chdir(tmp_path)
    code, err = run_command_line(words, capsys)
    assert code in (exit_codes.FAILURE, exit_codes.USAGE) and "nowhere" in err, err
    assert len(err.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_outputs_of_exports_get_the_folders_that_they_need(tmp_path):
    """As `mkdir -p` makes them."""
    target = tmp_path.joinpath(*itertools.repeat("deeper", 3), "bundle")
    write_bundle(target, "new")
    assert open_bundle(target).source["name"] == "new"

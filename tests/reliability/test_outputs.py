"""What a command is told to write to stays what it is: a device, a pipe, a link, and the mode of a file."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from gte_deploy.cli import main
from gte_deploy.core.exit_codes import FAILURE, OK, USAGE
from null_device import make_null_device

TEXTS = ["a river", "two rivers"]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    return file


@pytest.fixture
def device(tmp_path):
    return make_null_device(tmp_path / "null")


def encode(*words):
    return main(["encode", "--quiet", *map(str, words)])


def test_a_device_stays_a_device(device, texts, tmp_path):
    assert encode("a river", "-o", device) == OK and device.is_char_device()
    assert encode("-i", texts, "-o", device, "--output-format", "jsonl") == OK and device.is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "texts.jsonl"]


@pytest.mark.parametrize("kind", ["texts", "file"])
def test_a_pipe_gets_the_vectors(kind, texts, tmp_path):
    words = ["a river", "two rivers"] if kind == "texts" else ["-i", texts, "--output-format", "npy"]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert encode(*words, "-o", tmp_path / "pipe") == OK
        got = reader.communicate(timeout=10)[0]
    assert (tmp_path / "pipe").is_fifo()
    assert encode("a river", "two rivers", "-o", tmp_path / "file.npy") == OK
    (tmp_path / "got.npy").write_bytes(got)
    np.testing.assert_allclose(np.load(tmp_path / "got.npy"), np.load(tmp_path / "file.npy"), atol=1e-6)


def test_failures_of_a_run_into_a_pipe_are_listed_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "a river"}\n{"text": "\\ud800"}\n')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        code = encode("-i", tmp_path / "in.jsonl", "-o", tmp_path / "pipe", "--output-format", "jsonl")
        assert reader.communicate(timeout=10)[0].count(b"\n") == 1
    assert code == FAILURE
    failed = tmp_path / "here" / "pipe.failures.jsonl"
    assert "surrogate" in failed.read_text() and str(failed) in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "here").iterdir()] == [failed.name]


@pytest.mark.parametrize("kind", ["texts", "file"])
def test_a_link_stays_and_its_file_is_replaced(kind, texts, tmp_path):
    words = ["a river"] if kind == "texts" else ["-i", texts]
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "vectors.npy", tmp_path / "link.npy"
    target.touch(mode=0o600)
    link.symlink_to(target)
    assert encode(*words, "-o", link) == OK
    assert link.is_symlink() and np.load(target).ndim == 2
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "what was private stays private"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["vectors.npy"]


def test_lance_writes_a_folder_and_refuses_a_device(device, texts, capsys):
    assert encode("-i", texts, "-o", device, "--output-format", "lance") == USAGE
    assert "is no folder, and Lance writes one" in capsys.readouterr().err


def test_the_umask_is_honoured_and_stdout_can_be_the_output(tmp_path):
    script = (
        "umask 077; p=\"$0 -m gte_deploy encode --quiet\"; $p 'a river' -o private.npy && "
        "{ printf 'before '; $p 'a river' -o /dev/stdout; } > both"
    )
    subprocess.run(["sh", "-ec", script, sys.executable], cwd=tmp_path, check=True, timeout=120)
    private, both = tmp_path / "private.npy", tmp_path / "both"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert both.read_bytes() == b"before " + private.read_bytes()

"""Closed or full standard streams: a command tells it, or does its work without them; no traceback."""

import subprocess
import sys

import pytest

from fork_server import ForkServer
from gte_deploy.core.exit_codes import BROKEN_PIPE, FAILURE, OK, USAGE

COMMANDS = {
    "gte_deploy": "completion bash",
    "gte_deploy.training.cli": "glue --list-systems",
}


def run(module, words, redirections, cwd=None):
    command = ["sh", "-c", f'exec "$0" -m {module} {words} {redirections}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", COMMANDS)
def test_results_that_nobody_can_get_are_an_error(module):
    code, _, err = run(module, COMMANDS[module], ">&-")
    assert code == FAILURE and "stdout is closed, and results are printed there" in err
    code, _, err = run(module, COMMANDS[module], ">/dev/full")
    assert code == FAILURE and "No space left on device" in err
    assert run(module, COMMANDS[module], ">&- 2>&- <&-") == (FAILURE, "", "")


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_without_stderr_the_results_are_the_same(module, redirections):
    usual = run(module, COMMANDS[module], "")
    assert usual[0] == OK and usual[1]
    assert run(module, COMMANDS[module], redirections) == (OK, usual[1], "")


def test_messages_do_not_get_among_the_results():
    code, out, _ = run("gte_deploy", "encode a --max-length 0", "2>&-")
    assert (code, out) == (USAGE, "")


def test_without_stdin_there_are_no_texts():
    code, _, err = run("gte_deploy", "encode", "<&-")
    assert code == USAGE and "no texts: give them as arguments" in err


def test_an_output_file_needs_no_stream_and_holds_only_the_output(tmp_path):
    """Files that are opened later must not get the numbers of closed streams, into which libraries print."""
    assert run("gte_deploy", "encode a -o a.npy", ">&- 2>&- <&-", cwd=tmp_path) == (OK, "", "")
    assert run("gte_deploy", "encode a -o b.npy --quiet", "", cwd=tmp_path) == (OK, "", "")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_path_that_is_no_unicode_is_printed_as_escapes(tmp_path):
    code, out, err = run("gte_deploy", "info \"$(printf 'no-such-\\377')\"", "", cwd=tmp_path)
    assert code == FAILURE and "no-such-" in err and not out


# --- every command that prints ----------------------------------------------------------------------------------------


# In the child, stdout is closed, full, or a pipe whose reader has gone; stderr is a file.
SERVER = """
import os, sys, traceback
from fork_server import serve
import onnxruntime
from gte_deploy import cli as deploy
from gte_deploy.exporters import cli as export
from gte_deploy.training import cli as train

MAINS = {"gte-deploy": deploy.main, "gte-export": export.main, "gte-train": train.main}

def work(words, stdout, err):
    sys.stderr = open(err, "w")
    os.dup2(sys.stderr.fileno(), 2)
    if stdout == "closed":
        os.close(1)
        sys.stdout = None
    else:
        reader, writer = os.pipe()
        os.dup2(os.open("/dev/full", os.O_WRONLY) if stdout == "full" else writer, 1)
        os.close(reader), os.close(writer)
        sys.stdout = open(1, "w", closefd=False)
    try:
        code = MAINS[words[0]](words[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    return code

serve(work)
"""
OUTCOMES = {
    "closed": (FAILURE, "stdout is closed, and results are printed there"),
    "full": (FAILURE, "No space left on device"),
    "left": (BROKEN_PIPE, ""),
}


@pytest.fixture(scope="module")
def printing():
    server = ForkServer(SERVER)
    yield server
    server.close()


@pytest.fixture(scope="module")
def commands(task_bundles, word_checkpoints, tmp_path_factory):
    """Commands that print results, by name."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "t.txt").write_text("a king")
    texts = ["-m", task_bundles["embed"], "a king"]
    return {
        "encode": ["gte-deploy", "encode", *texts],
        "encode --json": ["gte-deploy", "encode", "--json", *texts],
        "chunks": ["gte-deploy", "encode", "--chunks", "tokens:8", *texts],
        "fill-mask": ["gte-deploy", "fill-mask", "-m", task_bundles["mask"], "a [MASK]"],
        "encode-sparse": ["gte-deploy", "encode-sparse", "-m", task_bundles["sparse"], "a king"],
        "rank": ["gte-deploy", "rank", "-m", task_bundles["rank"], "-q", "a", "b", "c"],
        "predict": ["gte-deploy", "predict", "-m", task_bundles["labels"], "a"],
        "classify-tokens": ["gte-deploy", "classify-tokens", "-m", task_bundles["tags"], "a king"],
        "verify": ["gte-deploy", "verify", task_bundles["embed"]],
        "info": ["gte-deploy", "info", task_bundles["embed"]],
        "info --json": ["gte-deploy", "info", "--json", task_bundles["embed"]],
        "info of a checkpoint": ["gte-deploy", "info", word_checkpoints["embed"]],
        "compare": ["gte-deploy", "compare", task_bundles["embed"], task_bundles["embed"], "--repeats", "1"],
        "completion": ["gte-deploy", "completion", "zsh"],
        "list of published models": ["gte-export", "verify-published", "--list"],
        "an error in JSON": ["gte-deploy", "info", "nowhere", "--json"],
        "estimate": ["gte-train", "estimate", "gte-en-mlm-tiny"],
        "systems": ["gte-train", "glue", "--list-systems"],
    }  # fmt: skip


@pytest.mark.parametrize("stdout", OUTCOMES)
def test_every_command_that_prints(printing, commands, stdout, tmp_path, attempts):
    attempts("commands whose stdout is closed, full or left", len(commands))
    for name, words in commands.items():
        code = printing.run(words=list(map(str, words)), stdout=stdout, err=tmp_path / "err")
        err = (tmp_path / "err").read_text()
        expected, said = OUTCOMES[stdout]
        if name == "an error in JSON":
            expected, said = FAILURE, "nowhere"
        assert "Traceback" not in err, (name, err)
        assert code == expected and said in err, (name, code, err)

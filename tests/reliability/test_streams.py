"""Closed or full standard streams: a command tells it, or does its work without them; no traceback."""

import subprocess
import sys

import pytest

from gte_deploy.core.exit_codes import FAILURE, OK, USAGE

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

"""Bad inputs on the command lines: the stated exit code, one line that says why, and the next command is unchanged."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import types

import pytest

from bad_inputs import FINITE, GOOD, MAX_LENGTHS, SURROGATES, TOO_LARGE, rows
from gte_deploy import cli as deploy_cli
from gte_deploy.core import exit_codes
from gte_deploy.exporters import cli as export_cli
from gte_deploy.training import cli as train_cli

# The commands that take texts, and the model that answers.
COMMANDS = {
    "fill-mask": "mask",
    "encode": "embed",
    "encode-sparse": "sparse",
    "rank": "rank",
    "predict": "labels",
    "classify-tokens": "tags",
}
BOUNDED = {name: ["--truncation"] for name in COMMANDS}  # so that long texts are answered


@pytest.fixture(scope="module")
def bundles(task_bundles):
    return {command: str(task_bundles[model]) for command, model in COMMANDS.items()}


@pytest.fixture
def run(bundles, monkeypatch, capfd):
    """`run(command, *words, stdin=bytes)`: exit code, stdout and stderr of the command with its model."""

    def run(command, *words, stdin=None):
        given = ["-q", "a king"] if command == "rank" else []
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
        code = deploy_cli.main([command, "-m", bundles[command], "--json", "--backend", "onnx", *given, *words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture(autouse=True)
def _the_next_good_command_is_unchanged(request, run):
    command = request.node.callspec.params.get("command") if hasattr(request.node, "callspec") else None
    before = run(command, GOOD) if command else None
    yield
    if command:
        assert before[0] == exit_codes.OK and run(command, GOOD) == before


def finite(out):
    """Strict JSON on every line."""

    def refuse(name):
        raise AssertionError(f"the answer has {name}")

    return [json.loads(line, parse_constant=refuse) for line in out.splitlines()]


def as_argument(row):
    """As Python decodes an argument of these bytes."""
    return os.fsdecode(row.utf8())


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_texts_as_arguments_and_on_stdin(run, command, attempts):
    attempts("odd texts as arguments and on stdin", 2 * len(FINITE))
    for row in FINITE:
        text = f"{row.value} [MASK]" if command == "fill-mask" else row.value
        if "\0" not in text:  # no system passes it on in an argument
            code, out, err = run(command, *BOUNDED[command], "--", text, text)
            assert code == exit_codes.OK and finite(out), (row.name, err)
        if "\n" not in text:
            code, again, err = run(command, *BOUNDED[command], stdin=f"{text}\n{text}\n".encode())
            assert code == exit_codes.OK and finite(again), (row.name, err)
            begins_with_mark = row.name == "byte order mark" and command != "fill-mask"
            assert "\0" in text or begins_with_mark or finite(again) == finite(out), row.name


@pytest.mark.parametrize("command", COMMANDS)
def test_texts_that_are_refused(run, command, attempts):
    refused = (*SURROGATES, *TOO_LARGE)
    attempts("texts that are refused on the command line", len(refused))
    for row in refused:
        code, out, err = run(command, "--", GOOD, as_argument(row))
        assert code == exit_codes.USAGE and re.search(r"\[1\](\[0\])? has", err), (row.name, err)
        error = json.loads(out)["error"]
        assert error["type"] == "InputError" and error["exit_code"] == code
        assert len(err.splitlines()) == 1 and len(err) < 500


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("row", rows(row for row in MAX_LENGTHS if isinstance(row.value, int) and row.value > 1))
def test_max_length(run, command, row):
    code, _, err = run(command, "--max-length", str(row.value), GOOD)
    assert code == exit_codes.USAGE and "--max-length must be an integer from" in err


# Bytes on stdin, the number of texts that they are, or what is said of them.
STDIN = {
    "nothing": (b"", "no texts|empty"),
    "not UTF-8": (b"a\n\xff\n", r"- is not UTF-8: invalid start byte at byte 2"),
    "UTF-16": ("a\nb".encode("utf-16"), "is not UTF-8"),
    "a surrogate in UTF-8": (b"\xed\xa0\x80", "is not UTF-8"),
    "cut off in a character": ("a é".encode()[:-1], "is not UTF-8: unexpected end"),
    "an overlong NUL": (b"\xc0\x80", "is not UTF-8"),
    "one line end": (b"\n", 1),
    "no line end": (b"a king", 1),
    "CRLF": (b"a king\r\nthe queen\r\n", 2),
    "CR": (b"a king\rthe queen", 1),
    "NUL": (b"a\0king\n", 1),
    "byte order mark": (b"\xef\xbb\xbfa king\n", 1),
    "a byte order mark and nothing": (b"\xef\xbb\xbf", "no texts|empty"),
    "other line ends": ("a\u2028b\x85c\x0bd".encode(), 1),
    "empty lines": (b"\n\na\n\n", 4),
}


@pytest.mark.parametrize("command", ["encode", "classify-tokens"])
@pytest.mark.parametrize("name", STDIN)
def test_bytes_on_stdin(run, command, name, tmp_path):
    """The same bytes in a file are the same texts."""
    data, expected = STDIN[name]
    (tmp_path / "texts").write_bytes(data)
    by_stdin, by_file = run(command, stdin=data), run(command, "--input", str(tmp_path / "texts"))
    assert by_file[:1] + by_file[1:2] == by_stdin[:1] + by_stdin[1:2] or by_stdin[0] == exit_codes.USAGE
    if isinstance(expected, int):
        assert by_stdin[0] == exit_codes.OK and len(finite(by_stdin[1])) == expected, by_stdin
    elif name not in ("nothing", "a byte order mark and nothing") or command != "encode":
        assert by_stdin[0] == by_file[0] == exit_codes.USAGE and re.search(expected, by_stdin[2]), by_stdin
    else:
        assert by_stdin[:2] == (exit_codes.OK, "")  # no texts have no embeddings, as in Python


def test_a_byte_order_mark_is_no_text(run):
    assert run("encode", stdin=b"\xef\xbb\xbfa king\n")[1] == run("encode", "a king")[1]
    assert run("encode", stdin=b"a king\r\nthe queen\r\n")[1] == run("encode", "a king", "the queen")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_of_megabytes(run, command):
    code, out, err = run(command, *BOUNDED[command], stdin=b"[MASK] " + b"the old king " * 80_000)
    assert code == exit_codes.OK and finite(out), err
    code, _, err = run(command, *BOUNDED[command], stdin=b"[MASK] " + b"x" * 10_000_000)
    assert code == exit_codes.USAGE and "bytes of UTF-8" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_inputs_that_are_no_files(run, command, tmp_path):
    os.symlink("loop", tmp_path / "loop")
    for path, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "nowhere" / "deeper", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop", "Too many levels"),
        ("", "cannot be read|Is a directory"),
    ):
        code, _, err = run(command, "--input", str(path))
        assert code == exit_codes.USAGE and any(word in err for word in said.split("|")), (path, err)


@pytest.mark.parametrize(
    "words", [[b"\xff\xfe"], [b"a", b"-o", b"\xff/x.npy"], [b"-m", b"\xff", b"a"], [b"-i", b"\xff"]]
)
def test_arguments_that_are_no_utf8_in_a_process(bundles, words, tmp_path):
    command = [sys.executable, "-m", "gte_deploy", "encode", "-m", bundles["encode"], *map(os.fsdecode, words)]
    done = subprocess.run(command, capture_output=True, timeout=120, cwd=tmp_path)
    assert done.returncode in (exit_codes.USAGE, exit_codes.FAILURE) and done.stdout == b""
    assert b"error: " in done.stderr and b"Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# --- every option of every command ----------------------------------------------------------------------------------


MAINS = {"gte-deploy": deploy_cli.main, "gte-export": export_cli.main, "gte-train": train_cli.main}
BAD_VALUES = ["", "nan", "-1", "x\udcff", "1e999", "0", "999999999999999999999", "nowhere/x", "\n", "*", "a=b=c", "é"]


def commands():
    """(program, command, its parser) for every command."""
    deploy, train = deploy_cli._parser(), train_cli.build_parser()
    for program, parser in (("gte-deploy", deploy), ("gte-train", train)):
        (inner,) = (action for action in parser._actions if action.dest == "command")
        for name, each in inner.choices.items():
            yield program, name, each
    for name in (None, *export_cli._COMMANDS):
        yield "gte-export", name, export_cli._parser(name, name or "onnx")


# So that a value that is not refused leads no further than to a model, a file or a folder that is not there.
NOWHERE = {
    "push": ["nowhere/model", "a/b"],
    "rank": ["-m", "nowhere/model", "a"],
    "serve": ["./nowhere/model"],
    "verify": ["nowhere/model"],
    "info": ["nowhere/model"],
    "bench": ["nowhere/model"],
    "compare": ["nowhere/model", "nowhere/other"],
    "completion": ["tcsh"],
    "adopt": ["nowhere/model.plan", "nowhere/model"],
    "check": ["nowhere/repository"],
    "prepare": ["nowhere/texts.txt"],
    "run": ["nowhere/recipe.yaml", "--data", "nowhere/data"],
    "estimate": ["nowhere/recipe.yaml"],
    "export": ["nowhere/run", "nowhere/out"],
    "embed": ["--data", "nowhere/pairs.csv"],
    "rerank": ["--data", "nowhere/pairs.csv"],
    "sparse": ["--data", "nowhere/pairs.csv"],
}


def options_with_values(parser):
    for action in parser._actions:
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if flags and action.nargs != 0:
            yield flags[-1]


def try_values(program, name, parser, values, capfd, attempts):
    # capsys would refuse a byte that is no UTF-8, which the real stderr escapes.
    model = ["-m", "nowhere/model", "a"] if program == "gte-deploy" else ["nowhere/model", "nowhere/out"]
    base = NOWHERE.get(name, model if program != "gte-train" else ["nowhere/model"])
    words = [] if name is None else [name]
    tries = list(itertools.product(options_with_values(parser), values))
    attempts("options of the command lines with values that they cannot take", len(tries))
    for flag, value in tries:
        try:
            code = MAINS[program]([*words, *base, f"{flag}={value}"])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        said = f"{flag}={value!a}: {out} {err}"
        assert code in (exit_codes.FAILURE, exit_codes.USAGE, exit_codes.EXISTS, exit_codes.MISSING_DEPENDENCY), said
        assert "error: " in err and "Traceback" not in err, said


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "nothing is made"


ALL = [pytest.param(*each, id=f"{each[0]} {each[1] or ''}".strip()) for each in commands()]


@pytest.mark.parametrize(("program", "name", "parser"), ALL)
def test_every_option_refuses_what_it_cannot_take(program, name, parser, empty_folder, capfd, attempts):
    """No value is a traceback, and none makes a file."""
    try_values(program, name, parser, BAD_VALUES[:2], capfd, attempts)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "name", "parser"), ALL)
def test_every_option_with_every_bad_value(program, name, parser, empty_folder, capfd, attempts):
    try_values(program, name, parser, BAD_VALUES, capfd, attempts)

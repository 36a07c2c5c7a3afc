"""Any words after a command are parsed, or refused in a line with a documented exit code; there is no traceback."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from battery import Attempts
from gte_deploy import cli as deploy_cli
from gte_deploy.core import exit_codes
from gte_deploy.core.options import read_options
from gte_deploy.exporters import cli as export_cli
from gte_deploy.training import cli as train_cli

CODES = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
ODD = [
    "",
    "-",
    "--",
    "0",
    "-1",
    "1e400",
    "nan",
    "1_000",
    "٣",
    "9" * 5000,
    "\ud800",
    "\0",
    "a=b",
    "@a",
    "--a=",
    "~",
    "~no/x",
]
words = st.sampled_from(ODD) | st.text(st.characters(), max_size=12) | st.integers().map(str)


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands of a program."""
    (inner,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(inner.choices)


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return sorted(flag for action in parser._actions for flag in action.option_strings)


def lines(first: Sequence[str], flags: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Command lines of flags, with a word or without, and of words alone."""
    flag = st.sampled_from(flags)
    parts = (
        st.tuples(flag, words) | st.tuples(flag) | st.tuples(words) | st.builds(lambda a, b: (f"{a}={b}",), flag, words)
    )
    return st.lists(parts, max_size=5).map(lambda chosen: [*first, *(word for part in chosen for word in part)])


def run(main: Callable[[list[str]], int], line: list[str]) -> int:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line)
        except SystemExit as stop:  # argparse's way
            code = stop.code
    assert code in CODES, (line, code)
    assert code == exit_codes.OK or err.getvalue() or out.getvalue(), line
    assert "Traceback" not in err.getvalue(), line
    return code


def fuzz(main: Callable[[list[str]], int], lines: st.SearchStrategy[list[str]], examples: int) -> None:
    codes = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(line=lines)
    def parsed_or_refused(line: list[str]) -> None:
        codes.add(run(main, line))

    parsed_or_refused()
    assert exit_codes.USAGE in codes


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command reads and checks its options, and does no more."""

    def reading(command: Any) -> Any:
        return dataclasses.replace(
            command, run=lambda given: [read_options(kind, given) for kind in command.options] and None
        )

    for module in (deploy_cli, train_cli):
        monkeypatch.setattr(module, "_COMMANDS", {name: reading(each) for name, each in module._COMMANDS.items()})


PARSERS = {"gte-deploy": (deploy_cli.main, deploy_cli._parser), "gte-train": (train_cli.main, train_cli.build_parser)}


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("program", PARSERS)
def test_options_of_every_command(without_work: None, program: str, examples: int, attempts: Attempts) -> None:
    main, make_parser = PARSERS[program]
    found = commands(make_parser())
    for name, parser in found.items():
        fuzz(main, lines([name], flags_of(parser)), examples)
    attempts(f"command lines of {program}", examples * len(found))


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_options_of_an_export(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, examples: int, attempts: Attempts
) -> None:
    """The whole command, up to the checkpoint, which is not there."""
    monkeypatch.chdir(tmp_path)
    parser = export_cli._parser(None, "onnx")
    missing = ["--", "./no-such-checkpoint"]  # which is no value of the last option then
    fuzz(lambda line: export_cli.main([*line, *missing]), lines([], flags_of(parser)), examples)
    assert list(tmp_path.iterdir()) == []
    attempts("command lines of gte-export", examples)


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (deploy_cli.main, ["encode", "a text", "--model=--"]),
        (deploy_cli.main, ["encode", "a text", "--output=--"]),
        (train_cli.main, ["glue", "--json=--"]),
        (export_cli.main, ["--check-repository=--"]),
        (export_cli.main, ["--output=--"]),
        (train_cli.main, ["export", "run", "--", "--"]),
        (deploy_cli.main, ["compare", "one", "--", "--"]),
    ],
)
def test_two_dashes_are_no_value(main: Callable[[list[str]], int], line: list[str]) -> None:
    """argparse made an empty list of them, which was no path."""
    assert run(main, line) == exit_codes.USAGE

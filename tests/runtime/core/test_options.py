"""Options stated once: what a dataclass field says becomes a command line, checks, values and a table."""

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import (
    add_arguments,
    check_choices,
    flags_of,
    natural,
    option,
    options_given,
    options_of,
    options_table,
    parse_given,
    read_options,
    required,
)


def parse_size(text):
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise InputError(f"size is {text!r}; expected ROWSxCOLUMNS")
    return int(rows), int(columns)


@dataclass(frozen=True)
class Options:
    """One option of each kind."""

    paths: tuple[Path, ...] = option((), "files", positional=True, nargs="*", metavar="FILE", parse=Path)
    colour: str = option("red", "colour of 100% of the lines", choices=("red", "blue"))
    max_length: int | None = option(
        None, "length (default: the longest)", flags=("--max-len", "--max-length"), metavar="N", parse=int
    )
    seed: int = option(0, "seed", parse=int)
    sizes: tuple[tuple[int, int], ...] = option((), "a size", flags=("--size",), repeated=True, parse=parse_size)
    labels: tuple[str, ...] = option(("a", "b"), "labels", nargs="+", choices=("a", "b", "c"))
    fast: bool = option(False, "go fast")
    tensorboard: bool = option(True, "write no events", flags=("--no-tensorboard",))
    plain: int = 7  # no option


@dataclass(frozen=True)
class Query:
    """A required option after one that is not."""

    top_k: int | None = option(None, "answers", flags=("-k", "--top-k"), parse=int)
    query: str = required("query", flags=("-q", "--query"))


def parser_of(*kinds, **options):
    parser = argparse.ArgumentParser(prog="x")
    for kind in kinds:
        add_arguments(parser, kind, **options)
    return parser


def given(*words, kinds=(Options,), **options):
    return vars(parser_of(*kinds, **options).parse_args(words))


def test_what_is_not_given_is_not_there():
    assert given() == {} and parse_given(Options, {}) == {}
    assert read_options(Options, {}) == Options()


def test_every_kind_of_option_is_parsed():
    words = "one two --colour blue --max-length 8 --seed 3 --size 1x2 --size 3x4 --labels c a --fast --no-tensorboard"
    expected = {
        "paths": (Path("one"), Path("two")),
        "colour": "blue",
        "max_length": 8,
        "seed": 3,
        "sizes": ((1, 2), (3, 4)),
        "labels": ("c", "a"),
        "fast": True,
        "tensorboard": False,
    }
    parsed = given(*words.split())
    assert parse_given(Options, parsed) == expected
    assert read_options(Options, parsed) == Options(**expected)
    assert given("--max-len", "8") == {"max_length": 8}


def test_values_of_other_dataclasses_are_left_alone():
    parsed = given("-q", "who", "--seed", "1", kinds=(Query, Options))
    assert parse_given(Query, parsed) == {"query": "who"} and parse_given(Options, parsed) == {"seed": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--colour green", "invalid choice: 'green'"),
        ("--labels a d", "invalid choice: 'd'"),
        ("--seed many", "invalid int value"),
        ("--labels", "expected at least one argument"),
    ],
)
def test_a_wrong_value_is_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        given(*words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_text_of_another_form_is_refused_by_the_options_own_parser():
    with pytest.raises(InputError, match="size is '7'; expected ROWSxCOLUMNS"):
        parse_given(Options, given("--size", "7"))


def test_a_required_option_must_be_given(capsys):
    with pytest.raises(SystemExit):
        given(kinds=(Query,))
    assert "required: -q/--query" in capsys.readouterr().err
    assert options_of(Query)["query"][0] is MISSING
    assert read_options(Query, given("-q", "who", kinds=(Query,))) == Query(query="who")


def test_help_states_each_default_once():
    text = " ".join(parser_of(Options).format_help().split())
    assert "colour of 100% of the lines (default: red)" in text
    assert "length (default: the longest)" in text and text.count("(default") == 4
    assert "seed (default: 0)" in text and "labels (default: a b)" in text
    assert "go fast --no-tensorboard write no events" in text


def test_hidden_options_are_parsed_and_not_shown():
    parser = parser_of(Options, hidden=True)
    assert "--colour" not in parser.format_help()
    assert vars(parser.parse_args(["--colour", "blue"])) == {"colour": "blue"}


def test_a_flag_that_is_taken_already_is_left_as_it_is():
    @dataclass(frozen=True)
    class Other:
        size: str = option("m", "size of a shirt", choices=("m", "l"))
        top: int | None = option(None, "the best", flags=("--max-len", "--best"), parse=int)

    parser = parser_of(Options, Other)
    text = parser.format_help()
    assert "a size" in text and "size of a shirt" not in text
    assert vars(parser.parse_args(["--max-len", "1", "--best", "2"])) == {"max_length": 1, "top": 2}


def test_a_group_of_a_parser_takes_options():
    parser = argparse.ArgumentParser(prog="x")
    add_arguments(parser.add_argument_group("the query"), Query)
    assert "the query:" in parser.format_help()
    assert vars(parser.parse_args(["-q", "who", "-k", "2"])) == {"query": "who", "top_k": 2}


def test_check_choices():
    check_choices(Options())
    check_choices(Options(colour="blue", labels=("c", "c")))
    with pytest.raises(InputError, match="colour is 'green'; expected one of red, blue"):
        check_choices(Options(colour="green"))
    with pytest.raises(InputError, match="labels is 'd'; expected one of a, b, c"):
        check_choices(Options(labels=("a", "d")))


def test_options_given_are_those_that_differ_from_their_defaults():
    assert [name for name, _ in options_given(Options(seed=1, tensorboard=False, plain=8))] == ["seed", "tensorboard"]


def test_flags_are_the_fields_name_where_none_are_stated():
    flags = {name: flags_of(name, described) for name, (_, described) in options_of(Options).items()}
    assert flags["max_length"] == ("--max-len", "--max-length") and flags["seed"] == ("--seed",)
    assert flags["paths"] == ("FILE",)


def test_table_for_the_docs():
    lines = options_table(Options, Query).splitlines()
    assert lines[0] == "| Option | Values | Default | Meaning |" and len(lines) == 2 + 8 + 2
    assert "| `--colour` | `red`, `blue` | `red` | colour of 100% of the lines |" in lines
    assert "| `--max-len`, `--max-length` | N |  | length (default: the longest) |" in lines
    assert "| `--seed` |  | `0` | seed |" in lines
    assert "| `-q`, `--query` |  |  | query |" in lines


def test_numbers_of_a_command_line():
    """Python would raise an error of its own for 5,000 digits."""
    assert [natural(text) for text in ("0", "08", "9" * 18)] == [0, 8, 10**18 - 1]
    assert {natural(text) for text in ("", "-1", "1.5", " 1", "\u0663", "9" * 19, "9" * 5000)} == {None}

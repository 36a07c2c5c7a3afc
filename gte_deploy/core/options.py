"""Options stated once: a dataclass field carries default, help, choices and the spelling on a command line.

The command line's parser, the checks of the Python API, the refusal of options that do not go together and the tables
in docs/ are all made from such fields.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from gte_deploy.core.errors import InputError

T = TypeVar("T")

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What a field says of itself.

    Args:
        help: one sentence for `--help` and docs/; a default other than None and False is added to it.
        choices: the allowed values; empty for any.
        flags: spellings on the command line; by default the field's name with hyphens.
        metavar: stands for the value in `--help`.
        parse: makes the value of the command line's text. It may raise InputError.
        repeated: whether the flag may be given several times; the value is a tuple then.
        nargs: number of values after one flag: "+" or "*" for a tuple of them, "?" for one that may be left out.
        positional: whether the command line takes the value by its place, without a flag.
        precisions: the precisions that the option is for; empty for all.
    """

    help: str
    choices: Sequence[str] = ()
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    repeated: bool = False
    nargs: Literal["+", "*", "?"] | None = None
    positional: bool = False
    precisions: tuple[str, ...] = ()

    @property
    def is_tuple(self) -> bool:
        """Whether the value is a tuple of several."""
        return self.repeated or self.nargs in ("+", "*")


def option(default: Any, help: str, **rest: Any) -> Any:
    """A dataclass field with a default, described by an `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **rest)})


def required(help: str, **rest: Any) -> Any:
    """A dataclass field that must be given, by its keyword, described by an `Option`."""
    return dataclasses.field(kw_only=True, metadata={_KEY: Option(help, **rest)})


def options_of(kind: type) -> dict[str, tuple[Any, Option]]:
    """Name of every option of a dataclass -> its default (`dataclasses.MISSING` for none) and its description."""
    found = {}
    for item in dataclasses.fields(kind):
        if _KEY in item.metadata:
            found[item.name] = item.default, item.metadata[_KEY]
    return found


class HelpFormatter(argparse.HelpFormatter):
    """Prints `--help` alike on every Python.

    Before 3.13 argparse repeats the value behind each flag, and forgets the indentation of commands where it measures
    the column of help texts. Paragraphs are filled; lines that are indented are kept as they are.
    """

    def add_argument(self, action: argparse.Action) -> None:
        """Add an action, and make room for the names of its commands."""
        super().add_argument(action)
        for command in self._iter_indented_subactions(action):
            length = len(self._format_action_invocation(command)) + self._current_indent
            self._action_max_length = max(self._action_max_length, length)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(line if line[:1] in ("", " ") else fill(line, width, indent) for line in text.split("\n"))


def flags_of(name: str, described: Option) -> tuple[str, ...]:
    """How a command line spells an option; a positional one is spelled as its metavar in `--help`."""
    if described.positional:
        return (described.metavar or name,)
    return described.flags or (f"--{name.replace('_', '-')}",)


def add_arguments(parser: Any, kind: type, *, hidden: bool = False) -> None:
    """Add the options of a dataclass to a parser or to a group of one.

    What is not given on the command line is not in the namespace. A flag that the parser has already is left as it is.

    Args:
        parser: an ArgumentParser, or a group of one.
        kind: the dataclass.
        hidden: whether `--help` leaves the options out; they are still parsed, so that a refusal can say what they
            are for.
    """
    known = parser._option_string_actions
    for name, (default, described) in options_of(kind).items():
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS}
        arguments["help"] = argparse.SUPPRESS if hidden else _help(default, described)
        if isinstance(default, bool):
            arguments["action"] = "store_false" if default else "store_true"
        else:
            arguments |= _of_value(described)
        if described.positional:
            parser.add_argument(name, **arguments)
        elif flags := [flag for flag in flags_of(name, described) if flag not in known]:
            parser.add_argument(*flags, dest=name, required=default is dataclasses.MISSING, **arguments)


def parse_given(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's options among those that were parsed by `add_arguments`.

    Raises:
        InputError: a text is not of the option's form.
    """
    found = {}
    for name, (_, described) in options_of(kind).items():
        if name in given:
            found[name] = _parsed(described, given[name])
    return found


def read_options(kind: type[T], given: Mapping[str, Any]) -> T:
    """An instance of a dataclass of options, of what was parsed by `add_arguments`.

    Raises:
        InputError: a text is not of the option's form, or the dataclass refuses a value.
    """
    return kind(**parse_given(kind, given))


def check_choices(values: Any) -> None:
    """Check the values of an instance of an options dataclass against their choices.

    Raises:
        InputError: naming the option, its value and what is allowed.
    """
    for name, (default, described) in options_of(type(values)).items():
        value = getattr(values, name)
        if described.choices and value != default:
            for each in value if described.is_tuple else (value,):
                check_choice(name, each, described.choices)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check one value.

    Raises:
        InputError: it is none of `allowed`.
    """
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}")


def options_given(values: Any) -> Iterator[tuple[str, Option]]:
    """The options of an instance that differ from their defaults."""
    for name, (default, described) in options_of(type(values)).items():
        if getattr(values, name) != default:
            yield name, described


def options_table(*kinds: type) -> str:
    """The options of dataclasses as a table in Markdown: flag, values, default and help."""
    lines = ["| Option | Values | Default | Meaning |", "|---|---|---|---|"]
    for kind in kinds:
        for name, (default, described) in options_of(kind).items():
            flags = ", ".join(f"`{flag}`" for flag in flags_of(name, described))
            values = ", ".join(f"`{choice}`" for choice in described.choices) or described.metavar or ""
            text = _shown(default)
            lines.append(f"| {flags} | {values} | {text and f'`{text}`'} | {described.help} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    """A default as `--help` and docs/ show it; empty where there is none to show."""
    if default is None or default is dataclasses.MISSING or isinstance(default, bool):
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _help(default: Any, described: Option) -> str:
    # argparse expands percent signs.
    text, shown = described.help.replace("%", "%%"), _shown(default).replace("%", "%%")
    return text if not shown or "(default" in text else f"{text} (default: {shown})"


def _of_value(described: Option) -> dict[str, Any]:
    arguments: dict[str, Any] = {"metavar": described.metavar}
    if described.choices:
        arguments["choices"] = tuple(described.choices)
    if described.repeated:
        arguments["action"] = "append"
    if described.nargs is not None:
        arguments["nargs"] = described.nargs
    if described.parse in (int, float):
        arguments["type"] = described.parse
    return arguments


def _parsed(described: Option, value: Any) -> Any:
    parse = described.parse
    if parse is None or parse in (int, float):
        return tuple(value) if described.is_tuple else value
    return tuple(map(parse, value)) if described.is_tuple else parse(value)

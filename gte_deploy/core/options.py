"""Options defined once: a dataclass field carries default, help, choices and the spelling on a command line.

The command line's parser, the checks of the Python API, the refusal of options that exclude each other and the tables
in docs/ are all built from such fields.
"""

import argparse
import dataclasses
import difflib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from gte_deploy.core.errors import InputError

T = TypeVar("T")

Given = Mapping[str, Any]
"""The options given on a command line: name -> value, as `add_arguments` parsed it."""

_KEY = "option"
_MAX_DIGITS = 18
_CLOSE = 0.6  # how alike two words must be, from 0 to 1, for "did you mean"


@dataclass(frozen=True)
class Option:
    """The description of an option in its dataclass field.

    Args:
        help: one sentence for `--help` and docs/; a default other than None and False is added to it.
        choices: the allowed values; empty for any.
        flags: spellings on the command line; by default the field's name with hyphens.
        metavar: name of the value in `--help`, such as FILE.
        parse: function from the command line's text to the value. It may raise InputError.
        repeated: whether the flag may be given several times; the value is a tuple then.
        nargs: number of values after one flag: "+" or "*" for a tuple of them, "?" for one that may be left out.
        positional: whether the command line takes the value by its position, without a flag.
        precisions: the precisions that the option is for; empty for all.
        not_for: the formats of an export that cannot take the option, although their targets have it.
        argument: name of the argument in the Python API, where it is not the field's.
        aliases: other names of choices that people type on a command line -> the choice, which programs get.
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
    not_for: tuple[str, ...] = ()
    argument: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_tuple(self) -> bool:
        """Whether the value is a tuple of several."""
        return self.repeated or self.nargs in ("+", "*")


def option(default: Any, help: str, **rest: Any) -> Any:
    """Return a dataclass field with a default, described by an `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **rest)})


def required(help: str, **rest: Any) -> Any:
    """Return a keyword-only dataclass field without a default, described by an `Option`."""
    return dataclasses.field(kw_only=True, metadata={_KEY: Option(help, **rest)})


def options_of(kind: type) -> dict[str, tuple[Any, Option]]:
    """Return the name of each option of a dataclass -> its default (`dataclasses.MISSING` if none) and description."""
    found = {}
    for item in dataclasses.fields(kind):
        if _KEY in item.metadata:
            found[item.name] = item.default, item.metadata[_KEY]
    return found


class HelpFormatter(argparse.HelpFormatter):
    """Prints the same `--help` on every Python.

    Before 3.13, argparse repeats the value behind each flag, and ignores the indentation of commands when it measures
    the column of help texts. Paragraphs are filled; indented lines are kept.
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
    """Return the spellings of an option on a command line; a positional option has its metavar, as in `--help`."""
    if described.positional:
        return (described.metavar or name,)
    return described.flags or (f"--{name.replace('_', '-')}",)


def add_arguments(parser: Any, kind: type, *, hidden: bool = False, format: str | None = None) -> None:
    """Add the options of a dataclass to a parser or to a group of a parser.

    The namespace holds only options that the command line gives. A flag that the parser already has is left unchanged.

    Args:
        parser: an ArgumentParser or one of its groups.
        kind: the dataclass.
        hidden: whether `--help` leaves the options out; they are still parsed, so that a refusal can say what they are
            for.
        format: the format of an export, whose `--help` leaves out the options that are not for it.
    """
    known = parser._option_string_actions
    for name, (default, described) in options_of(kind).items():
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS}
        is_hidden = hidden or format in described.not_for
        arguments["help"] = argparse.SUPPRESS if is_hidden else _help(default, described)
        if isinstance(default, bool):
            arguments["action"] = "store_false" if default else "store_true"
        else:
            arguments |= _of_value(described)
        if described.positional:
            parser.add_argument(name, **arguments)
        elif flags := [flag for flag in flags_of(name, described) if flag not in known]:
            parser.add_argument(*flags, dest=name, required=default is dataclasses.MISSING, **arguments)


def parse_given(kind: type, given: Given) -> dict[str, Any]:
    """Read the values of a dataclass's options from those that `add_arguments` parsed.

    Raises:
        InputError: a text does not have the option's form.
    """
    found = {}
    for name, (_, described) in options_of(kind).items():
        if name in given:
            found[name] = _parsed(described, given[name])
    return found


def natural(text: str) -> int | None:
    """The number that a text of at most 18 digits stands for; None for any other text.

    More digits are no number that any option means, and Python refuses to read 5,000 of them in its own way.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def read_options(kind: type[T], given: Given) -> T:
    """Create an instance of a dataclass of options from the values that `add_arguments` parsed.

    Raises:
        InputError: a text does not have the option's form, or the dataclass refuses a value.
    """
    return kind(**parse_given(kind, given))


def check_choices(values: Any) -> None:
    """Check the values of an instance of an options dataclass against their choices, and flags by `check_flags`.

    Raises:
        InputError: the message names the option, its value and the allowed values.
    """
    for name, (default, described) in options_of(type(values)).items():
        value = getattr(values, name)
        if isinstance(default, bool):
            check_flags(**{name: value})
        if described.choices and value != default:
            for each in value if described.is_tuple else (value,):
                check_choice(name, each, described.choices, described.aliases)


def check_choice(name: str, value: Any, allowed: Sequence[Any], aliases: Mapping[str, Any] | None = None) -> None:
    """Check one value.

    Args:
        name: name of the argument, for the error.
        value: what was given.
        allowed: the values that it may have.
        aliases: other names of these values; a command line takes them, and here the error says what they mean.

    Raises:
        InputError: it is none of `allowed`.
    """
    if value not in allowed:
        known = [str(each) for each in allowed]
        meant = (aliases or {}).get(plain_word(str(value)))
        near = did_you_mean(str(value), known) if meant is None else f"; {str(value)!r} is {meant!r} here"
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}{near}")


def check_flags(**flags: Any) -> None:
    """Refuse values of flags that mean something else than they say: for Python, "false" is true.

    Args:
        **flags: name of the argument -> True, False (also numpy's, or 1 and 0), or None, which is the default.

    Raises:
        InputError: the message names the argument and its value.
    """
    for name, value in flags.items():
        # NumPy's booleans have these names, and importing this module loads no numpy.
        known = value is None or type(value).__name__ in ("bool", "bool_")
        if not known and not (isinstance(value, numbers.Integral) and value in (0, 1)):
            raise InputError(f"{name} is {value!r}; expected True or False")


def plain_word(text: str) -> str:
    """Return a word as the tables of other names have it: in lower case, with "-" for "_"."""
    return text.casefold().replace("_", "-")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known word that is most like `word`; empty if none is."""
    plain = {each.casefold(): each for each in known}
    alike = difflib.get_close_matches(word.casefold(), plain, n=1, cutoff=_CLOSE)
    return f"; did you mean {plain[alike[0]]}?" if alike else ""


def options_given(values: Any) -> Iterator[tuple[str, Option]]:
    """Yield the options of an instance that differ from their defaults."""
    for name, (default, described) in options_of(type(values)).items():
        if getattr(values, name) != default:
            yield name, described


def options_table(*kinds: type) -> str:
    """Format the options of dataclasses as a Markdown table: flag, values, default and help."""
    lines = ["| Option | Values | Default | Meaning |", "|---|---|---|---|"]
    for kind in kinds:
        for name, (default, described) in options_of(kind).items():
            flags = ", ".join(f"`{flag}`" for flag in flags_of(name, described))
            values = ", ".join(f"`{choice}`" for choice in described.choices) or described.metavar or ""
            text = _shown(default)
            lines.append(f"| {flags} | {values} | {text and f'`{text}`'} | {described.help} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    """Format a default for `--help` and docs/; empty if there is none to show."""
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
    elif described.choices:
        arguments["type"] = partial(_choice, described)
    return arguments


def _choice(described: Option, text: str) -> str:
    """Return the choice that a text means: without regard to case, with "_" for "-", and by its other names."""
    plain = plain_word(text)
    same = [choice for choice in described.choices if plain_word(choice) == plain]
    return same[0] if same else described.aliases.get(plain, text)


def _parsed(described: Option, value: Any) -> Any:
    parse = described.parse
    if parse is None or parse in (int, float):
        return tuple(value) if described.is_tuple else value
    return tuple(map(parse, value)) if described.is_tuple else parse(value)

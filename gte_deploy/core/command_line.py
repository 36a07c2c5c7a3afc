"""What the three command lines share: parsers, output options, errors as text and as JSON, exit codes and progress.

Results go to stdout, everything else to stderr. With `--json`, an error is one JSON object on stdout as well, see
docs/command-line.md. Importing this module loads nothing that is slow, so that `--help` and refusals are quick.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

from gte_deploy.core.completion import VARIABLE, candidates
from gte_deploy.core.errors import CheckpointError, ConfigError, GteDeployError, MissingDependencyError
from gte_deploy.core.exit_codes import (
    FAILURE,
    INTERRUPTED,
    OK,
    USAGE,
    exit_code_of,
    exit_codes_help,
    reader_went_away,
)
from gte_deploy.core.options import Given, HelpFormatter, did_you_mean, flags_of, option, options_of
from gte_deploy.core.streams import CLOSED_STDOUT, drop_unwritten, is_closed_stdout
from gte_deploy.core.termination import Terminated, signals_raise


@dataclass(frozen=True)
class OutputOptions:
    """What every command prints."""

    json: bool = option(False, "print results and errors as JSON")
    quiet: bool = option(False, "print only results and errors")
    progress: bool = option(False, "show progress also where stderr is no terminal")


WARNING = "warning: "
"""The begin of a line about something doubtful that the user gave."""


def shows_progress(given: Given) -> bool:
    """Whether a command shows progress: on a terminal or where it is asked for, and never with `--quiet`."""
    return "quiet" not in given and ("progress" in given or sys.stderr.isatty())


def progress_lines(program: str, given: Given) -> Callable[[str], None] | None:
    """Return the function that prints a line for each step of a command on stderr; None with `--quiet`.

    Where no progress is shown (see `shows_progress`), it prints only the lines that begin with `WARNING`.
    """
    if "quiet" in given:
        return None
    shown = "" if shows_progress(given) else WARNING

    def tell(line: str) -> None:
        if line.startswith(shown):
            print(f"{program}: {line}", file=sys.stderr, flush=True)

    return tell


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line that names what is close, and JSON if that was asked for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"epilog": exit_codes_help(), "formatter_class": HelpFormatter, **arguments})
        self._words: Sequence[str] = ()

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Some versions of Python take `--` away even from `--option=--` or, after another, from `-- --`, and leave an
        # empty list instead of a value.
        optional = (argparse.OPTIONAL, argparse.ZERO_OR_MORE, argparse.PARSER)
        if arg_strings == ["--"] and (action.option_strings or action.nargs not in optional):
            raise argparse.ArgumentError(action, "expected a value, and -- is none")
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore - of its overloads
        """Parse; an unknown option is an error of the command that it was given to, whose options are looked through.

        Every parser of this class takes all words, as `parse_args` does.
        """
        self._words = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(self._words, namespace)
        if rest:
            word, _, _ = rest[0].partition("=")
            shown = [a for a in self._actions if a.help != argparse.SUPPRESS]
            flags = [flag for action in shown for flag in action.option_strings]
            near = did_you_mean(word, flags) if word.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{near}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            near = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(known)}){near}")

    def error(self, message: str) -> NoReturn:
        """Print a line, and leave with the exit code for wrong usage."""
        advice = f"`{self.prog} --help` lists what it takes."
        if "--json" in self._words:
            print(json.dumps(_error_object("UsageError", message, advice, USAGE)), flush=True)
        self.exit(USAGE, f"{self.prog}: error: {message}\n{advice}\n")


def completes(parser: argparse.ArgumentParser, argv: Sequence[str] | None, commands: Iterable[str] = ()) -> bool:
    """Whether a shell asks how its command line goes on; then the answer was printed, a line for each word."""
    if argv is not None or VARIABLE not in os.environ:
        return False
    print("\n".join(candidates(parser, sys.argv[1:], commands)))
    return True


def run_command(
    program: str,
    work: Callable[[], int | None],
    given: Given,
    *,
    kinds: Sequence[type] = (),
    extra: str | None = None,
    interrupted: str | Callable[[], str] = "interrupted",
    names: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a command, and return its exit code; an error is told in a line, and no traceback is shown.

    SIGTERM and SIGHUP end it as Ctrl-C does, so it removes its unfinished work; the exit code is 128 and their number.

    Args:
        program: name of the program, which begins the lines on stderr.
        work: the command; what it returns is the exit code, None for OK.
        given: the options of the command line.
        kinds: the dataclasses of the command's options. Messages name arguments of the Python API; here they name the
            flags of these options instead.
        extra: the extra that has every library of the command; a library that is missing is told with it. None where
            the command names the extra itself.
        interrupted: the message of Ctrl-C, or what gives it; that of another signal names the signal, too.
        names: further words of messages for callers in Python -> what they are on the command line.
    """
    try:
        with signals_raise(), _hub_progress(shown=shows_progress(given)):
            code = work()
            sys.stdout.flush()
        return OK if code is None else code
    except BrokenPipeError:
        return reader_went_away()
    except KeyboardInterrupt as ended:
        said, code = interrupted if isinstance(interrupted, str) else interrupted(), INTERRUPTED
        if isinstance(ended, Terminated):
            said = said.replace("interrupted", f"interrupted by {ended.signal.name}", 1)
            code = ended.exit_code
        return _fail(program, given, KeyboardInterrupt(said), code)
    except GteDeployError as error:
        return _fail(program, given, error, exit_code_of(error), kinds, names)
    except ModuleNotFoundError as error:
        if extra is None or error.name is None or error.name.startswith("gte_deploy"):
            raise
        missing = MissingDependencyError(error.name, extra)
        return _fail(program, given, missing, exit_code_of(missing))
    except OSError as error:  # a full disk, a folder without permission
        drop_unwritten()
        return _fail(program, given, OSError(CLOSED_STDOUT) if is_closed_stdout(error) else error, FAILURE)


def _fail(
    program: str,
    given: Given,
    error: BaseException,
    code: int,
    kinds: Sequence[type] = (),
    names: Mapping[str, str] = MappingProxyType({}),
) -> int:
    message, advice = _message_of(error), getattr(error, "advice", "")
    if isinstance(error, GteDeployError):
        # Errors of files name the fields of these files, which may have the names of options.
        about_files = isinstance(error, (ConfigError, CheckpointError))
        message, advice = (with_flags(text, kinds, words=not about_files) for text in (message, advice))
        for name, typed in names.items():
            message, advice = (re.sub(rf"\b{re.escape(name)}\b", typed, text) for text in (message, advice))
    with contextlib.suppress(OSError):  # the terminal is gone, or the disk of a log is full: the exit code tells it
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    if "json" in given:
        report = getattr(error, "report", None)  # of an export that missed its bounds
        more = {} if report is None else {"parity": report.to_json()}
        with contextlib.suppress(OSError):
            print(json.dumps({**_error_object(type(error).__name__, message, advice, code), **more}), flush=True)
        drop_unwritten()
    return code


def _message_of(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, GteDeployError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def _error_object(kind: str, message: str, advice: str, code: int) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "advice": advice or None, "exit_code": code}}


def with_flags(message: str, kinds: Sequence[type], *, words: bool = True) -> str:
    """Replace the arguments of the Python API in a message by the flags that give them on the command line.

    Args:
        message: the message.
        kinds: the dataclasses of options that the command has; other names stay as they are.
        words: whether single names are replaced, too, and not only those with a value, as in backend='onnx'.
    """
    for name, flag in _flags(kinds).items():
        value = r"(?:'([^']*)'|\"([^\"]*)\"|([\w.+-]*[\w+-]))"
        message = re.sub(rf"(?<![\w.-]){name}={value}", partial(_flag_with, flag), message)
        if words:
            # A word alone is a name only if it cannot be one of plain English, or if the sentence says something of it.
            follows = "" if "_" in name else r"(?= (?:is|are|must|takes|was) |[ ]'| out\b)"
            begins = r"(?<![\w./'\"`=-])" if "_" in name else r"(?:^|(?<=; )|(?<=eave ))"
            message = re.sub(rf"{begins}{name}{follows}(?![\w'\"`=(-]|\.\w)", flag, message)
    return message


def _flag_with(flag: str, match: re.Match[str]) -> str:
    value = next(group for group in match.groups() if group is not None)
    return flag if value == "True" else f"{flag} {value}"


def _flags(kinds: Sequence[type]) -> Mapping[str, str]:
    """Name of an argument of the Python API -> the flag that people type for it."""
    found: dict[str, set[str]] = {}
    for kind in kinds:
        for name, (_, described) in options_of(kind).items():
            if not described.positional:
                flags = [flag for flag in flags_of(name, described) if flag.startswith("--")]
                found.setdefault(described.argument or name, set()).add(flags[-1])
    return {name: flags.pop() for name, flags in found.items() if len(flags) == 1}  # two meanings: neither


@contextlib.contextmanager
def _hub_progress(*, shown: bool) -> Iterator[None]:
    """Let downloads show progress only where the command does. huggingface_hub reads this when it is imported."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    if shown or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]

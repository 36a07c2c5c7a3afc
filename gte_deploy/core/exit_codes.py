"""The exit codes of the command lines."""

import os
import sys
from collections.abc import Mapping

from gte_deploy.core.errors import GteDeployError, InputError, MissingDependencyError, OutputExistsError

OK = 0
FAILURE = 1
USAGE = 2
MISSING_DEPENDENCY = 3
EXISTS = 4
INTERRUPTED = 130
BROKEN_PIPE = 141

# `gte-export --bounds report` ends with OK even if bounds are missed, because the user asked for such a bundle. Scripts
# find the misses in `missed_bounds` of --json.
MEANINGS: Mapping[int, str] = {
    OK: "done (with --bounds report also where bounds are missed)",
    FAILURE: "a bundle, checkpoint, corpus, export or model failed",
    USAGE: "wrong usage or bad input",
    MISSING_DEPENDENCY: "an optional dependency is not installed",
    EXISTS: "the output exists already (--force replaces what the command itself has written)",
    INTERRUPTED: "interrupted (129 by SIGHUP, 143 by SIGTERM)",
    BROKEN_PIPE: "the reader of the output went away",
}
"""Exit code -> its meaning, for `--help` and the documents."""


def exit_codes_help(**meanings: str) -> str:
    """Return the end of every `--help`; a program may replace a meaning, as in `INTERRUPTED="stopped"`."""
    own = {globals()[name]: text for name, text in meanings.items()}
    return "exit codes: " + "; ".join(f"{code} {own.get(code, text)}" for code, text in MEANINGS.items())


def reader_went_away() -> int:
    """Return the exit code for a closed stdout (`| head`), and leave the interpreter nothing to flush into it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def exit_code_of(error: GteDeployError) -> int:
    """The exit code of a command that one of the package's own errors ended."""
    if isinstance(error, MissingDependencyError):
        return MISSING_DEPENDENCY
    if isinstance(error, OutputExistsError):
        return EXISTS
    return USAGE if isinstance(error, InputError) else FAILURE

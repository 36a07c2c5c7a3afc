"""The exit codes of the command lines."""

import os
import sys

from gte_deploy.core.errors import GteDeployError, InputError, MissingDependencyError

OK = 0
FAILURE = 1
USAGE = 2
MISSING_DEPENDENCY = 3
INTERRUPTED = 130
BROKEN_PIPE = 141

# `gte-export --bounds report` ends with OK even if bounds are missed, because the user asked for such a bundle. Scripts
# find the misses in `missed_bounds` of --json.
HELP = (
    "exit codes: 0 done (with --bounds report also where bounds are missed); 1 a bundle, checkpoint, export or model "
    "failed; 2 wrong usage or bad input; 3 an optional dependency is not installed; 130 interrupted; 141 the reader of "
    "the output went away"
)


def reader_went_away() -> int:
    """Return the exit code for a closed stdout (`| head`), and leave the interpreter nothing to flush into it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def exit_code_of(error: GteDeployError) -> int:
    """The exit code of a command that one of the package's own errors ended."""
    if isinstance(error, MissingDependencyError):
        return MISSING_DEPENDENCY
    return USAGE if isinstance(error, InputError) else FAILURE

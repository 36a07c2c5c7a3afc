"""Completion of command lines in bash, zsh and fish: the scripts for the shells, and the words that they ask for.

A script runs the program itself with the words so far, and with `VARIABLE` in the environment; the program prints what
the last word may become. So the shells need no list of options, and no library. Where the program prints nothing, the
shell completes names of files.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Shell = Literal["bash", "zsh", "fish"]
SHELLS: tuple[Shell, ...] = get_args(Shell)
PROGRAMS = ("gte-deploy", "gte-export", "gte-train")
VARIABLE = "GTE_DEPLOY_COMPLETE"

_SCRIPTS: dict[Shell, str] = {
    "bash": """_gte_deploy_complete() {
    local IFS=$'\\n'
    COMPREPLY=($(VARIABLE=1 "${COMP_WORDS[0]}" "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _gte_deploy_complete PROGRAMS
""",
    "zsh": """#compdef PROGRAMS
_gte_deploy_complete() {
    local -a found
    found=("${(@f)$(VARIABLE=1 ${words[1]} "${(@)words[2,$CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[*]}" ]]; then compadd -a found; else _files; fi
}
compdef _gte_deploy_complete PROGRAMS
""",
    "fish": """function __gte_deploy_complete
    set -l words (commandline -opc) (commandline -ct)
    env VARIABLE=1 $words 2>/dev/null
end
for program in PROGRAMS
    complete -c $program -a '(__gte_deploy_complete)'
end
""",
}


def completion_script(shell: Shell) -> str:
    """Return the script that lets a shell complete the command lines of all programs."""
    return _SCRIPTS[shell].replace("VARIABLE", VARIABLE).replace("PROGRAMS", " ".join(PROGRAMS))


def candidates(parser: argparse.ArgumentParser, words: Sequence[str], commands: Iterable[str] = ()) -> list[str]:
    """Return what the last of `words` may become; empty where it is free, such as the name of a file.

    Args:
        parser: the parser of the command line.
        words: the words after the program's name; the last may be empty.
        commands: commands that the first word may be, besides those of the parser.
    """
    *before, word = words or [""]
    known = [*commands] if not before else []
    for index, each in enumerate(before):
        if inner := _commands_of(parser).get(each):
            parser, before = inner, before[index + 1 :]
            break
    if (values := _values(parser, before)) is not None:
        known = values
    elif word.startswith("-"):
        known = [flag for action in _shown(parser) for flag in action.option_strings if flag.startswith("--")]
    else:
        known += [name for name in _commands_of(parser)]
        known += [name for action in _shown(parser) if not action.option_strings for name in _choices(action)]
    return list(dict.fromkeys(name for name in known if name.startswith(word)))


def _values(parser: argparse.ArgumentParser, before: Sequence[str]) -> list[str] | None:
    """The values of the flag whose value comes next; None if none does."""
    flags = [index for index, word in enumerate(before) if word.startswith("-")]
    action = parser._option_string_actions.get(before[flags[-1]]) if flags else None
    if action is None or action.nargs == 0:
        return None
    takes_more = action.nargs in ("*", "+") or len(before) - 1 == flags[-1]
    return _choices(action) if takes_more else None


def _choices(action: argparse.Action) -> list[str]:
    # Of some options, the help shows only the choices that the format has, and the command checks them.
    if isinstance(action.metavar, str) and action.metavar.startswith("{"):
        return action.metavar[1:-1].split(",")
    is_value = action.choices is not None and not isinstance(action, argparse._SubParsersAction)
    return [str(choice) for choice in action.choices or ()] if is_value else []


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]

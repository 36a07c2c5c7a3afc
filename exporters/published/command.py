"""`gte-export verify-published`. Importing this loads no heavy library: --help and --list are quick."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

from gte_deploy._version import __version__
from gte_deploy.core.command_line import CommandParser, OutputOptions, progress_lines, run_command
from gte_deploy.core.errors import InputError
from gte_deploy.core.exit_codes import FAILURE, OK
from gte_deploy.core.options import Given, add_arguments, read_options
from gte_deploy.core.quiet import quiet_libraries
from gte_deploy.exporters.published.options import VERIFY_PUBLISHED, PublishedOptions
from gte_deploy.models.published import PUBLISHED, Published, published

_PROG = "gte-export"


def published_parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    parser = CommandParser(
        prog=f"{_PROG} {VERIFY_PUBLISHED}",
        description="Download published checkpoints, export each, and compare the bundle with PyTorch, with the "
        "checkpoint's own library and with the values that other projects recorded for it. A result is written for "
        "each, and the next run goes on after it. docs/checkpoints-verified.md lists the checkpoints.",
    )
    text = "hub id of the list, or its last part; @revision replaces the pinned one (default: all)"
    parser.add_argument("models", nargs="*", metavar="ID", help=text)
    kinds = tuple(dict.fromkeys(entry.family for entry in PUBLISHED.values()))
    parser.add_argument("--family", choices=kinds, metavar="FAMILY", help=f"all models of a family: {', '.join(kinds)}")
    parser.add_argument("--list", action="store_true", help="print the list and what is expected, and end")
    add_arguments(parser, PublishedOptions)
    add_arguments(parser, OutputOptions)
    parser.add_argument("--version", action="version", version=f"gte-deploy {__version__}")
    return parser


def run_published(given: Given) -> int:
    """Run the command; returns the exit code: 1 if any checkpoint is not verified."""
    folder = read_options(PublishedOptions, given).results
    said = f"interrupted; the results so far are in {folder}, and the same command goes on after them"
    return run_command(_PROG, partial(_run, given), given, kinds=[PublishedOptions], interrupted=said)


def _run(given: Given) -> int:
    chosen = _chosen(given["models"], given["family"])
    if given["list"]:
        print(_list(chosen), flush=True)
        return OK
    from gte_deploy.exporters.published.results import summary
    from gte_deploy.exporters.published.verify import verify_published

    with quiet_libraries(sys.stderr):
        results = verify_published(chosen, read_options(PublishedOptions, given), progress_lines(_PROG, given))
    if "json" in given:
        counts = Counter(result.verdict for result in results)
        print(json.dumps({"counts": counts, "results": [result.to_json() for result in results]}), flush=True)
    else:
        print(summary(results), flush=True)
    return OK if all(result.verdict == "verified" for result in results) else FAILURE


def _chosen(models: Sequence[str], family: str | None) -> list[Published]:
    """Return the checkpoints of the command line, each once; all if none is named."""
    if models and family:
        raise InputError("give models or --family, not both")
    if not models:
        return [entry for entry in PUBLISHED.values() if family in (None, entry.family)]
    entries = [published(name) for name in models]
    ids = Counter(entry.id for entry in entries)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise InputError(f"{', '.join(twice)} is given more than once")
    return entries


def _list(chosen: Sequence[Published]) -> str:
    from gte_deploy.exporters.published.recorded import RECORDED

    width = max(len(entry.id) for entry in chosen)
    lines = [f"{'id':<{width}}  {'family':<12}  {'task':<12}  {'revision':<8}  recorded values"]
    for entry in chosen:
        count = len(RECORDED.get(entry.id, ()))
        revision = (entry.revision or "-")[:8]
        values = f"{count} comparison{'s'[: count > 1]}" if count else "none known"
        lines.append(f"{entry.id:<{width}}  {entry.family:<12}  {entry.task:<12}  {revision:<8}  {values}")
    return "\n".join(lines)

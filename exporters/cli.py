"""`gte-export`: exports a checkpoint to a verified bundle. Results go to stdout, progress to stderr."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy._version import __version__
from gte_deploy.core.command_line import (
    CommandParser,
    OutputOptions,
    completes,
    progress_lines,
    run_command,
)
from gte_deploy.core.errors import InputError
from gte_deploy.core.exit_codes import FAILURE, OK, exit_codes_help
from gte_deploy.core.options import (
    Given,
    HelpFormatter,
    add_arguments,
    did_you_mean,
    flags_of,
    options_of,
    parse_given,
    read_options,
)
from gte_deploy.core.quiet import quiet_libraries
from gte_deploy.core.streams import prepare_streams
from gte_deploy.exporters.cli_options import (
    AdoptArguments,
    CheckArguments,
    ConvertArguments,
    ReplaceOptions,
    UploadOptions,
)
from gte_deploy.exporters.options import FORMATS, ExportOptions, targets_of
from gte_deploy.exporters.published.options import VERIFY_PUBLISHED
from gte_deploy.exporters.targets import target_classes
from gte_deploy.exporters.targets.base import Target, allowed_precisions
from gte_deploy.exporters.targets.tensorrt.runtimes import parse_capabilities
from gte_deploy.exporters.triton.options import TritonOptions

if TYPE_CHECKING:
    from gte_deploy.exporters.adoption import AdoptionResult
    from gte_deploy.exporters.conversion import Conversion
    from gte_deploy.exporters.export import ExportResult
    from gte_deploy.exporters.triton.repository import RepositoryResult

    _Result = ExportResult | RepositoryResult | AdoptionResult | Conversion

_PROG = "gte-export"
TRITON, CHECK, ADOPT, CONVERT = "triton", "check", "adopt", "convert"
_COMMANDS = {
    "onnx": "a bundle for ONNX Runtime and OpenVINO (the same as --format onnx)",
    "executorch": "a bundle with a program for phones and other devices (--format executorch)",
    "trt": "a bundle with a TensorRT engine (--format trt)",
    TRITON: "a model repository for Triton (--format triton)",
    ADOPT: "add an engine that trtexec built, on a Jetson for example, to its bundle",
    CONVERT: "write a checkpoint in another layout: that of transformers, or the original one",
    CHECK: "check the configurations of a Triton model repository",
    VERIFY_PUBLISHED: "export published checkpoints, and compare them with the values that others recorded",
}
_ADOPT_INTERRUPTED = "interrupted; the bundle is valid, with the engine or without one: run the same command again"
_TARGET_ALIASES = {"gpu": "cuda", "nvidia": "cuda", "onnxruntime": "cpu", "trt": "tensorrt", "intel": "openvino"}
_MODEL_HELP = "checkpoint folder, preset name, or hub id owner/name[@revision]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gte-export`; returns the exit code (see `gte_deploy.core.exit_codes`)."""
    prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    # A checkpoint folder with the name of a command must be given as ./onnx.
    command = words.pop(0) if words and words[0] in _COMMANDS else None
    parser = _parser(command, command or format_in(words))
    if completes(parser, argv, _COMMANDS):
        return OK
    return run_export(parser.parse_args(words), command)


def run_export(arguments: argparse.Namespace, command: str | None = None) -> int:
    """Run what the parsed arguments of an export or of a command ask for; returns the exit code."""
    given = vars(arguments)
    if command == VERIFY_PUBLISHED:
        from gte_deploy.exporters.published.command import run_published

        return run_published(given)
    if "check_repository" in given:
        return run_command(_PROG, partial(_check, given), given)
    kinds = (ExportOptions, *(kind.Options for kind in target_classes()), TritonOptions)
    work = partial(_run, _RUNS.get(command or "", _export), given)
    said = _ADOPT_INTERRUPTED if command == ADOPT else _what_was_interrupted
    return run_command(_PROG, work, given, kinds=kinds, interrupted=said)


def _what_was_interrupted() -> str:
    from gte_deploy.exporters.bundle.writer import written_last

    written = written_last()
    return f"interrupted; {'nothing was' if written is None else f'{written} is'} written"


def _run(make: "Callable[[Given], _Result]", given: Given) -> None:
    _check_push(given)
    with quiet_libraries(sys.stderr):  # of torch.onnx and transformers
        result = make(given)
    if "json" not in given:
        print(_result_text(result), flush=True)
    pushed = _push(result, given)
    if "json" in given:
        print(json.dumps({**_result_json(result), **pushed}), flush=True)


def format_in(words: Sequence[str]) -> str:
    """Return the value of `--format` if the words have a known one, else the default."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--format", default=FORMATS[0])
    try:
        found = str(finder.parse_known_args(list(words))[0].format)
    except argparse.ArgumentError:  # the full parser reports this error
        return FORMATS[0]
    return found if found in (*FORMATS, TRITON) else FORMATS[0]


def _parser(command: str | None, format: str) -> argparse.ArgumentParser:
    """Make the parser of a command, or for one format."""
    if command == CHECK:
        return _check_parser()
    if command == ADOPT:
        return _adopt_parser()
    if command == CONVERT:
        return _convert_parser()
    if command == VERIFY_PUBLISHED:
        # The table of the published checkpoints is for this command alone.
        from gte_deploy.exporters.published.command import published_parser

        return published_parser()
    parser = CommandParser(prog=_PROG if command is None else f"{_PROG} {command}")
    add_export_arguments(parser, format, command)
    if command is None:
        lines = "".join(f"\n  gte-export {name:<17} {text}" for name, text in _COMMANDS.items())
        parser.epilog = f"commands, each with a --help of its own:{lines}\n\n{exit_codes_help()}"
    return parser


def add_export_arguments(parser: argparse.ArgumentParser, format: str, command: str | None = None) -> None:
    """Add the arguments of an export to one format to a parser. `--help` does not show the options of other formats.

    Args:
        parser: the parser, of this command line or of another one.
        format: the format, or the value of `--format`; see `format_in`.
        command: the command that stands for the format, if one was given.
    """
    parser.description = "Export a checkpoint to a bundle that is compared with PyTorch before it is written."
    parser.epilog = exit_codes_help()
    parser.formatter_class = HelpFormatter
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("output_argument", nargs="?", metavar="OUTPUT", help="folder of the bundle")
    parser.add_argument("-m", "--model", help="the same as MODEL (default: the built-in gte-en-mlm-tiny)")
    parser.add_argument("-o", "--output", help="the same as OUTPUT (default: MODEL-FORMAT-PRECISION, here)")
    hint = argparse.SUPPRESS if command else "what is written; --help shows the options of each (default: onnx)"
    parser.add_argument("--format", choices=(*FORMATS, TRITON), default=format, help=hint)
    targets = _targets_for(format)
    if len(targets) > 1:
        text = f"where the graph runs (default: {next(iter(targets))})"
        parser.add_argument("--target", default=argparse.SUPPRESS, metavar="{" + ",".join(targets) + "}", help=text)
    add_arguments(parser, ExportOptions, format=format)
    precisions = dict.fromkeys(precision for kind in targets.values() for precision in kind.precisions)
    parser._option_string_actions["--precision"].metavar = "{" + ",".join(precisions) + "}"
    if format == TRITON:
        add_arguments(parser.add_argument_group("the repository (MODEL may be a bundle)"), TritonOptions)
    for kind in targets.values():
        if options_of(kind.Options):
            add_arguments(parser.add_argument_group(f"options for {kind.title}"), kind.Options, format=format)
    for other in (*(kind.Options for kind in target_classes()), TritonOptions):
        add_arguments(parser, other, hidden=True)
    parser.add_argument("--check-repository", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_arguments(parser, ReplaceOptions)
    if format != TRITON:
        add_arguments(parser, UploadOptions)
    _add_output_options(parser)


def _targets_for(format: str) -> dict[str, type[Target]]:
    """Return the targets of a format by name; Triton has those of ONNX Runtime."""
    if format != TRITON:
        return dict(targets_of(format))
    return {name: kind for name, kind in targets_of("onnx").items() if "onnxruntime" in kind.engines}


def _check_parser() -> argparse.ArgumentParser:
    text = "Check the configurations of a Triton model repository, and print what is wrong, a line for each."
    return _command_parser(CHECK, text, CheckArguments)


def _adopt_parser() -> argparse.ArgumentParser:
    text = (
        "Add a TensorRT engine that another tool built, such as trtexec on a Jetson, to the bundle that has its graph. "
        "It needs the GPU of the engine and the TensorRT that built it, and no PyTorch."
    )
    return _command_parser(ADOPT, text, AdoptArguments)


def _convert_parser() -> argparse.ArgumentParser:
    text = (
        "Write a checkpoint in another layout. Every weight is kept, bit for bit; tokenizer, modules of "
        "sentence-transformers, prompts, card and licence are copied."
    )
    return _command_parser(CONVERT, text, ConvertArguments)


def _command_parser(command: str, description: str, *kinds: type) -> argparse.ArgumentParser:
    parser = CommandParser(prog=f"{_PROG} {command}", description=description)
    for kind in kinds:
        add_arguments(parser, kind)
    _add_output_options(parser)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, OutputOptions)
    parser.add_argument("--version", action="version", version=f"gte-deploy {__version__}")


def _export(given: Given) -> "ExportResult | RepositoryResult":
    model, output = (_given_once(given, name) for name in ("model", "output"))
    format = given["format"]
    is_triton = format == TRITON
    if given.get("engine") is not None and given["model"] is None and output is None:
        model, output = None, model  # the engine is in place of MODEL, so what stands alone is OUTPUT
    target = _target_of(format, given.get("target"))
    kinds = (ExportOptions, target.Options, *((TritonOptions,) if is_triton else ()))
    _refuse_others(given, target, kinds, format)
    options = {name: value for kind in kinds for name, value in parse_given(kind, given).items()}
    if "target" in given:
        options["target"] = target.name
    common: dict[str, Any] = {"force": "force" in given, "progress": progress_lines(_PROG, given)}
    if is_triton:
        from gte_deploy.exporters.triton.repository import export_repository

        return export_repository(model, output, **common, **options)
    from gte_deploy.exporters.export import export

    return export(model, output, **common, format=format, **options)


def _adopt(given: Given) -> "AdoptionResult":
    from gte_deploy.exporters.adoption import adopt

    arguments = read_options(AdoptArguments, given)
    return adopt(**vars(arguments), progress=progress_lines(_PROG, given))


def _convert(given: Given) -> "Conversion":
    from gte_deploy.exporters.conversion import convert

    arguments = read_options(ConvertArguments, given)
    return convert(**vars(arguments), progress=progress_lines(_PROG, given))


_RUNS: "Mapping[str, Callable[[Given], _Result]]" = {ADOPT: _adopt, CONVERT: _convert}


def _check_push(given: Given) -> None:
    """Refuse a push that cannot succeed before the export, which takes minutes.

    Raises:
        InputError: the repository is no name of the hub, there is no token, or there is nothing to push.
    """
    if "push_to_hub" in given:
        from gte_deploy.bundle.upload import require_pushable

        require_pushable(given["push_to_hub"])
    elif "private" in given:
        raise InputError("--private is for a new repository on the hub; give its name with --push-to-hub")


def _push(result: "_Result", given: Given) -> dict[str, Any]:
    """Push a new bundle if that was asked for; return what the JSON says about it."""
    if "push_to_hub" not in given:
        return {}
    from gte_deploy.bundle.upload import push_to_hub

    pushed = push_to_hub(result.path, given["push_to_hub"], private="private" in given)
    if "json" not in given:
        print(pushed.describe(), flush=True)
    return {"pushed": dataclasses.asdict(pushed)}


def _given_once(given: Mapping[str, Any], name: str) -> str | None:
    """Return the value given by position or by flag."""
    by_flag, by_place = given[name], given[f"{name}_argument"]
    if by_flag is not None and by_place is not None:
        raise InputError(f"{name.upper()} and --{name} are the same; give one of them")
    return by_place if by_flag is None else by_flag


def _target_of(format: str, name: str | None) -> type[Target]:
    known = _targets_for(format)
    name = None if name is None else _TARGET_ALIASES.get(name.casefold(), name.casefold())
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        raise _wrong_target(format, name, known)
    return known[name]


def _wrong_target(format: str, name: str, known: Mapping[str, type[Target]]) -> InputError:
    """Return the error for a target that a format does not have; it says what has that target."""
    takes = f"--format {format} takes --target {' or '.join(known)}, not {name}"
    if name in targets_of("onnx"):
        return InputError(takes)
    format_of = {kind.name: kind.format for kind in target_classes()}
    try:
        asked = format_of.get(name) or bool(parse_capabilities(name)) and "trt"
    except InputError:
        return InputError(f"{takes}{did_you_mean(name, known)}")
    if asked != "trt":
        return InputError(f"--target {name} is for --format {asked}; {takes}")
    own = "" if name in format_of else f" --target {name}"
    return InputError(
        f"--target {name} is for --format trt; {takes}.",
        advice=f"`gte-export trt MODEL{own}` builds a TensorRT engine for it, and `gte-export MODEL --target cuda` a "
        "graph for ONNX Runtime on any of these GPUs.",
    )


def _refuse_others(given: Mapping[str, Any], target: type[Target], kinds: Sequence[type], format: str) -> None:
    """Refuse options that do not belong to this target, this precision or this format.

    Raises:
        InputError: an option belongs to other targets, precisions or formats; the error names them.
    """
    precision = given.get("precision") or target.precisions[0]
    if precision not in target.precisions:
        raise InputError(_not_in_precision(precision, target))
    known = {}
    for name, (default, described) in (each for kind in kinds for each in options_of(kind).items()):
        known[name] = described
        if format in described.not_for and given.get(name, default) != default:
            raise InputError(f"{flags_of(name, described)[0]} {given[name]} is not for --format {format}; leave it out")
    for kind in (*(other.Options for other in target_classes()), TritonOptions):
        for name, (_, described) in options_of(kind).items():
            if name not in given:
                continue
            flag = flags_of(name, described)[0]
            if name not in known:
                raise InputError(f"{flag} is for {_takers(name)}")
            if (allowed := allowed_precisions(known[name], target)) and precision not in allowed:
                raise InputError(f"{flag} is for --precision {' and '.join(allowed)}")


def _takers(name: str) -> str:
    """Return the command line's flags for the targets that take an option of this name."""
    if name in options_of(TritonOptions):
        return f"--format {TRITON}"
    return " and ".join(_asked_by(kind) for kind in target_classes() if name in options_of(kind.Options))


def _asked_by(kind: type[Target]) -> str:
    """Return the command line's flag for a target."""
    return f"--format {kind.format}" if len(targets_of(kind.format)) == 1 else f"--target {kind.name}"


def _not_in_precision(precision: str, target: type[Target]) -> str:
    takers = " or ".join(_asked_by(kind) for kind in target_classes() if precision in kind.precisions)
    return f"--precision {precision} is for {takers}; {_asked_by(target)} is written in {', '.join(target.precisions)}."


def _check(given: Given) -> int:
    """Print one line for each problem of a repository, and return the exit code."""
    from gte_deploy.exporters.triton.checks import check_repository

    path = Path(given["check_repository"])
    problems = check_repository(path)
    if "json" in given:
        print(json.dumps({"path": str(path), "problems": problems}))
    else:
        print("\n".join(problems) or f"{path}: no problem was found")
    return FAILURE if problems else OK


def _result_json(result: "_Result") -> dict[str, object]:
    from gte_deploy.exporters.adoption import AdoptionResult
    from gte_deploy.exporters.conversion import Conversion
    from gte_deploy.exporters.triton.repository import RepositoryResult

    if isinstance(result, Conversion):
        return {**dataclasses.asdict(result), "path": str(result.path)}
    if isinstance(result, AdoptionResult):
        return {"path": str(result.path), "plan": result.plan.to_json(), "size": result.size}
    if isinstance(result, RepositoryResult):
        return {
            "path": str(result.path),
            "ensembles": list(result.ensembles),
            "devices": list(result.devices),
            "checked": result.checked,
            "files": {name: entry.size for name, entry in result.files.items()},
        }
    return {
        "path": str(result.path),
        "task": result.manifest.spec.task,
        "precision": result.manifest.precision,
        "files": {name: entry.size for name, entry in result.manifest.files.items()},
        "fusions": dict(next(iter(result.manifest.graphs.values())).fusions) if result.manifest.graphs else {},
        "plan": result.manifest.plan and result.manifest.plan.to_json(),
        "missed_bounds": list(result.manifest.missed_bounds),
        "kept_groups": list(result.kept_groups),
        "parity": result.parity.to_json(),
    }


def _result_text(result: "_Result") -> str:
    from gte_deploy.exporters.adoption import AdoptionResult
    from gte_deploy.exporters.conversion import Conversion
    from gte_deploy.exporters.triton.repository import RepositoryResult

    if isinstance(result, Conversion):
        return result.describe()
    if isinstance(result, AdoptionResult):
        engine, size = result.plan, result.size / 1e6
        closing = f"bundle {result.path}: engine {engine.path} ({size:.1f} MB)"
        return "\n".join([*engine.describe(), *engine.caveats, closing])
    files = result.files if isinstance(result, RepositoryResult) else result.manifest.files
    megabytes = sum(entry.size for entry in files.values()) / 1e6
    if isinstance(result, RepositoryResult):
        checks = "its configurations pass the checks" if result.checked else "its configurations were not checked"
        devices = " and ".join(name.upper() for name in result.devices)
        return (
            f"repository {result.path} ({megabytes:.1f} MB) for {devices}; {checks}\n"
            f"models to request: {', '.join(result.ensembles)}; how to start the server: {result.path}/README.md"
        )
    from gte_deploy.exporters.verification.report import format_table

    plan, missed, calibration = result.manifest.plan, result.manifest.missed_bounds, result.manifest.calibration
    return "\n".join(
        [
            format_table(result.parity),
            *(() if calibration is None else [f"calibrated on {calibration.describe()}"]),
            *_kept(result),
            *(() if plan is None else plan.describe()),
            *(("the bundle MISSES ITS BOUNDS, as its manifest records:",) if missed else ()),
            *(f"  {line}" for line in missed),
            f"bundle {result.path} ({megabytes:.1f} MB), report {result.path}/report.html",
        ]
    )


def _kept(result: "ExportResult") -> Iterator[str]:
    """Say which layers have no 8 bits; what each costs is in the report."""
    if kept := result.kept_groups:
        count = f"{len(kept)} of {len(result.sensitivity)} groups of layers stay in a higher precision"
        yield f"{count}, so that the bounds hold; the report says what each costs: {', '.join(kept)}"


if __name__ == "__main__":
    sys.exit(main())

"""`gte-export`: a checkpoint in, a verified bundle out. Results on stdout, progress on stderr."""

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from gte_deploy._version import __version__
from gte_deploy.errors import GteDeployError
from gte_deploy.exit_codes import BROKEN_PIPE, FAILURE, HELP, INTERRUPTED, OK, USAGE, exit_code_of
from gte_deploy.exporters.export import ACTIVATIONS, ExportResult, export
from gte_deploy.spec import LOGITS, POOLINGS, PRECISIONS, TASKS

FORMATS = ("onnx", "trt", "triton")
_LATER_PRECISIONS = ("fp16", "bf16", "fp8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gte-export`; returns the exit code (see `gte_deploy.exit_codes`)."""
    arguments = _parser().parse_args(argv)
    if (reason := _not_in_this_version(arguments)) is not None:
        return _fail(arguments, reason, USAGE)
    try:
        with _quiet_libraries():
            result = _export(arguments)
        print(json.dumps(_result_json(result)) if arguments.json else _result_text(result), flush=True)
    except GteDeployError as error:
        return _fail(arguments, str(error), exit_code_of(error), error)
    except BrokenPipeError:
        # The reader went away (`| head`): leave nothing for the interpreter to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(arguments, str(error), FAILURE)
    except KeyboardInterrupt:
        return _fail(arguments, "interrupted; nothing was written", INTERRUPTED)
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gte-export",
        description="Export a GTE checkpoint to a bundle that is proven equal to PyTorch before it is written.",
        epilog=HELP,
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="checkpoint folder, hub id or preset name")
    parser.add_argument("output_argument", nargs="?", metavar="OUTPUT", help="folder of the bundle")
    parser.add_argument("-m", "--model", help="the same as MODEL (default: the built-in gte-en-mlm-tiny)")
    parser.add_argument("-o", "--output", help="the same as OUTPUT (default: MODEL-FORMAT-PRECISION, here)")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument("--task", choices=("auto", *TASKS), default="auto", help="default: what the checkpoint is for")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument("--calibration", metavar="FILE", help="int8: UTF-8, one text a line (default: English prose)")
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, default="static", help="int8 on ONNX Runtime; default: %(default)s"
    )
    parser.add_argument("--reduce-range", action="store_true", help="int8: 7-bit weights, for CPUs without VNNI")
    parser.add_argument("--max-len", type=int, metavar="TOKENS", help="longest input (default: the checkpoint's)")
    parser.add_argument("--opset", type=int, help="ONNX opset (default: the one the graph is tested with)")
    parser.add_argument("--pooling", choices=("auto", *POOLINGS), default="auto", help="default: the checkpoint's")
    parser.add_argument(
        "--logits", choices=LOGITS, default="masked", help="fill-mask: logits of the masks (default) or of every token"
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there already")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--version", action="version", version=f"gte-deploy {__version__}")
    return parser


def _not_in_this_version(arguments: argparse.Namespace) -> str | None:
    """Why these arguments cannot be served, or None."""
    if arguments.format != "onnx":
        return f"--format {arguments.format} is not in gte-deploy {__version__}; it writes onnx"
    if arguments.precision in _LATER_PRECISIONS:
        return (
            f"--precision {arguments.precision} is not in gte-deploy {__version__}; it writes fp32, int8, "
            "int8-weight and int4-weight. "
            "A CPU that has bfloat16 takes the fp32 bundle: load(…, backend='openvino', precision='bf16')."
        )
    if arguments.precision != "int8":
        for name, default in (("calibration", None), ("activations", "static"), ("reduce_range", False)):
            if getattr(arguments, name) != default:
                return f"--{name.replace('_', '-')} is for --precision int8"
    for name in ("model", "output"):
        if getattr(arguments, name) is not None and getattr(arguments, f"{name}_argument") is not None:
            return f"{name.upper()} and --{name} are the same; give one of them"
    return None


def _export(arguments: argparse.Namespace) -> ExportResult:
    return export(
        arguments.model or arguments.model_argument,
        arguments.output or arguments.output_argument,
        task=arguments.task,
        precision=arguments.precision,
        max_length=arguments.max_len,
        pooling=arguments.pooling,
        logits=arguments.logits,
        opset=arguments.opset,
        calibration=arguments.calibration,
        activations=arguments.activations,
        reduce_range=arguments.reduce_range,
        force=arguments.force,
        progress=None if arguments.quiet else _tell,
    )


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what torch.onnx and transformers say of themselves off the screen, and all of it off stdout."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def _tell(line: str) -> None:
    print(f"gte-export: {line}", file=sys.stderr, flush=True)


def _fail(arguments: argparse.Namespace, message: str, code: int, error: GteDeployError | None = None) -> int:
    print(f"gte-export: error: {message}", file=sys.stderr)
    if arguments.json:
        # BoundMissedError has a report; naming its class here would import torch.
        report = getattr(error, "report", None)
        print(json.dumps({"error": message, "exit_code": code, "parity": report and report.to_json()}))
    return code


def _result_json(result: ExportResult) -> dict[str, object]:
    return {
        "path": str(result.path),
        "task": result.manifest.spec.task,
        "precision": result.manifest.precision,
        "files": {name: entry.size for name, entry in result.manifest.files.items()},
        "fusions": dict(result.manifest.graphs["onnxruntime"].fusions),
        "parity": result.parity.to_json(),
    }


def _result_text(result: ExportResult) -> str:
    from gte_deploy.exporters.report import format_table  # matplotlib; --help does without

    megabytes = sum(entry.size for entry in result.manifest.files.values()) / 1e6
    return f"{format_table(result.parity)}\nbundle {result.path} ({megabytes:.1f} MB), report {result.path}/report.html"

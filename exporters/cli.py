"""`gte-export`: a checkpoint in, a verified bundle out. Results on stdout, progress on stderr."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gte_deploy._version import __version__
from gte_deploy.errors import GteDeployError
from gte_deploy.exit_codes import BROKEN_PIPE, FAILURE, HELP, INTERRUPTED, OK, USAGE, exit_code_of
from gte_deploy.exporters.cuda_options import CUDA_PRECISIONS, PADDINGS
from gte_deploy.exporters.export import ACTIVATIONS, BOUNDS, FORMAT_PRECISIONS, ExportResult, export
from gte_deploy.exporters.profiles import parse_profile
from gte_deploy.exporters.tensorrt_engine import RUNTIMES, TensorRTOptions, parse_targets
from gte_deploy.exporters.triton import command as triton
from gte_deploy.exporters.triton_repository import RepositoryResult
from gte_deploy.spec import LOGITS, POOLINGS, PRECISIONS, TASKS

CALIBRATORS = ("max", "percentile", "entropy")
# Option -> its value where nothing was said, by what it is for.
_INT8_ONNX = {"activations": "static", "reduce_range": False}
_TENSORRT = {
    "runtime": "auto",
    "profile": None,
    "lengths": None,
    "calibrator": None,
    "onnx_only": False,
    "keep_onnx": False,
    "workspace": None,
    "timing_cache": None,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gte-export`; returns the exit code (see `gte_deploy.exit_codes`)."""
    arguments = _parser().parse_args(argv)
    arguments.triton = arguments.format == "triton"
    if arguments.triton:
        arguments.format = "onnx"  # what a repository is made of
    if (reason := _contradiction(arguments)) is not None:
        return _fail(arguments, reason, USAGE)
    try:
        if "check_repository" in arguments:
            return triton.check(arguments)
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
    parser.add_argument("--format", choices=(*FORMAT_PRECISIONS, "triton"), default="onnx", help="default: %(default)s")
    parser.add_argument("--task", choices=("auto", *TASKS), default="auto", help="default: what the checkpoint is for")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 for onnx, fp16 for trt and cuda")
    parser.add_argument(
        "--target", metavar="WHERE", help="onnx: cpu (default) or cuda; trt: GPUs, such as sm86,sm89,sm120"
    )
    parser.add_argument(
        "--padding",
        choices=PADDINGS,
        default="auto",
        help="default: --target cuda removes it in fp16, --format trt keeps it; remove takes TensorRT 11.1",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="int8, fp8: UTF-8, one text a line (default: English prose)"
    )
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
    parser.add_argument(
        "--bounds",
        choices=BOUNDS,
        default="strict",
        help="report: write a bundle that misses its bounds too, with the misses in its manifest; default: %(default)s",
    )
    _add_tensorrt(parser.add_argument_group("TensorRT (--format trt)"))
    triton.add_options(parser.add_argument_group("Triton (--format triton, where MODEL may be a bundle)"))
    parser.set_defaults(triton=False)
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there already")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--version", action="version", version=f"gte-deploy {__version__}")
    return parser


def _add_tensorrt(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--runtime", choices=RUNTIMES, default="auto", help="default: tensorrt with a GPU, else rtx")
    group.add_argument(
        "--profile",
        action="append",
        metavar="MIN:OPT:MAX",
        help="batch x sequence, such as 1x1:8x128:32x512 (with --padding remove, texts x tokens of all); several times "
        "for several (default: short, middle, long)",
    )
    group.add_argument("--lengths", metavar="FILE", help="make profiles of your lengths: one number of tokens a line")
    group.add_argument("--calibrator", choices=CALIBRATORS, help="int8, fp8: how ranges are cut (default: max)")
    group.add_argument("--onnx-only", action="store_true", help="write the graph and the trtexec line, no engine")
    group.add_argument("--keep-onnx", action="store_true", help="leave the graph in the bundle, beside the engine")
    group.add_argument("--workspace", type=int, metavar="MIB", help="scratch of the builder (default: 4096)")
    group.add_argument("--timing-cache", metavar="FILE", help="of an earlier build, to make this one faster")


def _contradiction(arguments: argparse.Namespace) -> str | None:
    """Why these arguments do not go together, or None."""
    if not arguments.triton and (given := triton.given_options(arguments)):
        return f"--{next(iter(given)).replace('_', '-')} is for --format triton"
    is_cuda = arguments.format == "onnx" and arguments.target == "cuda"
    precisions = CUDA_PRECISIONS if is_cuda else FORMAT_PRECISIONS[arguments.format]
    precision = arguments.precision or precisions[0]
    if arguments.format == "onnx" and arguments.target not in (None, "cpu", "cuda"):
        return f"--target {arguments.target} is for --format trt; --format onnx takes cpu or cuda"
    if arguments.padding != "auto" and not (is_cuda or arguments.format == "trt"):
        return "--padding is for --target cuda and --format trt"
    if is_cuda and precision not in precisions:
        return f"--precision {precision} is not for --target cuda, which is written in {', '.join(precisions)}"
    if precision not in precisions:
        served = [name for name, precisions in FORMAT_PRECISIONS.items() if precision in precisions]
        reason = (
            f"--precision {precision} is for --format {' or '.join(served)}; --format {arguments.format} is written in "
            f"{', '.join(FORMAT_PRECISIONS[arguments.format])}"
        )
        if arguments.format == "trt":
            return reason
        return (
            f"{reason}, or with --target cuda in {', '.join(CUDA_PRECISIONS)}. A CPU that has bfloat16 takes the fp32 "
            "bundle: load(…, backend='openvino', precision='bf16')."
        )
    unused = {**({} if arguments.format == "trt" else _TENSORRT), **({} if precision == "int8" else _INT8_ONNX)}
    for name, default in unused.items():
        if getattr(arguments, name) != default:
            wanted = "--format trt" if name in _TENSORRT else "--precision int8"
            return f"--{name.replace('_', '-')} is for {wanted}"
    if precision not in ("int8", "fp8"):
        for name in ("calibration", "calibrator"):
            if getattr(arguments, name) is not None:
                return f"--{name} is for --precision int8 and fp8"
    for name in ("model", "output"):
        if getattr(arguments, name) is not None and getattr(arguments, f"{name}_argument") is not None:
            return f"{name.upper()} and --{name} are the same; give one of them"
    return None


def _export(arguments: argparse.Namespace) -> ExportResult | RepositoryResult:
    model = arguments.model or arguments.model_argument
    output = arguments.output or arguments.output_argument
    progress = None if arguments.quiet else _tell
    options: dict[str, Any] = {
        "format": arguments.format,
        "target": (arguments.target or "cpu") if arguments.format == "onnx" else "cpu",
        "task": arguments.task,
        "precision": arguments.precision,
        "max_length": arguments.max_len,
        "pooling": arguments.pooling,
        "logits": arguments.logits,
        "opset": arguments.opset,
        "calibration": arguments.calibration,
        "activations": arguments.activations,
        "reduce_range": arguments.reduce_range,
        "padding": arguments.padding,
        "bounds": arguments.bounds,
        "tensorrt": _tensorrt_options(arguments) if arguments.format == "trt" else None,
    }
    if arguments.triton:
        defaults = inspect.signature(export).parameters
        given = {name: value for name, value in options.items() if value != defaults[name].default}
        return triton.run(arguments, model, output, progress, **given)
    return export(model, output, force=arguments.force, progress=progress, **options)


def _tensorrt_options(arguments: argparse.Namespace) -> TensorRTOptions:
    given = {
        "targets": arguments.target and parse_targets(arguments.target),
        "profiles": tuple(map(parse_profile, arguments.profile or ())),
        "lengths": arguments.lengths and Path(arguments.lengths),
        "calibrator": arguments.calibrator,
        "workspace": arguments.workspace and arguments.workspace << 20,
        "timing_cache": arguments.timing_cache and Path(arguments.timing_cache),
    }
    return TensorRTOptions(
        runtime=arguments.runtime,
        onnx_only=arguments.onnx_only,
        keep_onnx=arguments.keep_onnx,
        **{name: value for name, value in given.items() if value},
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


def _result_json(result: ExportResult | RepositoryResult) -> dict[str, object]:
    if isinstance(result, RepositoryResult):
        return triton.result_json(result)
    return {
        "path": str(result.path),
        "task": result.manifest.spec.task,
        "precision": result.manifest.precision,
        "files": {name: entry.size for name, entry in result.manifest.files.items()},
        "fusions": dict(next(iter(result.manifest.graphs.values())).fusions) if result.manifest.graphs else {},
        "plan": result.manifest.plan and dataclasses.asdict(result.manifest.plan),
        "missed_bounds": list(result.manifest.missed_bounds),
        "parity": result.parity.to_json(),
    }


def _result_text(result: ExportResult | RepositoryResult) -> str:
    if isinstance(result, RepositoryResult):
        return triton.result_text(result)
    from gte_deploy.exporters.report import format_table, plan_lines  # matplotlib; --help does without

    megabytes = sum(entry.size for entry in result.manifest.files.values()) / 1e6
    plan, missed = result.manifest.plan, result.manifest.missed_bounds
    return "\n".join(
        [
            format_table(result.parity),
            *(() if plan is None else plan_lines(plan)),
            *(("the bundle MISSES ITS BOUNDS, which its manifest says:",) if missed else ()),
            *(f"  {line}" for line in missed),
            f"bundle {result.path} ({megabytes:.1f} MB), report {result.path}/report.html",
        ]
    )

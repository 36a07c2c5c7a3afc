"""`gte-train`: prepare a corpus, run a recipe, export, and the checks around them."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gte_deploy._version import __version__
from gte_deploy.errors import GteDeployError, MissingDependencyError
from gte_deploy.exit_codes import FAILURE, INTERRUPTED, OK, exit_code_of
from gte_deploy.models import builtin_path

# Sub-commands in modules of their own: `add_arguments(parser)` and `run(args) -> int`, imported when they are called.
_MODULES = {
    "estimate": ("gte_deploy.training.estimate", "FLOPs, tokens, memory and hours of a recipe on a number of GPUs"),
    "glue": ("gte_deploy.training.evaluation.glue", "fine-tune and score on the eight GLUE tasks"),
    "extrapolate": (
        "gte_deploy.training.evaluation.extrapolation",
        "masked-token loss by position, up to the longest length",
    ),
}
_EPILOG = (
    "exit codes: 0 done; 1 a recipe, corpus, checkpoint or model failed; 2 wrong usage or bad input; 3 an optional "
    "dependency is not installed; 130 stopped by SIGTERM or SIGINT, with a checkpoint written: run the same command "
    "again to go on"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; results go to stdout, progress and log to stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _show_log()
    try:
        args = build_parser(argv).parse_args(argv)
        return args.run(args)
    except GteDeployError as error:
        print(f"gte-train: {error}", file=sys.stderr)
        return exit_code_of(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gte_deploy"):
            raise
        missing = MissingDependencyError(error.name, "train")
        print(f"gte-train: {missing}", file=sys.stderr)
        return exit_code_of(missing)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder without permission
        print(f"gte-train: {error}", file=sys.stderr)
        return FAILURE


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; the arguments of a sub-command in another module are added if `argv` calls it."""
    parser = argparse.ArgumentParser(prog="gte-train", description=__doc__, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(commands.add_parser("prepare", help="text to memory-mapped token shards", epilog=_EPILOG))
    _add_run(commands.add_parser("run", help="run a recipe, or go on with it", epilog=_EPILOG))
    _add_export(commands.add_parser("export", help="a checkpoint as a Hugging Face folder", epilog=_EPILOG))
    for name, (module, description) in _MODULES.items():
        command = commands.add_parser(name, help=description, description=description, epilog=_EPILOG)
        if name in argv[:1]:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder or glob of .json.gz, .jsonl, .parquet, .txt, or hf:NAME[@REVISION][:CONFIG[:SPLIT]]; "
        "LANGUAGE=INPUT names its language",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=builtin_path(),
        help="checkpoint folder with a tokenizer.json (default: the built-in model's, bert-base-uncased)",
    )
    parser.add_argument("--workers", type=int, default=_usable_cpus(), help="processes (default: %(default)s)")
    parser.add_argument("--text-column", default="text", help="field of the text (default: %(default)s)")
    parser.add_argument(
        "--document-break",
        choices=["blank-line", "file"],
        default="blank-line",
        help="what ends a document of plain text (default: %(default)s)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count and skip records that cannot be read")
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=16 << 20,
        help="a longer document is a bad record (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is already there")
    parser.add_argument("--restart", action="store_true", help="discard what an interrupted run left")
    parser.set_defaults(run=_prepare)


def _prepare(args: argparse.Namespace) -> int:
    from gte_deploy.models.checkpoint import copy_tokenizer
    from gte_deploy.training.data.corpus import describe
    from gte_deploy.training.data.prepare import prepare
    from gte_deploy.training.export import TOKENIZER_FOLDER

    corpus = prepare(
        args.inputs,
        args.output,
        tokenizer=args.tokenizer,
        workers=args.workers,
        text_column=args.text_column,
        document_break=args.document_break,
        skip_bad=args.skip_bad,
        max_document_bytes=args.max_document_bytes,
        overwrite=args.overwrite,
        restart=args.restart,
        progress=True,
    )
    source = args.tokenizer if args.tokenizer.is_dir() else args.tokenizer.parent
    copy_tokenizer(source, args.output / TOKENIZER_FOLDER)
    print(describe(corpus))
    return OK


def _add_run(parser: argparse.ArgumentParser) -> None:
    from gte_deploy.training.recipe import shipped_recipes

    parser.add_argument("recipe", help=f"YAML file, or one of {', '.join(shipped_recipes())}")
    parser.add_argument("--data", type=Path, required=True, help="corpus folder that `gte-train prepare` wrote")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the run; one that has checkpoints goes on"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as in stages.0.steps=10"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with the tokenizer.json of the corpus (default: DATA/tokenizer)"
    )
    parser.add_argument("--peak-tflops", type=float, help="of one device, for the share of peak; known GPUs need none")
    parser.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard events")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from gte_deploy.training.recipe import load_recipe
    from gte_deploy.training.train import train

    result = train(
        load_recipe(args.recipe, overrides=args.set),
        data=args.data,
        output=args.output,
        device=args.device,
        progress=sys.stderr,
        tensorboard=not args.no_tensorboard,
        tokenizer=args.tokenizer,
        peak_flops=args.peak_tflops * 1e12 if args.peak_tflops else None,
    )
    if not result.finished:
        return INTERRUPTED
    if _is_main():
        print(result.model)
    return OK


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run for its newest one")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--layout",
        choices=["native", "original"],
        default="native",
        help="native: transformers' own GTE; original: as the published checkpoints (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: the run's)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="of the stored weights (default: %(default)s)",
    )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    import torch

    from gte_deploy.training.export import export_checkpoint, find_checkpoint

    checkpoint = find_checkpoint(args.checkpoint)
    dtype = getattr(torch, args.dtype)
    export_checkpoint(checkpoint, args.output, layout=args.layout, tokenizer=args.tokenizer, dtype=dtype)
    print(args.output)
    return OK


def _show_log() -> None:
    """Log to stderr; of several ranks only the first tells more than warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("gte_deploy")
    if not root.handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO if _is_main() else logging.ERROR)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())

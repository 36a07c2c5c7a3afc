"""`gte-train`: prepare a corpus, estimate and run a recipe, export a checkpoint, and evaluate a model.

Each command has a function that adds its arguments and a function that runs it. This module imports nothing heavy:
torch and transformers are imported by the command that needs them, after its arguments were parsed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gte_deploy._version import __version__
from gte_deploy.core.errors import GteDeployError, MissingDependencyError
from gte_deploy.core.exit_codes import FAILURE, INTERRUPTED, OK, exit_code_of
from gte_deploy.core.files import write_text
from gte_deploy.models import builtin_path
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.evaluation.glue_tasks import TASKS, Protocol
from gte_deploy.training.flops import GPUS
from gte_deploy.training.recipe import load_recipe, shipped_recipes

logger = logging.getLogger("gte_deploy.training.cli")  # also where the module runs as __main__

_DESCRIPTION = "Prepare a corpus, estimate and run a recipe, export a checkpoint, and evaluate a model."
_EPILOG = (
    "exit codes: 0 done; 1 a recipe, corpus, checkpoint or model failed; 2 wrong usage or bad input; 3 an optional "
    "dependency is not installed; 130 stopped by SIGTERM or SIGINT, with a checkpoint written: run the same command "
    "again to continue"
)
_RECIPE = f"YAML file, or the name of a shipped recipe: {', '.join(shipped_recipes())}"
_SET = "change one value of the recipe, as in stages.0.steps=10; may be repeated"
_DEVICE = "where to compute (default: a GPU where there is one, else the CPU)"
_JSON = "print JSON instead of the table"
_EXTRAPOLATION_FILE = "extrapolation.json"
_EXTRAPOLATION_PLOT = "extrapolation.png"
_NEAR_FULL = 0.92  # of a GPU's memory; the CUDA context and the allocator need the rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; results go to stdout, progress and log to stderr."""
    _show_log()
    try:
        args = build_parser().parse_args(argv)
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` in its result is the function that runs the chosen one."""
    parser = argparse.ArgumentParser(prog="gte-train", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add_arguments, run, summary in (
        ("prepare", _add_prepare, _prepare, "turn text into token shards, the corpus that a run reads"),
        ("estimate", _add_estimate, _estimate, "estimate FLOPs, tokens, memory and hours of a recipe on some GPUs"),
        ("run", _add_run, _run, "run a recipe, or continue its run"),
        ("export", _add_export, _export, "write a checkpoint of a run as a Hugging Face folder"),
        ("glue", _add_glue, _glue, "fine-tune a model on the eight GLUE tasks and print its scores"),
        ("extrapolate", _add_extrapolate, _extrapolate, "measure a model's loss by position and by context length"),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.epilog = _EPILOG
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


# --- prepare ----------------------------------------------------------------------------------------------------------


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder or glob of .json.gz, .jsonl, .parquet or .txt files, or hf:NAME[@REVISION][:CONFIG[:SPLIT]] "
        "for a Hugging Face dataset; LANGUAGE=INPUT names the language of an input",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the corpus to write")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=builtin_path(),
        help="checkpoint folder with a tokenizer.json (default: the built-in model's, bert-base-uncased)",
    )
    parser.add_argument(
        "--workers", type=int, default=_usable_cpus(), help="number of worker processes (default: %(default)s)"
    )
    parser.add_argument(
        "--text-column", default="text", help="field of a record that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--document-break",
        choices=["blank-line", "file"],
        default="blank-line",
        help="a document of plain text ends at a blank line, or at the end of its file (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip and count records that cannot be read, instead of failing"
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=16 << 20,
        help="a longer document counts as a bad record (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that exists already")
    parser.add_argument("--restart", action="store_true", help="discard the work of an interrupted run")


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


# --- estimate ---------------------------------------------------------------------------------------------------------


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=_RECIPE)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: %(default)s)")
    parser.add_argument(
        "--gpu", choices=GPUS, default="h100", help="model of the GPUs, for peak and memory (default: %(default)s)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="P",
        help="dense bfloat16 peak of one GPU in TFLOP/s, instead of that of --gpu",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that the run reaches, up to 1 (default: %(default)s)",
    )
    parser.add_argument("--sharding", choices=["ddp", "fsdp"], help="sharding instead of the recipe's")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--avg-tokens",
        type=float,
        nargs="+",
        metavar="N",
        help="mean tokens of a sequence, one number per stage (default: every sequence is full)",
    )
    lengths.add_argument("--data", type=Path, help="corpus folder; its sampled lengths replace full sequences")
    parser.add_argument("--price", type=float, metavar="P", help="price of one GPU-hour; the total price is printed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_SET)
    parser.add_argument("--json", action="store_true", help=_JSON)


def _estimate(args: argparse.Namespace) -> int:
    from gte_deploy.training.estimate import estimate, stage_lengths, table

    sharding = [] if args.sharding is None else [f"sharding={args.sharding}"]
    recipe = load_recipe(args.recipe, overrides=[*args.set, *sharding])
    gpu = GPUS[args.gpu]
    result = estimate(
        recipe,
        gpus=args.gpus,
        peak_flops=gpu.peak_flops if args.peak_tflops is None else args.peak_tflops * 1e12,
        utilization=args.utilization,
        lengths=stage_lengths(recipe, averages=args.avg_tokens, data=args.data),
    )
    if args.json:
        bill = {} if args.price is None else {"price": result.gpu_hours * args.price}
        print(json.dumps({**result.to_dict(), **bill}, indent=2))
        return OK
    print(table(result))
    if args.price is not None:
        print(f"at {args.price:g} a GPU-hour: {result.gpu_hours * args.price:,.0f}")
    most = max(stage.memory.total for stage in result.stages)
    if args.peak_tflops is None and most > _NEAR_FULL * gpu.memory:
        logger.warning(
            "%.0f GB is close to or above the %.0f GB of one %s: lower tokens_per_micro_batch (not below the longest "
            "max_length), or set gradient_checkpointing, or sharding: fsdp",
            most / 1e9,
            gpu.memory / 1e9,
            args.gpu,
        )
    return OK


# --- run --------------------------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=_RECIPE)
    parser.add_argument("--data", type=Path, required=True, help="corpus folder that `gte-train prepare` wrote")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the run; if it holds checkpoints, the run continues"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_SET)
    parser.add_argument("--device", choices=["cpu", "cuda"], help=_DEVICE)
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with the tokenizer.json of the corpus (default: DATA/tokenizer)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="P",
        help="peak of one device in TFLOP/s, for the share of the peak in the log (default: that of a known GPU)",
    )
    parser.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard events")


def _run(args: argparse.Namespace) -> int:
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


# --- export -----------------------------------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run for its newest checkpoint")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--layout",
        choices=["native", "original"],
        default="native",
        help="native: the layout of transformers' own GTE; original: that of the published checkpoints "
        "(default: %(default)s)",
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json (default: the run's)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="dtype of the stored weights (default: %(default)s)",
    )


def _export(args: argparse.Namespace) -> int:
    import torch

    from gte_deploy.training.export import export_checkpoint, find_checkpoint

    checkpoint = find_checkpoint(args.checkpoint)
    dtype = getattr(torch, args.dtype)
    export_checkpoint(checkpoint, args.output, layout=args.layout, tokenizer=args.tokenizer, dtype=dtype)
    print(args.output)
    return OK


# --- glue -------------------------------------------------------------------------------------------------------------


def _add_glue(parser: argparse.ArgumentParser) -> None:
    published = Protocol()
    parser.add_argument(
        "model", help="checkpoint folder, preset name or hub id; RoBERTa, XLM-R, nomic-bert and others work too"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the results; finished tasks are not run again"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that holds one folder per task with .tsv, .jsonl or .parquet files (default: the hub's dataset)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help=f"tasks to run, of {', '.join(TASKS)} (default: all)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="fine-tune once with each seed (default: 0)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help=_DEVICE)
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="dtype of the computation (default: bfloat16 on a GPU, else float32)",
    )
    for name, meaning in (
        ("max_length", "tokens of an example"),
        ("batch_size", "examples of a step"),
        ("learning_rate", "peak learning rate"),
        ("epochs", "passes over the training examples"),
    ):
        value = getattr(published, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            help=f"{meaning} (default: %(default)s, as published)",
        )
    parser.add_argument("--json", action="store_true", help=_JSON)


def _glue(args: argparse.Namespace) -> int:
    from gte_deploy.training.evaluation.glue import glue, table

    summary = glue(
        args.model,
        output=args.output,
        data=args.data,
        tasks=args.tasks,
        seeds=list(dict.fromkeys(args.seeds)),
        protocol=Protocol(
            max_length=args.max_length,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            epochs=args.epochs,
        ),
        device=args.device,
        dtype=args.dtype,
        progress=True,
    )
    print(json.dumps(summary, indent=2) if args.json else table(summary))
    return OK


# --- extrapolate ------------------------------------------------------------------------------------------------------


def _add_extrapolate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="masked-LM checkpoint: folder, preset name or hub id")
    parser.add_argument(
        "--data", type=Path, required=True, help="corpus folder; use text that the model was not trained on"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help=f"folder for {_EXTRAPOLATION_FILE} and {_EXTRAPOLATION_PLOT} (default: print only)",
    )
    parser.add_argument(
        "--max-length", type=int, default=8192, metavar="N", help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="N",
        help="context lengths in tokens (default: the powers of two from 128 to the length of a row)",
    )
    parser.add_argument(
        "--buckets", type=int, default=16, metavar="N", help="number of ranges of positions (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="number of rows (default: %(default)s)")
    parser.add_argument(
        "--mask-probability", type=float, default=0.3, metavar="P", help="share of masked tokens (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and the masks (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help=_DEVICE)
    parser.add_argument("--json", action="store_true", help=_JSON)


def _extrapolate(args: argparse.Namespace) -> int:
    from gte_deploy.training.evaluation.extrapolation import extrapolate, plot, table

    result = extrapolate(
        args.model,
        data=args.data,
        max_length=args.max_length,
        contexts=args.contexts,
        buckets=args.buckets,
        rows=args.rows,
        masking=Masking(probability=args.mask_probability, mask_share=1.0, random_share=0.0),
        seed=args.seed,
        device=args.device,
        progress=True,
    )
    text = json.dumps(result.to_dict(), indent=2)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text(args.output / _EXTRAPOLATION_FILE, text + "\n")
        plot(result, args.output / _EXTRAPOLATION_PLOT)
    print(text if args.json else table(result))
    return OK


# --- the process ------------------------------------------------------------------------------------------------------


def _show_log() -> None:
    """Log to stderr; of several ranks only the first logs more than errors."""
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

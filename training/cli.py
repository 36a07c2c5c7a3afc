"""`gte-train`: prepare a corpus, estimate and run a recipe, export and fine-tune a checkpoint, and evaluate a model.

Each command has a function, and dataclasses that state its options, see `training/options.py`. This module imports
nothing heavy: numpy, torch and transformers are imported by the command that needs them, after its arguments were
parsed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy._version import __version__
from gte_deploy.bundle.manifest import is_bundle
from gte_deploy.core.command_line import CommandParser, OutputOptions, completes, run_command, shows_progress
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import ConfigError, require_modules
from gte_deploy.core.exit_codes import FAILURE, INTERRUPTED, OK, exit_codes_help
from gte_deploy.core.files import require_free, write_text
from gte_deploy.core.hub import HubModel
from gte_deploy.core.options import Given, add_arguments, parse_given, read_options
from gte_deploy.core.streams import prepare_streams
from gte_deploy.models import TOKENIZER_PATTERNS, locate, require_checkpoint
from gte_deploy.models.presets import PRESETS
from gte_deploy.training.finetune.options import (
    FineTuneArguments,
    FineTuneKind,
    RetrievalArguments,
    RetrievalOptions,
)
from gte_deploy.training.flops import GPUS
from gte_deploy.training.mteb_options import MTEB_FILE, MtebArguments, MtebOptions
from gte_deploy.training.needle_options import NEEDLES_FILE, NEEDLES_PLOT, NeedleArguments, NeedleOptions
from gte_deploy.training.options import (
    EVALUATION_FILE,
    EVALUATION_PLOT,
    EXTRAPOLATION_FILE,
    EXTRAPOLATION_PLOT,
    CheckpointExportOptions,
    CorpusSource,
    DeviceOptions,
    EstimateOptions,
    EvaluationArguments,
    EvaluationOptions,
    ExportArguments,
    ExtrapolationArguments,
    ExtrapolationOptions,
    GlueArguments,
    GlueOptions,
    Hardware,
    PrepareArguments,
    PrepareOptions,
    Protocol,
    RankingModelOptions,
    ReadOptions,
    RecipeArguments,
    RescueOptions,
    RunArguments,
    RunOptions,
)
from gte_deploy.training.xtreme_options import XtremeArguments, XtremeOptions

if TYPE_CHECKING:
    from gte_deploy.training.recipe import Recipe

logger = logging.getLogger("gte_deploy.training.cli")  # also where the module runs as __main__

_PROG = "gte-train"
_DESCRIPTION = (
    "Prepare a corpus, estimate and run a recipe, export a checkpoint, fine-tune it on pairs of texts, and evaluate a "
    "model."
)
_EPILOG = exit_codes_help(
    INTERRUPTED="stopped by SIGTERM, SIGHUP or SIGINT, with a checkpoint: run the same command again to continue"
)
_PROTOCOL = "fine-tuning (the defaults are as published)"
_NEAR_FULL = 0.92  # of a GPU's memory; the CUDA context and the allocator need the rest


@dataclass(frozen=True)
class _Command:
    """One command: the function that runs it and returns the exit code, its summary, the dataclasses of its options."""

    run: Callable[[Given], int]
    summary: str
    options: tuple[type, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; results go to stdout, progress and log to stderr."""
    prepare_streams()
    parser = build_parser()
    if completes(parser, argv):
        return OK
    given = vars(parser.parse_args(argv))
    command = _COMMANDS[given["command"]]
    with _log_on_stderr(quiet="quiet" in given):
        return run_command(_PROG, partial(command.run, given), given, kinds=command.options, extra="train")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` in its result is the name of the chosen one."""
    parser = CommandParser(prog=_PROG, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"gte-deploy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in _COMMANDS.items():
        summary = command.summary
        description = f"{summary[0].upper()}{summary[1:]}."
        inner = commands.add_parser(name, help=summary, description=description, epilog=_EPILOG)
        for kind in (*command.options, OutputOptions):
            group = inner.add_argument_group(_PROTOCOL) if kind is Protocol else inner
            add_arguments(group, kind)
    return parser


def _prepare(given: Given) -> int:
    from gte_deploy.training.data.corpus import TokenCorpus, corpus_facts, describe_corpus
    from gte_deploy.training.data.prepare import HELD_OUT_FOLDER, prepare
    from gte_deploy.training.state import TOKENIZER_FOLDER

    arguments = read_options(PrepareArguments, given)
    tokenizer = _tokenizer(arguments.tokenizer)
    options = read_options(PrepareOptions, {"workers": available_cpus(), **given})
    corpus = prepare(
        arguments.inputs, arguments.output, tokenizer=tokenizer, options=options, progress=shows_progress(given)
    )
    from gte_deploy.models.checkpoint import copy_tokenizer  # imports torch, which refusals do not wait for

    source = tokenizer if tokenizer.is_dir() else tokenizer.parent
    copy_tokenizer(source, arguments.output / TOKENIZER_FOLDER)
    facts, shown = corpus_facts(corpus), [describe_corpus(corpus)]
    if options.held_out:
        held_out = TokenCorpus.open(arguments.output / HELD_OUT_FOLDER)
        copy_tokenizer(source, held_out.folder / TOKENIZER_FOLDER)
        facts["held_out"] = corpus_facts(held_out)
        shown.append(describe_corpus(held_out))
    print(json.dumps(facts) if "json" in given else "\n".join(shown))
    return OK


def _tokenizer(name: str | None) -> Path:
    if name is not None and Path(name).is_file():
        return Path(name)
    found = locate(name)
    return found.download(TOKENIZER_PATTERNS) if isinstance(found, HubModel) else found


def _estimate(given: Given) -> int:
    hardware, options = read_options(Hardware, given), read_options(EstimateOptions, given)
    sharding = () if options.sharding is None else (f"sharding={options.sharding}",)
    recipe = _recipe(given, *sharding)
    _require_corpus(options.data)
    from gte_deploy.training.estimate import estimate, stage_lengths, table

    lengths = stage_lengths(recipe, averages=options.averages, data=options.data)
    result = estimate(recipe, hardware, lengths=lengths)
    if "json" in given:
        bill = {} if options.price is None else {"price": result.gpu_hours * options.price}
        print(json.dumps({**result.to_dict(), **bill}, indent=2))
        return OK
    print(table(result))
    if options.price is not None:
        cost = result.gpu_hours * options.price
        print(f"at {options.price:g} a GPU-hour: {f'{cost:,.0f}' if cost >= 10 else f'{cost:.2g}'}")
    most, memory = max(stage.memory.total for stage in result.stages), GPUS[hardware.gpu].memory
    if hardware.peak_flops is None and most > _NEAR_FULL * memory:
        logger.warning(
            "%.0f GB is close to or above the %.0f GB of one %s: lower tokens_per_micro_batch (not below the longest "
            "max_length), or set gradient_checkpointing, or sharding: fsdp",
            most / 1e9,
            memory / 1e9,
            hardware.gpu,
        )
    return OK


def _run(given: Given) -> int:
    arguments, options = read_options(RunArguments, given), parse_given(RunOptions, given)
    source = read_options(CorpusSource, given)
    eval_data = () if arguments.eval_data is None else (f"eval_data={json.dumps(str(arguments.eval_data))}",)
    recipe = _recipe(given, *eval_data)
    _require_corpus(source.data)
    _require_corpus(arguments.eval_data)
    rescue = parse_given(RescueOptions, given)
    if rescue and _is_main():  # the other ranks find the change in the checkpoint
        from gte_deploy.training.rescue import change_run

        change_run(recipe, output=arguments.output, **rescue)
    from gte_deploy.training.train import train

    # The losses are the log of the run, which a job without a terminal keeps, too.
    log = None if "quiet" in given else sys.stderr
    result = train(recipe, data=source, output=arguments.output, progress=log, **options)
    if not result.finished:
        return INTERRUPTED
    if _is_main():
        _print_path(result.model, given)
    return OK


def _export(given: Given) -> int:
    from gte_deploy.training.state import find_checkpoint

    arguments, options = read_options(ExportArguments, given), parse_given(CheckpointExportOptions, given)
    checkpoint = find_checkpoint(arguments.checkpoint)
    require_free(arguments.output, force=arguments.force)
    import torch

    from gte_deploy.training.export import export_checkpoint

    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    export_checkpoint(checkpoint, arguments.output, **options)
    _print_path(arguments.output, given)
    return OK


def _evaluate(given: Given) -> int:
    arguments, options = read_options(EvaluationArguments, given), read_options(EvaluationOptions, given)
    from gte_deploy.training.state import is_run

    for model in arguments.models:
        if not is_run(Path(model)):
            require_checkpoint(model)
    _require_corpus(arguments.data)
    from gte_deploy.training.evaluation.masked_lm import evaluate, plot_comparison, table

    result = evaluate(arguments.models, data=arguments.data, options=options, progress=shows_progress(given))
    for each in result.models:
        if each.trained_on_this:
            logger.warning("%s was trained on %s: its scores say nothing of new text", each.model, arguments.data)
    text = json.dumps(result.to_dict(), indent=2)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / EVALUATION_FILE, text + "\n")
        plot_comparison(result, arguments.output / EVALUATION_PLOT)
    print(text if "json" in given else table(result))
    return OK


def _glue(given: Given) -> int:
    from gte_deploy.training.evaluation.published_glue import SYSTEMS, choose_systems, list_systems

    arguments = read_options(GlueArguments, given)
    if arguments.list_systems:
        rows = [system.to_dict() for system in SYSTEMS.values()]
        print(json.dumps(rows, indent=2) if "json" in given else list_systems())
        return OK
    chosen = choose_systems(arguments.systems)
    if arguments.model is not None:
        require_checkpoint(arguments.model)
    from gte_deploy.training.evaluation.glue import compare_systems, glue, systems_table, table

    assert arguments.output is not None  # GlueArguments checked it
    rest: dict[str, Any] = {
        "output": arguments.output,
        "options": read_options(GlueOptions, given),
        "protocol": read_options(Protocol, given),
        "progress": True,
    }
    if arguments.model is not None:
        summary = glue(arguments.model, **rest)
        print(json.dumps(summary, indent=2) if "json" in given else table(summary))
        return OK
    summary = compare_systems(chosen, **rest)
    print(json.dumps(summary, indent=2) if "json" in given else systems_table(summary))
    return FAILURE if any(row["error"] is not None for row in summary["systems"]) else OK


def _xtreme(given: Given) -> int:
    arguments = read_options(XtremeArguments, given)
    from gte_deploy.training.evaluation.published_xtreme import XTREME_SYSTEMS, list_xtreme_systems

    if arguments.list_systems:
        print(json.dumps(list(XTREME_SYSTEMS.values()), indent=2) if "json" in given else list_xtreme_systems())
        return OK
    # XtremeArguments checked it
    assert arguments.model is not None and arguments.output is not None
    require_checkpoint(arguments.model)
    from gte_deploy.training.evaluation.xtreme import xtreme, xtreme_table

    options = read_options(XtremeOptions, given)
    summary = xtreme(arguments.model, output=arguments.output, data=arguments.data, options=options, progress=True)
    print(json.dumps(summary, indent=2) if "json" in given else xtreme_table(summary))
    return OK


def _extrapolate(given: Given) -> int:
    arguments, options = read_options(ExtrapolationArguments, given), read_options(ExtrapolationOptions, given)
    require_checkpoint(arguments.model)
    _require_corpus(arguments.data)
    from gte_deploy.training.evaluation.extrapolation import extrapolate, plot, table

    result = extrapolate(arguments.model, data=arguments.data, options=options, progress=shows_progress(given))
    text = json.dumps(result.to_dict(), indent=2)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / EXTRAPOLATION_FILE, text + "\n")
        plot(result, arguments.output / EXTRAPOLATION_PLOT)
    print(text if "json" in given else table(result))
    return OK


def _finetune(kind: FineTuneKind, given: Given) -> int:
    arguments, options = read_options(FineTuneArguments, given), read_options(DeviceOptions, given)
    from gte_deploy.training.finetune.recipe import load_finetune_recipe

    recipe = load_finetune_recipe(arguments.recipe or kind, kind=kind, overrides=arguments.overrides)
    require_checkpoint(recipe.model)
    require_modules("sentence_transformers", "accelerate", "datasets", extra="train")
    from gte_deploy.training.finetune.train import fine_tune_on_pairs

    log = None if "quiet" in given else sys.stderr
    result = fine_tune_on_pairs(
        recipe,
        data=arguments.data,
        eval_data=arguments.eval_data,
        output=arguments.output,
        device=options.device,
        progress=log,
    )
    if result.model is None:
        return INTERRUPTED
    if _is_main():
        for name, value in result.after.items():
            before = f"{result.before[name]:.4f} -> " if name in result.before else ""
            logger.info("held-out pairs: %s %s%.4f", name, before, value)
        print(json.dumps(result.to_dict()) if "json" in given else result.model)
    return OK


# Task of a bundle -> how it ranks.
_RANKS: Mapping[str, FineTuneKind] = {
    "embed": "embed",
    "fill-mask": "embed",
    "hybrid": "embed",
    "sparse": "sparse",
    "classify": "rerank",
}


@contextlib.contextmanager
def _open_for_ranking(name: str, options: RankingModelOptions) -> Iterator[tuple[FineTuneKind, Any]]:
    """Open a checkpoint with sentence-transformers, or a bundle with gte_deploy; both cut texts that are too long."""
    if not is_bundle(Path(name)):
        from gte_deploy.training.evaluation.retrieval import open_to_rank

        with open_to_rank(name, options) as opened:
            yield opened
        return
    import gte_deploy

    with gte_deploy.load(name, device=options.device) as model:
        spec = model.spec
        kind = _RANKS.get(spec.task)
        if kind is None or (kind == "rerank" and spec.num_labels != 1):
            expected = "one that embeds, or a reranker of one label"
            raise ConfigError(f"{name} is a bundle for {spec.task}; expected {expected}")
        model.max_seq_length = min(options.max_length or spec.max_length, spec.max_length)
        yield kind, model


def _print_rows(rows: Sequence[Any], table: str, given: Given, *, file: Path | None) -> None:
    """Print the rows of models as a table or as JSON, and write the JSON into a file if there is one."""
    text = json.dumps([row.to_dict() for row in rows], indent=2)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text + "\n")
    print(text if "json" in given else table)


def _require_ranking(models: Sequence[str]) -> None:
    """Refuse what is no model before torch is imported."""
    for model in models:
        if not is_bundle(Path(model)):
            require_checkpoint(model)
    require_modules("sentence_transformers", extra="train")


def _retrieval(given: Given) -> int:
    arguments, options = read_options(RetrievalArguments, given), read_options(RetrievalOptions, given)
    _require_ranking(arguments.models)
    from gte_deploy.training.evaluation.retrieval import evaluate_retrieval, table
    from gte_deploy.training.evaluation.retrieval_sets import open_retrieval_set, read_retrieval_set

    if arguments.files is None:
        assert arguments.data is not None  # RetrievalArguments checked it
        data = open_retrieval_set(arguments.data, split=arguments.split)
    else:
        data = read_retrieval_set(*arguments.files)
    rows = evaluate_retrieval(
        arguments.models, data, options=options, progress=shows_progress(given), open_model=_open_for_ranking
    )
    _print_rows(rows, table(rows, data), given, file=arguments.output)
    return OK


def _needles(given: Given) -> int:
    arguments, options = read_options(NeedleArguments, given), read_options(NeedleOptions, given)
    reading = read_options(ReadOptions, given)
    _require_ranking(arguments.models)
    from gte_deploy.training.evaluation.haystacks import read_filler, read_needles
    from gte_deploy.training.evaluation.needles import (
        find_needles,
        hide_needles,
        plot_needles,
        published_needles,
        table,
    )

    if arguments.longembed is not None:
        made = published_needles(arguments.longembed, options=options)
    else:
        needles = None if arguments.needles is None else read_needles(arguments.needles)
        tokenizer = _tokenizer(next(iter(arguments.models), None))
        file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        made = hide_needles(read_filler(arguments.data, reading), file, options=options, needles=needles)
    rows = find_needles(
        arguments.models, made, options=options, progress=shows_progress(given), open_model=_open_for_ranking
    )
    _print_rows(rows, table(rows), given, file=arguments.output and arguments.output / NEEDLES_FILE)
    if arguments.output is not None:
        plot_needles(rows, arguments.output / NEEDLES_PLOT)
    return OK


@contextlib.contextmanager
def _open_for_mteb(name: str, options: RankingModelOptions) -> Iterator[tuple[FineTuneKind, Any]]:
    """Open a model as `_open_for_ranking` does, a bundle with the methods that MTEB calls."""
    with _open_for_ranking(name, options) as (kind, model):
        if is_bundle(Path(name)):
            from gte_deploy.integrations.mteb import GteCrossEncoder, GteEncoder

            model = GteCrossEncoder(model) if kind == "rerank" else GteEncoder(model)
        yield kind, model


def _mteb(given: Given) -> int:
    arguments, options = read_options(MtebArguments, given), read_options(MtebOptions, given)
    require_modules("mteb", extra="mteb")
    _require_ranking(arguments.models)
    from gte_deploy.training.evaluation.mteb_tasks import evaluate_on_mteb, table

    rows = evaluate_on_mteb(
        arguments.models,
        arguments.tasks,
        options=options,
        progress=shows_progress(given),
        open_model=_open_for_mteb,
    )
    _print_rows(rows, table(rows), given, file=arguments.output and arguments.output / MTEB_FILE)
    return OK


def _recipe(given: Given, *overrides: str) -> Recipe:
    """The recipe of the command line, with its changes and then with `overrides`."""
    from gte_deploy.training.recipe import load_recipe

    arguments = read_options(RecipeArguments, given)
    recipe = load_recipe(arguments.recipe, overrides=[*arguments.overrides, *overrides])
    if recipe.model not in PRESETS:
        require_checkpoint(recipe.model)
    return recipe


def _require_corpus(folder: Path | str | None) -> None:
    """Refuse a folder that is no corpus before torch is imported, which takes seconds. A URL is opened by the run."""
    from gte_deploy.training.data.corpus import read_index

    if isinstance(folder, Path):
        read_index(folder)


def _print_path(path: Path | None, given: Given) -> None:
    print(json.dumps({"path": str(path)}) if "json" in given else path)


# --- the process ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _log_on_stderr(*, quiet: bool) -> Iterator[None]:
    """Log to stderr while a command runs; of several ranks only the first logs more than errors."""
    log = logging.getLogger("gte_deploy")
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if _is_main() and not quiet else logging.ERROR)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


_COMMANDS = {
    "prepare": _Command(
        _prepare, "turn text into token shards, the corpus that a run reads", (PrepareArguments, PrepareOptions)
    ),
    "estimate": _Command(
        _estimate,
        "estimate FLOPs, tokens, memory and hours of a recipe on some GPUs",
        (Hardware, EstimateOptions, RecipeArguments),
    ),
    "run": _Command(
        _run,
        "run a recipe, or continue its run",
        (CorpusSource, RunArguments, RunOptions, RecipeArguments, RescueOptions),
    ),
    "export": _Command(
        _export, "write a checkpoint of a run as a Hugging Face folder", (ExportArguments, CheckpointExportOptions)
    ),
    "evaluate": _Command(
        _evaluate,
        "compare masked language models on held-out text: loss, perplexity and accuracy of hidden tokens",
        (EvaluationArguments, EvaluationOptions),
    ),
    "glue": _Command(
        _glue,
        "fine-tune a model, or every system of the published table, on the eight GLUE tasks and print the scores",
        (GlueArguments, GlueOptions, Protocol),
    ),
    "xtreme": _Command(
        _xtreme,
        "fine-tune a multilingual model in English and score it on the ten tasks of XTREME-R in all languages",
        (XtremeArguments, XtremeOptions),
    ),
    "extrapolate": _Command(
        _extrapolate,
        "measure a model's loss by position and by context length",
        (ExtrapolationArguments, ExtrapolationOptions),
    ),
    "embed": _Command(
        partial(_finetune, "embed"),
        "fine-tune an embedding model on pairs of texts",
        (FineTuneArguments, DeviceOptions),
    ),
    "rerank": _Command(
        partial(_finetune, "rerank"),
        "fine-tune a reranker (cross-encoder) on pairs of texts",
        (FineTuneArguments, DeviceOptions),
    ),
    "sparse": _Command(
        partial(_finetune, "sparse"),
        "fine-tune a sparse embedding model (SPLADE) on pairs of texts",
        (FineTuneArguments, DeviceOptions),
    ),
    "retrieval": _Command(
        _retrieval,
        "measure how well models find documents, against BM25",
        (RetrievalArguments, RetrievalOptions),
    ),
    "needles": _Command(
        _needles,
        "measure whether models find a sentence in long documents, by the documents' length",
        (NeedleArguments, NeedleOptions, ReadOptions),
    ),
    "mteb": _Command(
        _mteb,
        "run tasks of MTEB for checkpoints and bundles, side by side",
        (MtebArguments, MtebOptions),
    ),
}


if __name__ == "__main__":
    sys.exit(main())

"""The options of `gte-train`: arguments of its commands, and of the functions that the commands call.

Fields are named as the functions' arguments. A command passes on only the options given to it. Importing this loads
neither numpy nor torch, so that `--help` is quick. Recipes have their own dataclasses, see `training/recipe.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choices, option, required
from gte_deploy.training.flops import GPUS

Device = Literal["cpu", "cuda"]
Dtype = Literal["bfloat16", "float32"]
"""The number format of a model's computation: bfloat16 is autocast over float32 weights."""
Sharding = Literal["ddp", "fsdp"]
DocumentBreak = Literal["blank-line", "file"]
CheckpointLayout = Literal["native", "original"]
StoredDtype = Literal["float32", "float16", "bfloat16"]
PaddingChoice = Literal["auto", "keep", "remove"]
GlueTask = Literal["cola", "sst2", "mnli", "mrpc", "stsb", "qqp", "qnli", "rte"]

RECIPE_SUFFIX = ".yaml"
EXTRAPOLATION_FILE = "extrapolation.json"
EXTRAPOLATION_PLOT = "extrapolation.png"
EVALUATION_FILE = "evaluation.json"
EVALUATION_PLOT = "evaluation.png"
_MAX_DOCUMENT_BYTES = 1 << 30


def shipped_recipes(folder_name: str = "") -> list[str]:
    """Return the names of the recipes inside the package: those for pretraining, or of an inner folder."""
    folder = resources.files("gte_deploy.training") / "recipes" / folder_name
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(RECIPE_SUFFIX) for name in names if name.endswith(RECIPE_SUFFIX))


def _teraflops(text: str) -> float:
    """Convert a text in TFLOP/s to FLOP/s."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"the peak is {text!r}; expected a positive number of TFLOP/s")
    return value * 1e12


def _place(text: str) -> Path | str:
    """A URL as it is, anything else as a path."""
    return text if "://" in text else Path(text)


# --- what several commands share --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeArguments:
    """The recipe of a run; see `load_recipe`."""

    recipe: str = required(
        f"YAML file, or the name of a shipped recipe: {', '.join(shipped_recipes())}", positional=True, metavar="RECIPE"
    )
    overrides: tuple[str, ...] = option(
        (),
        "change one value of the recipe, as in stages.0.steps=10; may be repeated",
        flags=("--set",),
        metavar="KEY=VALUE",
        repeated=True,
    )


@dataclass(frozen=True)
class DeviceOptions:
    """The device of a computation.

    Args:
        device: "cuda" or "cpu"; None takes a GPU if there is one.
    """

    device: Device | None = option(
        None, "where to compute (default: a GPU where there is one, else the CPU)", choices=get_args(Device)
    )


@dataclass(frozen=True)
class RankingModelOptions(DeviceOptions):
    """How a model that ranks texts is opened.

    Args:
        max_length: tokens at which texts are cut; None for the model's own limit.

    Raises:
        InputError: the number is out of its range.
    """

    max_length: int | None = option(
        None,
        "tokens at which texts are cut (default: the model's own limit)",
        flags=("--max-len", "--max-length"),
        metavar="TOKENS",
        parse=int,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_length is not None and self.max_length < 4:
            raise InputError(f"max_length {self.max_length} is below 4 tokens")


# --- prepare ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading documents from the inputs.

    Args:
        text_column: the field or column of a record that holds the text.
        document_break: a document of plain text ends at a blank line, or at the end of its file.
        skip_bad: count and skip records that cannot be read, instead of failing.
        max_document_bytes: a longer document is a bad record.

    Raises:
        InputError: an option is out of its range.
    """

    text_column: str = option("text", "field of a record that holds the text", metavar="NAME")
    document_break: DocumentBreak = option(
        "blank-line",
        "a document of plain text ends at a blank line, or at the end of its file",
        choices=get_args(DocumentBreak),
    )
    skip_bad: bool = option(False, "skip and count records that cannot be read, instead of failing")
    max_document_bytes: int = option(16 << 20, "a longer document counts as a bad record", metavar="BYTES", parse=int)

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 <= self.max_document_bytes <= _MAX_DOCUMENT_BYTES:
            raise InputError(f"max_document_bytes {self.max_document_bytes} is outside 1..{_MAX_DOCUMENT_BYTES}")


@dataclass(frozen=True)
class PrepareOptions(ReadOptions):
    """Options for preparing a corpus.

    Args:
        workers: number of processes. With more than one, the caller's main module must be importable
            (`if __name__ == "__main__"`).
        shard_bytes: bytes of token ids that a shard holds, at most, unless one document has more.
        held_out: share of the documents that become a second corpus, `held-out` inside the first, for evaluations. The
            hash of a document decides, so that copies of it stay together, and the same documents are held out again.
        force: replace a corpus that exists already.
        restart: discard the work of an interrupted run.

    Raises:
        InputError: an option is out of its range.
    """

    workers: int = option(
        1, "number of worker processes (default: the CPUs that this process may use)", metavar="N", parse=int
    )
    shard_bytes: int = option(
        128 << 20,
        "bytes of token ids in a shard, at most; a run can fetch shards one by one from an object storage",
        metavar="BYTES",
        parse=int,
    )
    held_out: float = option(
        0.0,
        "share of the documents, such as 0.01, to keep out of the corpus and in OUTPUT/held-out, for evaluations",
        metavar="SHARE",
        parse=float,
    )
    force: bool = option(False, "replace a corpus that exists already")
    restart: bool = option(False, "discard the work of an interrupted run")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "shard_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is below 1")
        if not 0 <= self.held_out < 1:
            raise InputError(
                f"held_out {self.held_out} is outside [0, 1); expected a share of the documents, such as 0.01"
            )

    def reading(self) -> ReadOptions:
        """The options for reading documents."""
        return ReadOptions(**{field.name: getattr(self, field.name) for field in fields(ReadOptions)})


@dataclass(frozen=True)
class PrepareArguments:
    """The inputs, output and tokenizer of a corpus."""

    inputs: tuple[str, ...] = required(
        "file, folder or glob of .json.gz, .jsonl, .parquet or .txt files, or hf:NAME[@REVISION][:CONFIG[:SPLIT]] for "
        "a Hugging Face dataset; NAME=INPUT names its language, or any other source that a recipe weights",
        positional=True,
        nargs="+",
        metavar="INPUT",
    )
    output: Path = required("folder of the corpus to write", flags=("-o", "--output"), metavar="FOLDER", parse=Path)
    tokenizer: str | None = option(
        None,
        "checkpoint folder with a tokenizer.json, or hub id (default: the built-in model, whose tokenizer is "
        "bert-base-uncased's)",
        metavar="MODEL",
    )


# --- estimate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a recipe is estimated for, all of one model.

    Args:
        gpus: number of GPUs.
        gpu: model of the GPUs, a key of `GPUS`.
        peak_flops: peak FLOP/s of one GPU; None for that of its model.
        utilization: share of the peak that model FLOPs reach. The cost of recomputation lowers it.

    Raises:
        InputError: a number is out of its range, or the model of the GPUs is unknown.
    """

    gpus: int = option(1, "number of GPUs", metavar="N", parse=int)
    gpu: str = option("h100", "model of the GPUs, for peak and memory", choices=tuple(GPUS))
    peak_flops: float | None = option(
        None,
        "dense bfloat16 peak of one GPU in TFLOP/s (default: that of --gpu)",
        flags=("--peak-tflops",),
        metavar="P",
        parse=_teraflops,
    )
    utilization: float = option(0.4, "share of the peak that the run reaches, up to 1", metavar="SHARE", parse=float)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.gpus < 1 or not self.peak > 0 or not 0 < self.utilization <= 1:
            raise InputError(
                f"{self.gpus} GPUs of {self.peak:g} FLOP/s at {self.utilization:g} of peak: expected at least one, a "
                "positive peak and a utilization in (0, 1]"
            )

    @property
    def peak(self) -> float:
        """Peak FLOP/s of one GPU."""
        return GPUS[self.gpu].peak_flops if self.peak_flops is None else self.peak_flops


@dataclass(frozen=True)
class EstimateOptions:
    """Options of the command `estimate` besides the recipe and the hardware.

    Args:
        sharding: sharding in place of the recipe's.
        averages: mean tokens of a sequence, one number for each stage.
        data: folder or URL of a corpus, whose sampled lengths replace full sequences.
        price: price of one GPU-hour.

    Raises:
        InputError: both `averages` and `data` are given.
    """

    sharding: Sharding | None = option(
        None, "sharding of the model (default: as the recipe says)", choices=get_args(Sharding)
    )
    averages: tuple[float, ...] | None = option(
        None,
        "mean tokens of a sequence, one number for each stage (default: every sequence is full)",
        flags=("--avg-tokens",),
        nargs="+",
        metavar="N",
        parse=float,
    )
    data: Path | str | None = option(
        None,
        "corpus folder or URL, whose sampled lengths replace full sequences; not with --avg-tokens",
        metavar="FOLDER",
        parse=_place,
    )
    price: float | None = option(None, "price of one GPU-hour; the total price is printed", metavar="P", parse=float)

    def __post_init__(self) -> None:
        if self.averages is not None and self.data is not None:
            raise InputError("--avg-tokens and --data both say how long sequences are; give one of them")


# --- run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusSource:
    """The corpus of a run, and how it is read.

    Args:
        data: the folder of the corpus, or its URL, such as s3://bucket/tokens or hf://datasets/owner/name/tokens.
        verify: compare each file with its sha256 before the first step, unless the run did so before. Of a corpus at a
            URL each shard is always compared, when it has been fetched.
        cache: folder for the shards of a corpus at a URL; None for a folder of this user's cache.
        cache_bytes: bytes that these shards may take.

    Raises:
        InputError: cache_bytes is below 1.
    """

    data: Path | str = required(
        "corpus folder that `gte-train prepare` wrote, or its URL (s3://, gs://, hf://datasets/..., https://), from "
        "which shards are fetched when they are needed",
        metavar="FOLDER",
        parse=_place,
    )
    verify: bool = option(
        True,
        "do not compare the files of the corpus with their sha256 before the first step; sizes and offsets are always "
        "checked",
        flags=("--no-verify",),
    )
    cache: Path | None = option(
        None,
        "folder for the shards of a corpus at a URL (default: corpora in this user's cache)",
        metavar="FOLDER",
        parse=Path,
    )
    cache_bytes: int = option(
        64 << 30, "bytes that the shards of corpora at URLs may take in the cache", metavar="BYTES", parse=int
    )

    def __post_init__(self) -> None:
        if self.cache_bytes < 1:
            raise InputError(f"cache_bytes {self.cache_bytes} is below 1")


@dataclass(frozen=True)
class RunArguments:
    """The output folder and the held-out text of a run."""

    output: Path = required(
        "folder of the run; if it holds checkpoints, the run continues",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )
    eval_data: Path | None = option(
        None,
        "corpus of held-out text, on which the model is evaluated before the first step, at the end of each stage, and "
        "every `evaluate_every` steps of the recipe (default: the recipe's `eval_data`)",
        metavar="FOLDER",
        parse=Path,
    )


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """Arguments of `train`."""

    tokenizer: Path | None = option(
        None, "folder with the tokenizer.json of the corpus (default: DATA/tokenizer)", metavar="FOLDER", parse=Path
    )
    peak_flops: float | None = option(
        None,
        "peak of one device in TFLOP/s, for the share of the peak in the log (default: that of a known GPU)",
        flags=("--peak-tflops",),
        metavar="P",
        parse=_teraflops,
    )
    tensorboard: bool = option(True, "write no TensorBoard events", flags=("--no-tensorboard",))


@dataclass(frozen=True)
class RescueOptions:
    """Arguments of `change_run`.

    Args:
        changes: such as "stages.0.learning_rate=1e-4".
        start_from: a checkpoint of the run, its name, or a checkpoint or the folder of another run.
    """

    changes: tuple[str, ...] = option(
        (),
        "change one value of a run that has checkpoints, from the next step on, as in stages.0.optimizer.clip_norm=1; "
        "may be repeated",
        flags=("--change",),
        metavar="KEY=VALUE",
        repeated=True,
    )
    start_from: Path | None = option(
        None,
        "go on from this checkpoint: an older one of the run (later ones are moved aside), or one of another run, of "
        "which a new output folder becomes a branch",
        flags=("--from",),
        metavar="CHECKPOINT",
        parse=Path,
    )


# --- export -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportArguments:
    """The checkpoint and the output folder of an export."""

    checkpoint: Path = required(
        "a checkpoint, or the folder of a run for its newest checkpoint",
        positional=True,
        metavar="CHECKPOINT",
        parse=Path,
    )
    output: Path = required("folder to write", positional=True, metavar="OUTPUT", parse=Path)
    force: bool = option(False, "write into a folder that holds files already")


@dataclass(frozen=True)
class CheckpointExportOptions:
    """Arguments of `export_checkpoint`, whose `dtype` is a torch.dtype."""

    layout: CheckpointLayout = option(
        "native",
        "native: the layout of transformers' own GTE; original: the layout of the published checkpoints",
        choices=get_args(CheckpointLayout),
    )
    tokenizer: Path | None = option(
        None, "folder with a tokenizer.json (default: the run's)", metavar="FOLDER", parse=Path
    )
    dtype: StoredDtype = option("float32", "dtype of the stored weights", choices=get_args(StoredDtype))


# --- evaluate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationArguments:
    """The models, the text and the output folder of an evaluation."""

    models: tuple[str, ...] = required(
        "masked-LM checkpoint (folder, preset name or hub id), folder of a run, or checkpoint of a run; differences "
        "are to the first",
        positional=True,
        nargs="+",
        metavar="MODEL",
    )
    data: Path = required("corpus folder; use text that no model was trained on", metavar="FOLDER", parse=Path)
    output: Path | None = option(
        None,
        f"folder for {EVALUATION_FILE} and {EVALUATION_PLOT} (default: print only)",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )


@dataclass(frozen=True)
class EvaluationOptions(DeviceOptions):
    """The tokens that an evaluation reads and hides.

    Args:
        device: "cuda" or "cpu"; None takes a GPU if there is one.
        max_length: tokens of a chunk, at most.
        mask_probability: share of the tokens that are hidden. Each becomes [MASK], as usual in evaluations.
        max_tokens: tokens to read of each source (language) of the corpus, at most.
        seed: seed of the choice of chunks and of the masks.
        dtype: "bfloat16" for autocast, or "float32"; None is bfloat16 on a GPU, else float32.

    Raises:
        InputError: a value is none of the choices.
    """

    max_length: int = option(
        512, "tokens of a chunk, at most", flags=("--max-len", "--max-length"), metavar="TOKENS", parse=int
    )
    mask_probability: float = option(0.15, "share of the tokens that are hidden", metavar="P", parse=float)
    max_tokens: int = option(
        200_000, "tokens to read of each source of the corpus, at most", metavar="TOKENS", parse=int
    )
    seed: int = option(0, "seed of the chunks and the masks", metavar="SEED", parse=int)
    dtype: Dtype | None = option(
        None, "dtype of the computation (default: bfloat16 on a GPU, else float32)", choices=get_args(Dtype)
    )

    def __post_init__(self) -> None:
        check_choices(self)


# --- glue -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FineTuningOptions(DeviceOptions):
    """What the fine-tunings of GLUE and XTREME-R share.

    Args:
        device: "cuda" or "cpu"; None takes a GPU if there is one.
        seeds: seeds of new heads, of dropout and of the order of the examples; each counts once.
        dtype: "bfloat16" for autocast, or "float32"; None is bfloat16 on a GPU, else float32.
        tokenizer: folder or hub id of a tokenizer that replaces the checkpoint's; None for its own.
        padding: "remove" lets the encoder compute no padding, "keep" pads each batch, and "auto" removes padding on a
            GPU in bfloat16 where the model's family and its dropout of attention allow it.

    Raises:
        InputError: a value is none of the choices.
    """

    seeds: tuple[int, ...] = option((0,), "fine-tune once with each seed", nargs="+", metavar="SEED", parse=int)
    dtype: Dtype | None = option(
        None, "dtype of the computation (default: bfloat16 on a GPU, else float32)", choices=get_args(Dtype)
    )
    tokenizer: str | None = option(
        None, "folder or hub id of a tokenizer that replaces the checkpoint's (default: its own)", metavar="TOKENIZER"
    )
    padding: PaddingChoice = option(
        "auto",
        "remove: the encoder computes no padding (default: on a GPU in bfloat16, where the model allows it)",
        choices=get_args(PaddingChoice),
    )

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class GlueArguments:
    """The model or the systems to evaluate, and the folder of the results.

    Args:
        model: checkpoint folder, preset name or hub id.
        systems: systems of the published table in place of a model; see `published_glue.choose_systems`.
        list_systems: only print the published table.
        output: folder of the results.

    Raises:
        InputError: not exactly one of model, systems and list_systems is given, or the output is missing.
    """

    model: str | None = option(
        None,
        "checkpoint folder, preset name or hub id, of any family or of another encoder that transformers supports",
        positional=True,
        nargs="?",
        metavar="MODEL",
    )
    output: Path | None = option(
        None,
        "folder of the results; finished tasks are not run again",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )
    systems: tuple[str, ...] = option(
        (),
        "in place of MODEL: systems of the published table, each as NAME or NAME=CHECKPOINT, or all",
        nargs="+",
        metavar="NAME",
    )
    list_systems: bool = option(False, "print the published table: systems, checkpoints, averages and their sources")

    def __post_init__(self) -> None:
        if sum([self.model is not None, bool(self.systems), self.list_systems]) != 1:
            raise InputError("give one of MODEL, --systems and --list-systems")
        if self.output is None and not self.list_systems:
            raise InputError("-o/--output is missing: the folder of the results")


@dataclass(frozen=True)
class GlueOptions(FineTuningOptions):
    """The tasks and data of a GLUE evaluation, and what `FineTuningOptions` has.

    Args:
        data: folder of the tasks' files, see `glue_tasks.load_split`; None reads the hub.
        tasks: names of the tasks; MNLI is added if a task starts from it.

    Raises:
        InputError: a value is none of the choices.
    """

    data: Path | None = option(
        None,
        "folder that holds one folder per task with .tsv, .jsonl or .parquet files (default: the hub's dataset)",
        metavar="FOLDER",
        parse=Path,
    )
    tasks: tuple[GlueTask, ...] = option(
        get_args(GlueTask),
        f"tasks to run, out of {', '.join(get_args(GlueTask))} (default: all)",
        choices=get_args(GlueTask),
        nargs="+",
        metavar="TASK",
    )


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Hyper-parameters for fine-tuning a GLUE task. `max_length` is in tokens, `batch_size` in examples.

    Length, batch size, learning rate, epochs and warm-up are as published. The linear schedule, the weight decay and
    the clipping were not published; they are the defaults of transformers. The score is measured after the last epoch.

    Raises:
        InputError: a value is out of its range.
    """

    max_length: int = option(
        128, "longest example in tokens", flags=("--max-len", "--max-length"), metavar="TOKENS", parse=int
    )
    batch_size: int = option(32, "examples of a step", metavar="N", parse=int)
    learning_rate: float = option(2e-5, "peak learning rate", metavar="RATE", parse=float)
    epochs: int = option(3, "passes over the training examples", metavar="N", parse=int)
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if min(self.max_length - 3, self.batch_size, self.epochs) < 1 or not self.learning_rate > 0:
            raise InputError(
                f"max_length {self.max_length}, batch_size {self.batch_size}, epochs {self.epochs}, learning_rate "
                f"{self.learning_rate:g}: expected at least 4, 1, 1, and a positive rate"
            )


# --- extrapolate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtrapolationArguments:
    """The model, the text and the output folder of the measurement."""

    model: str = required("masked-LM checkpoint: folder, preset name or hub id", positional=True, metavar="MODEL")
    data: Path = required("corpus folder; use text that the model was not trained on", metavar="FOLDER", parse=Path)
    output: Path | None = option(
        None,
        f"folder for {EXTRAPOLATION_FILE} and {EXTRAPOLATION_PLOT} (default: print only)",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )


@dataclass(frozen=True)
class ExtrapolationOptions(DeviceOptions):
    """The rows that the measurement reads, and its masks.

    Args:
        device: "cuda" or "cpu"; None takes a GPU if there is one. On a GPU the forward pass is in bfloat16.
        max_length: tokens of a row; documents that do not fill a row are not read.
        contexts: window lengths, each a divisor of `max_length`; None takes the powers of two from 128 on.
        buckets: number of ranges of positions over which losses are averaged.
        rows: number of rows to read; fewer if the corpus has fewer.
        mask_probability: share of the tokens that are masked. Each becomes [MASK], as usual in evaluations.
        seed: seed of the choice of rows and of the masks.
    """

    max_length: int = option(8192, "tokens of a row", flags=("--max-len", "--max-length"), metavar="TOKENS", parse=int)
    contexts: tuple[int, ...] | None = option(
        None,
        "context lengths in tokens (default: the powers of two from 128 to the length of a row)",
        nargs="+",
        metavar="TOKENS",
        parse=int,
    )
    buckets: int = option(16, "number of ranges of positions", metavar="N", parse=int)
    rows: int = option(64, "number of rows", metavar="N", parse=int)
    mask_probability: float = option(0.3, "share of masked tokens", metavar="P", parse=float)
    seed: int = option(0, "seed of the rows and the masks", metavar="SEED", parse=int)

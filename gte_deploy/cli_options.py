"""The options of `gte-deploy`: dataclasses that several commands share, and one for each command's own options.

Fields are named as the arguments of the Python API that take them, and have the same defaults. A command passes on only
what was given. Importing this module loads neither numpy nor an engine, so that `--help` is quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gte_deploy.core.command_line import OutputOptions
from gte_deploy.core.completion import SHELLS, Shell
from gte_deploy.core.errors import InputError
from gte_deploy.core.options import natural, option, required
from gte_deploy.core.spec import (
    AGGREGATION_STRATEGIES,
    BACKENDS,
    BUNDLE_BACKENDS,
    FILE_PRECISIONS,
    LOAD_PRECISIONS,
    POOLINGS,
    SCORE_FUNCTIONS,
    SPARSE_ROUTES,
    AggregationStrategy,
    BackendName,
    BundleBackend,
    FilePrecision,
    LoadPrecision,
    Pooling,
    ScoreFunction,
    SparseRoute,
)
from gte_deploy.tuning import DEFAULT_SHAPES

if TYPE_CHECKING:
    from gte_deploy.text.chunking import ChunkRule


def _word_or_integer(text: str) -> int | str:
    return text if (number := natural(text)) is None else number


@dataclass(frozen=True)
class PrintOptions(OutputOptions):
    """Output options of every command."""

    verbose: bool = option(False, "log each step on stderr", flags=("-v", "--verbose"))


@dataclass(frozen=True)
class TextOptions:
    """The texts that a command reads."""

    texts: tuple[str, ...] = option(
        (),
        "texts to process; without any they are read from --input",
        positional=True,
        nargs="*",
        metavar="TEXT",
    )
    input: str | None = option(
        None,
        "UTF-8 file with one text a line; - is stdin (default: stdin)",
        flags=("-i", "--input"),
        metavar="FILE",
    )


@dataclass(frozen=True)
class ModelOptions:
    """The model: an argument of `gte_deploy.load`."""

    path: str | None = option(
        None,
        "bundle or checkpoint: folder, or hub id owner/name[@revision] (default: the built-in gte-en-mlm-tiny; of "
        "encode, gte-en-embed-tiny)",
        flags=("-m", "--model"),
        metavar="MODEL",
    )


@dataclass(frozen=True)
class LoadOptions:
    """The backend: arguments of `gte_deploy.load`, whose `precision` is `compute_precision` here."""

    backend: BackendName = option("auto", "library that runs the model", choices=BACKENDS)
    compute_precision: LoadPrecision = option(
        "auto",
        "precision that the engine computes in: openvino, or torch on a GPU; auto: as suits the bundle and this "
        "machine, or as bench --pick recorded",
        choices=LOAD_PRECISIONS,
        argument="precision",
    )
    device: str | None = option(
        None, "cpu, cuda or cuda:N (default: the device that the bundle is made for, else cpu)", metavar="DEVICE"
    )
    num_threads: int | None = option(
        None,
        "CPU threads (default: every CPU that the process may use)",
        flags=("--threads",),
        metavar="N",
        parse=int,
    )
    streams: int | Literal["auto"] = option(
        "auto", "batches of a list to compute at once, or auto: as suits the CPUs", metavar="N", parse=_word_or_integer
    )
    trusted_keys: tuple[str, ...] | None = option(
        None,
        "load only a bundle that this key has signed: a public Ed25519 key in PEM; repeat it to trust several keys, of "
        "which one is enough",
        flags=("--trusted-key",),
        metavar="FILE",
        repeated=True,
    )


@dataclass(frozen=True)
class BatchingOptions:
    """Limits on texts and batches."""

    batch_size: int = option(32, "most texts in one batch", metavar="N", parse=int)
    max_batch_tokens: int | None = option(
        None,
        "most tokens in one batch, padding included (default: as suits the device)",
        metavar="TOKENS",
        parse=int,
    )
    max_length: int | None = option(
        None,
        "longest input in tokens (default: the model's own limit)",
        flags=("--max-len", "--max-length"),
        metavar="TOKENS",
        parse=int,
    )
    truncation: bool = option(False, "cut an input that is too long, instead of failing")


@dataclass(frozen=True)
class ServedModelsOptions:
    """The models of `gte-deploy serve`."""

    models: tuple[str, ...] = required(
        "bundles or checkpoints: folder, or hub id owner/name[@revision]; NAME= before one gives it a name, which is "
        "else the last part of its path",
        positional=True,
        nargs="+",
        metavar="[NAME=]MODEL",
    )
    max_batch_tokens: int | None = option(
        None,
        "most tokens in one batch, padding included (default: as suits the device)",
        metavar="TOKENS",
        parse=int,
    )


@dataclass(frozen=True)
class PromptOptions:
    """The prompt before each text."""

    prompt_name: str | None = option(None, "put the model's prompt of this name before each text", metavar="NAME")
    prompt: str | None = option(None, "put this text before each text", metavar="TEXT")


@dataclass(frozen=True)
class FillMaskOptions:
    """Arguments of `Model.fill_mask`."""

    top_k: int = option(5, "answers for each mask", flags=("-k", "--top-k"), metavar="N", parse=int)
    targets: tuple[str, ...] | None = option(None, "words to choose from (default: all)", nargs="+", metavar="WORD")


@dataclass(frozen=True)
class EncodeOptions:
    """Arguments of `Model.encode`."""

    pooling: Pooling | None = option(
        None, "how token states become an embedding (default: as the checkpoint says)", choices=POOLINGS
    )
    normalize_embeddings: bool = option(False, "scale each embedding to length 1", flags=("--normalize",))
    truncate_dim: int | None = option(
        None, "leading dimensions to keep (default: as the checkpoint says)", metavar="N", parse=int
    )
    precision: FilePrecision = option(
        "float32", "type of the numbers in an embedding; float16 is for files", choices=FILE_PRECISIONS
    )


@dataclass(frozen=True)
class ChunkingOptions:
    """The chunks of each text to embed."""

    chunks: str | None = option(
        None,
        "embed chunks of each text, of N tokens (tokens:N) or of whole sentences up to N tokens (sentences:N); prints "
        "the text's number, start, end and embedding, or writes a row for each chunk",
        metavar="KIND:N",
    )
    chunk_overlap: int | None = option(
        None, "tokens that neighbouring chunks of --chunks tokens:N share (default: 0)", metavar="N", parse=int
    )
    window_overlap: int | None = option(
        None,
        "with --chunks, tokens that windows of a text above the limit share (default: a tenth of a window)",
        metavar="N",
        parse=int,
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `Model.encode`; none without `chunks`.

        Raises:
            InputError: `chunks` has another form, or an overlap is given without the chunks that it is for.
        """
        if self.chunks is None:
            for flag, value in (("--chunk-overlap", self.chunk_overlap), ("--window-overlap", self.window_overlap)):
                if value is not None:
                    raise InputError(f"{flag} is for chunks; pass --chunks, too")
            return {}
        return {"chunks": self._rule(self.chunks), "window_overlap": self.window_overlap}

    def _rule(self, chunks: str) -> "ChunkRule":
        from gte_deploy.text.chunking import SentenceChunks, TokenChunks

        kind, _, text = chunks.partition(":")
        size = natural(text)
        if kind not in ("tokens", "sentences") or size is None:
            raise InputError(f"--chunks is {chunks!r}; expected tokens:N or sentences:N, such as tokens:256")
        if kind == "tokens":
            return TokenChunks(size, self.chunk_overlap or 0)
        if self.chunk_overlap is not None:
            raise InputError("--chunk-overlap is for --chunks tokens:N; whole sentences do not overlap")
        return SentenceChunks(size)


@dataclass(frozen=True)
class FileOptions:
    """The files of texts and of embeddings; `BulkOptions` has the rest."""

    input: str | None = option(
        None,
        "texts to read: a UTF-8 file with one text a line, or - for stdin (the default); with --output also a parquet, "
        ".jsonl or .csv file, or a folder",
        flags=("-i", "--input"),
        metavar="FILE",
    )
    output: Path | None = option(
        None,
        "write the embeddings to this file, instead of printing: .parquet, .jsonl, .lance, or, for one vector a text, "
        ".npy",
        flags=("-o", "--output"),
        metavar="FILE",
        parse=Path,
    )
    max_failures: int = option(0, "rows that may fail before the command ends with exit code 1", metavar="N", parse=int)


@dataclass(frozen=True)
class EncodeSparseOptions:
    """Arguments of `Model.encode_sparse`."""

    route: SparseRoute | None = option(
        None,
        "encode the texts as queries or as documents, where the model tells them apart (default: as the checkpoint "
        "says)",
        choices=SPARSE_ROUTES,
    )
    max_active_dims: int | None = option(
        None, "weights to keep of each text, the heaviest (default: as the checkpoint says)", metavar="N", parse=int
    )


@dataclass(frozen=True)
class EncodeHybridOptions:
    """Arguments of `Model.encode_hybrid`."""

    normalize_embeddings: bool = option(False, "scale each dense embedding to length 1", flags=("--normalize",))
    truncate_dim: int | None = option(
        None,
        "leading dimensions of the dense embedding to keep (default: as the checkpoint says)",
        metavar="N",
        parse=int,
    )
    precision: FilePrecision = option(
        "float32", "type of the numbers in a dense embedding; float16 is for files", choices=FILE_PRECISIONS
    )
    max_active_dims: int | None = option(
        None, "weights to keep of each text, the heaviest (default: as the checkpoint says)", metavar="N", parse=int
    )


@dataclass(frozen=True)
class EncodeMultiVectorOptions:
    """Options of `gte-deploy encode-multi-vector`."""

    route: SparseRoute = option("document", "encode the texts as queries or as documents", choices=SPARSE_ROUTES)


@dataclass(frozen=True)
class RankOptions:
    """Arguments of `Model.rank`."""

    query: str = required("text that the documents are ranked for", flags=("-q", "--query"), metavar="TEXT")
    top_k: int | None = option(
        None, "documents to print (default: all)", flags=("-k", "--top-k"), metavar="N", parse=int
    )
    prompt_name: str | None = option(None, "put the model's prompt of this name before the query", metavar="NAME")
    prompt: str | None = option(None, "put this text before the query", metavar="TEXT")


@dataclass(frozen=True)
class PredictOptions:
    """Options of `gte-deploy predict`."""

    pairs: bool = option(
        False,
        "the inputs are pairs of texts: arguments two by two, or lines with a tab between the two",
    )
    function_to_apply: ScoreFunction | None = option(
        None,
        "function from logits to scores (default: the checkpoint's own, else sigmoid for one label and softmax for "
        "several)",
        choices=SCORE_FUNCTIONS,
    )


@dataclass(frozen=True)
class ClassifyTokensOptions:
    """Arguments of `Model.classify_tokens`."""

    aggregation_strategy: AggregationStrategy = option(
        "none",
        "how neighbours with one label are joined, as in transformers' pipeline; none prints each token alone",
        choices=AGGREGATION_STRATEGIES,
    )
    ignore_labels: tuple[str, ...] = option(("O",), "labels not to print", nargs="*", metavar="LABEL")
    stride: int | None = option(
        None, "cut long texts into windows that overlap by N tokens, and join their answers", metavar="N", parse=int
    )


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `gte-deploy verify`."""

    bundle: str = required("folder of the bundle, or hub id owner/name[@revision]", positional=True, metavar="BUNDLE")
    keys: tuple[str, ...] | None = option(
        None,
        "check that this key has signed the bundle, too: a public Ed25519 key in PEM; repeat it to trust several keys, "
        "of which one is enough (needs the [sign] extra)",
        flags=("--key",),
        metavar="FILE",
        repeated=True,
    )
    checkpoint: Path | None = option(
        None,
        "compare the bundle's answers with those of this checkpoint in its own library, too (needs the [export] extra)",
        metavar="FOLDER",
        parse=Path,
    )


@dataclass(frozen=True)
class SignOptions:
    """Options of `gte-deploy sign`: arguments of `gte_deploy.bundle.signing.sign_bundle`."""

    bundle: Path = required("folder of the bundle", positional=True, metavar="BUNDLE", parse=Path)
    key: str = required(
        "private Ed25519 key in PEM; `openssl genpkey -algorithm ed25519` makes one", flags=("--key",), metavar="FILE"
    )


@dataclass(frozen=True)
class PushOptions:
    """Options of `gte-deploy push`: arguments of `gte_deploy.bundle.upload.push_to_hub`."""

    bundle: Path = required("folder of the bundle", positional=True, metavar="BUNDLE", parse=Path)
    repository: str = required("repository on the hub, owner/name[@branch]", positional=True, metavar="REPO")
    private: bool = option(False, "make a new repository private")
    message: str | None = option(None, "message of the commit (default: model, task and precision)", metavar="TEXT")


@dataclass(frozen=True)
class InfoOptions:
    """Options of `gte-deploy info`."""

    model: str | None = option(
        None,
        "bundle or checkpoint: folder, or hub id owner/name[@revision] (default: the built-in model)",
        positional=True,
        nargs="?",
        metavar="MODEL",
    )


@dataclass(frozen=True)
class CompletionOptions:
    """Options of `gte-deploy completion`."""

    shell: Shell = required(
        'shell; for bash, add eval "$(gte-deploy completion bash)" to ~/.bashrc',
        positional=True,
        choices=SHELLS,
        metavar="SHELL",
    )


@dataclass(frozen=True)
class BenchOptions:
    """Arguments of `gte_deploy.tuning.bench.bench`."""

    bundle: str = required("folder of the bundle, or hub id owner/name[@revision]", positional=True, metavar="BUNDLE")
    backend: BundleBackend | None = option(
        None, "engine to time (default: each that can run the bundle)", choices=BUNDLE_BACKENDS
    )
    shapes: tuple[str, ...] | None = option(
        None,
        f"shapes of the batches to time (default: {' '.join(DEFAULT_SHAPES)})",
        nargs="+",
        metavar="ROWSxTOKENS",
    )
    repeats: int = option(10, "timed calls of each engine and shape", metavar="N", parse=int)
    num_threads: int | None = option(
        None,
        "CPU threads of each engine (default: every CPU that the process may use)",
        flags=("--threads",),
        metavar="N",
        parse=int,
    )


@dataclass(frozen=True)
class CompareOptions:
    """Options of `gte-deploy compare`: arguments of `gte_deploy.tuning.compare.compare_bundles`, and a page."""

    a: str = required("folder of a bundle, or hub id owner/name[@revision]", positional=True, metavar="A")
    b: str = required("the bundle to compare it with", positional=True, metavar="B")
    input: str | None = option(
        None,
        "UTF-8 file with one text a line; for a reranker a query, a tab and a document, or the query in the first line "
        "and a document in each other line; - is stdin (default: built-in texts)",
        flags=("-i", "--input"),
        metavar="FILE",
    )
    html: Path | None = option(None, "write a page with every text to this file, too", metavar="FILE", parse=Path)
    repeats: int = option(10, "most timed calls of each bundle", metavar="N", parse=int)
    num_threads: int | None = option(
        None,
        "CPU threads of each bundle (default: every CPU that the process may use)",
        flags=("--threads",),
        metavar="N",
        parse=int,
    )


@dataclass(frozen=True)
class PickOptions:
    """Options that record the fastest engine."""

    pick: bool = option(
        False, "record the fastest engine in your cache; every later load of this bundle on this machine takes it"
    )
    precision_may_change: bool = option(False, "let --pick take bf16, whose answers differ a little")

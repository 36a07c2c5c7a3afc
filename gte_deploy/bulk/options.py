"""The options of a bulk run. Importing this module loads neither numpy nor pyarrow, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choices, option

InputFormat = Literal["parquet", "jsonl", "csv", "tsv", "txt", "documents"]
INPUT_FORMATS: tuple[InputFormat, ...] = get_args(InputFormat)
OutputFormat = Literal["parquet", "npy", "jsonl", "lance"]
OUTPUT_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)
BulkEngine = Literal["local", "ray"]
BULK_ENGINES: tuple[BulkEngine, ...] = get_args(BulkEngine)
BulkMethod = Literal["encode", "encode_sparse", "encode_hybrid", "encode_multi_vector"]
"""The methods of a model that files of texts can be encoded with."""
BULK_METHODS: tuple[BulkMethod, ...] = get_args(BulkMethod)

_INPUT_SUFFIXES: dict[str, InputFormat] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    "": "txt",
}
_OUTPUT_SUFFIXES: dict[str, OutputFormat] = {
    ".parquet": "parquet",
    ".npy": "npy",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".lance": "lance",
}
COMPRESSED = (".gz", ".zst")
MAX_SHARD_ROWS = 1 << 20


@dataclass(frozen=True)
class BulkOptions:
    """How files are read and written, and where the model runs. Each field is an option of `gte-deploy encode`.

    Raises:
        InputError: a value is out of range, or an option does not go with another.
    """

    text_column: str = option(
        "text", "column of the texts, of a file with columns; the output keeps all columns", metavar="NAME"
    )
    input_format: InputFormat | None = option(
        None,
        "format of --input (default: by its extension, before .gz or .zst; a folder has files of one format, and one "
        "of .txt and .md files has a text a file, as documents)",
        choices=INPUT_FORMATS,
    )
    output_format: OutputFormat | None = option(
        None, "format of --output (default: by its extension)", choices=OUTPUT_FORMATS
    )
    embedding_column: str = option("embedding", "column of the output that gets the vectors", metavar="NAME")
    shard_rows: int = option(
        8192, "most rows that are encoded together, and lost when the process is killed", metavar="N", parse=int
    )
    restart: bool = option(False, "drop what an interrupted run has done, and begin again")
    engine: BulkEngine = option(
        "local", "where the model runs: in this process, or in actors of a Ray cluster", choices=BULK_ENGINES
    )
    workers: int | None = option(
        None,
        "actors of --engine ray (default: one for each GPU if the model runs on GPUs, else one for each node)",
        metavar="N",
        parse=int,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_choices(self)
        for name, value, most in (("shard_rows", self.shard_rows, MAX_SHARD_ROWS), ("workers", self.workers, 1 << 16)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
                raise InputError(f"{name} must be an integer from 1 to {most:,}, not {value!r}")
        if self.workers is not None and self.engine != "ray":
            raise InputError("workers is for the engine ray; one process uses streams and threads (see load)")


def output_format(path: Path, asked: OutputFormat | None) -> OutputFormat:
    """The format of an output file: as asked, or by its extension.

    Raises:
        InputError: the extension names no format.
    """
    if asked is not None:
        return asked
    if (found := _OUTPUT_SUFFIXES.get(path.suffix.lower())) is None:
        raise InputError(
            f"{path}: the extension {path.suffix!r} names no format; use {', '.join(sorted(_OUTPUT_SUFFIXES))}, or "
            f"--output-format with {', '.join(OUTPUT_FORMATS)}"
        )
    return found


def input_format(path: Path, asked: InputFormat | None) -> InputFormat:
    """The format of an input file: as asked, or by its extension.

    Raises:
        InputError: the extension names no format.
    """
    if asked is not None:
        return asked
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    if (found := _INPUT_SUFFIXES.get(suffix)) is None:
        known = ", ".join(sorted(filter(None, _INPUT_SUFFIXES)))
        raise InputError(
            f"{path}: the extension {suffix!r} names no format; name it by --input-format with "
            f"{', '.join(INPUT_FORMATS)} (extensions: {known}, each also with .gz or .zst)"
        )
    return found

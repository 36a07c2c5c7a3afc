"""Joins the parts of a finished run into its output, a part at a time."""

import importlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gte_deploy.bulk.columns import common_schema, dump_json, import_pyarrow, in_schema
from gte_deploy.bulk.options import OutputFormat
from gte_deploy.bulk.parts import Part
from gte_deploy.bulk.vectors import VectorColumns
from gte_deploy.core.arrays import save_rows
from gte_deploy.core.errors import MissingDependencyError
from gte_deploy.core.files import follow_links, keep_mode, replace_file, sync_directory, sync_tree

METADATA_KEY = b"gte_deploy"
"""Key of the schema's metadata, in parquet and Lance files, whose value is JSON: `VectorColumns.metadata`."""

COLUMNS_OF = {"parquet": "arrow", "lance": "arrow", "jsonl": "json", "npy": "none"}
"""Format of an output -> the form in which parts keep columns."""


def import_lance() -> Any:
    """Return the module lance.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("lance")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pylance", "lance") from error


def failures_file(output: Path) -> Path:
    """The file of the rows without vectors."""
    return output.with_name(f"{output.name}.failures.jsonl")


def join_parts(parts: Sequence[Part], output: Path, kind: OutputFormat, vectors: VectorColumns, aside: Path) -> None:
    """Write the output and the file of failures, each complete or not at all.

    Args:
        parts: all parts, in order.
        output: the file, or for Lance the folder.
        kind: its format.
        vectors: the columns of vectors.
        aside: a path on the same disk, for the unfinished output.

    Raises:
        OSError: the disk is full, or fails.
    """
    if kind == "npy":
        first = vectors.dense(parts[0])
        shape = (sum(part.rows for part in parts), first.shape[1])
        save_rows(aside, map(vectors.dense, parts), shape=shape, dtype=first.dtype)
    elif kind == "jsonl":
        with aside.open("w", encoding="utf-8") as lines:
            lines.writelines(_json_lines(parts, vectors))
    else:
        schema, tables = _tables(parts, vectors)
        if kind == "parquet":
            _write_parquet(aside, schema, tables)
        else:
            batches = itertools.chain.from_iterable(table.to_batches() for table in tables)
            reader = import_pyarrow().RecordBatchReader.from_batches(schema, batches)
            import_lance().write_dataset(reader, str(aside), mode="create")
    failed = failures_file(output)
    if any(part.failures for part in parts):
        lines_aside = aside.with_name(f"{aside.name}.failures")  # a kill leaves nothing beside the output
        lines_aside.write_text("".join(part.failure_lines() for part in parts), encoding="utf-8")
        _put(lines_aside, follow_links(failed))
    else:
        failed.unlink(missing_ok=True)
    _put(aside, output)


def _json_lines(parts: Sequence[Part], vectors: VectorColumns) -> Iterator[str]:
    for part in parts:
        for row, own in zip(part.lines(), vectors.lists(part), strict=True):
            yield f"{dump_json({**row, **own})}\n"


def _tables(parts: Sequence[Part], vectors: VectorColumns) -> tuple[Any, Iterator[Any]]:
    """The schema of the output, and a table of each part."""
    pyarrow = import_pyarrow()
    kept = common_schema([part.schema() for part in parts if part.rows])
    kinds = [column.type for column in vectors.arrow(parts[0])]
    fields = [*kept, *(pyarrow.field(name, kind) for name, kind in zip(vectors.names, kinds, strict=True))]
    about = json.dumps(vectors.metadata(parts), ensure_ascii=False).encode("utf-8")
    schema = pyarrow.schema(fields, metadata={**(kept.metadata or {}), METADATA_KEY: about})

    def tables() -> Iterator[Any]:
        for part in parts:
            if part.rows:
                columns = in_schema(part.table(), kept).columns
                yield pyarrow.Table.from_arrays([*columns, *vectors.arrow(part)], schema=schema)

    return schema, tables()


def _write_parquet(path: Path, schema: Any, tables: Iterator[Any]) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _put(aside: Path, output: Path) -> None:
    """Rename the finished output into its place."""
    if aside.is_file():
        replace_file(aside, output)
    else:
        sync_tree(aside)
        keep_mode(aside, output)
        if output.exists():
            output.rename(aside.with_name("replaced"))
        aside.rename(output)
        shutil.rmtree(aside.with_name("replaced"), ignore_errors=True)
    sync_directory(output.parent)

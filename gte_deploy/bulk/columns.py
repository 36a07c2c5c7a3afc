"""The columns that an output keeps: as Arrow tables, or as JSON objects."""

import base64
import datetime
import decimal
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gte_deploy.core.errors import InputError, MissingDependencyError


def import_pyarrow() -> Any:
    """Return the module pyarrow.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pyarrow", "bulk") from error
    return pyarrow


def is_text_type(kind: Any) -> bool:
    """Whether an Arrow type holds texts, or nothing but nulls."""
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    views = getattr(types, "is_string_view", lambda _: False)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind) or views(kind))


def column_names(rows: Sequence[Any]) -> set[str]:
    """The names of the columns that the rows of a shard have."""
    return {
        name
        for part in rows
        for name in ((name for row in part for name in row) if isinstance(part, list) else part.schema.names)
    }


def table_of(rows: Sequence[Any]) -> Any:
    """The rows of a shard as a table.

    Args:
        rows: lists of dicts, whose keys are columns, or RecordBatches. A column of dicts whose values have no common
            type becomes one of texts.

    Raises:
        InputError: the batches come from files whose columns have no common type.
    """
    pyarrow = import_pyarrow()
    if not rows:
        return pyarrow.table({})
    if not isinstance(rows[0], list):
        tables = [pyarrow.Table.from_batches([batch]) for batch in rows]
        try:
            return pyarrow.concat_tables(tables, promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise InputError(f"the columns of the input's files have no common type: {error}") from error
    flat = [row for part in rows for row in part]
    names = dict.fromkeys(name for row in flat for name in row)
    return pyarrow.table({name: _array([row.get(name) for row in flat]) for name in names})


def _array(values: list[Any]) -> Any:
    pyarrow = import_pyarrow()
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.array([as_text(value) for value in values], pyarrow.string())


def as_text(value: Any) -> str | None:
    """A value of a column without one type, as a text; a text stays as it is."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=_plain, ensure_ascii=False)


def common_schema(schemas: Sequence[Any]) -> Any:
    """The schema that tables of all these schemas are cast to. A column without a common type has the type of texts."""
    pyarrow = import_pyarrow()
    kinds: dict[str, Any] = {}
    for schema in schemas:
        for column in schema:
            known = kinds.get(column.name)
            kinds[column.name] = column.type if known is None else _common_type(known, column.type)
    metadata = next((schema.metadata for schema in schemas if schema.metadata), None)
    # A column without any value has no type; texts are what every reader takes.
    null = pyarrow.types.is_null
    fields = [pyarrow.field(name, pyarrow.string() if null(kind) else kind) for name, kind in kinds.items()]
    return pyarrow.schema(fields, metadata=metadata)


def _common_type(one: Any, other: Any) -> Any:
    pyarrow = import_pyarrow()
    if one == other:
        return one
    schemas = [pyarrow.schema([pyarrow.field("column", kind)]) for kind in (one, other)]
    try:
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pyarrow.ArrowException:
        return pyarrow.string()


def in_schema(table: Any, schema: Any) -> Any:
    """The table with the columns and types of `common_schema`; a column that it lacks holds nulls."""
    pyarrow = import_pyarrow()
    columns = []
    for column in schema:
        if column.name not in table.column_names:
            columns.append(pyarrow.nulls(len(table), column.type))
            continue
        values = table.column(column.name)
        if values.type != column.type:
            values = _cast(values, column.type)
        columns.append(values)
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _cast(values: Any, kind: Any) -> Any:
    pyarrow = import_pyarrow()
    if kind == pyarrow.string() and not is_text_type(values.type):
        return pyarrow.array([as_text(value) for value in values.to_pylist()], kind)
    return values.cast(kind)


def json_rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows of a shard as JSON data: times in ISO 8601, decimals as texts, bytes in base64."""
    return [row for part in rows for row in (part if isinstance(part, list) else part.to_pylist())]


def dump_json(row: dict[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)

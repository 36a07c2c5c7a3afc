"""What every worker of a run needs: the input, the model and the folder of parts."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from gte_deploy.bulk.columns import column_names
from gte_deploy.bulk.options import BulkMethod, BulkOptions
from gte_deploy.bulk.parts import Part, PartsFolder
from gte_deploy.bulk.shards import Cursor, InputFiles, Shard, read_shards
from gte_deploy.bulk.vectors import ShardEncoder, vector_names
from gte_deploy.core.calls import Call
from gte_deploy.core.errors import InputError
from gte_deploy.model import Model


@dataclass(frozen=True)
class BulkJob:
    """What every worker of a run needs.

    Args:
        files: the input.
        parts: the folder of parts.
        columns: form in which parts keep columns.
        options: how files are read.
        source: the model, or a function that loads it. Another process gets the model by pickling either.
        method: method of the model that encodes.
        arguments: arguments of the method.
        on_gpu: whether the model runs on a GPU.
    """

    files: InputFiles
    parts: PartsFolder
    columns: str
    options: BulkOptions
    source: Model | Callable[[], Model]
    method: BulkMethod
    arguments: Mapping[str, Any]
    on_gpu: bool

    def opened(self) -> AbstractContextManager[Model]:
        """The model; at the end of the block it is closed, unless the caller had loaded it."""
        return nullcontext(self.source) if isinstance(self.source, Model) else self.source()

    def encoder(self, model: Model) -> ShardEncoder:
        """What encodes shards with the model.

        Raises:
            InputError: see `ShardEncoder`.
        """
        return ShardEncoder(model, self.arguments, self.method)

    def shards(self, encoder: ShardEncoder, cursor: Cursor) -> Iterator[Shard]:
        """Yield the shards from a place on."""
        return read_shards(self.files, cursor, shard_rows=self.options.shard_rows, most_bytes=encoder.most_bytes)

    def computed(self, encoder: ShardEncoder, shard: Shard, call: Call) -> Callable[[], Part]:
        """Encode a shard, and return the function that stores it. `call` gets the cost.

        Raises:
            InputError: an .npy file cannot hold the vectors, or a column of the input has their name.
            BackendError: the engine failed.
        """
        if self.columns == "none" and encoder.kind != "dense":
            raise InputError(f"{encoder.kind} vectors make no single array for an .npy file; write parquet or jsonl")
        names = vector_names(encoder.kind, self.options.embedding_column)
        if self.columns != "none" and (taken := column_names(shard.rows) & set(names)):
            raise InputError(
                f"the input has a column {', '.join(sorted(taken))}: give the vectors another name with "
                "--embedding-column"
            )
        with call:
            encoded, arrays = encoder.encode(shard)
        facts = {"tokens": call.usage.tokens, "made_by": encoder.facts}
        return functools.partial(self.parts.write, encoded, arrays, facts, self.columns)

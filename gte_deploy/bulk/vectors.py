"""What a model computes for a shard, as arrays of a part, and these arrays as columns of the output.

Shapes: N rows, D embedding size, E entries or tokens of all rows together.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.bulk.columns import import_pyarrow
from gte_deploy.bulk.options import BULK_METHODS, BulkMethod
from gte_deploy.bulk.parts import Part
from gte_deploy.bulk.shards import Shard
from gte_deploy.core.errors import InputError, NonFiniteError
from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import FILE_PRECISIONS
from gte_deploy.model import Model
from gte_deploy.tasks.interface import prompt_text
from gte_deploy.tasks.pooling import quantize
from gte_deploy.tasks.sparse import SparseEmbedding
from gte_deploy.text.chunking import SentenceChunks, TokenChunks
from gte_deploy.text.inputs import MAX_TEXT_BYTES

VectorKind = Literal["dense", "sparse", "hybrid", "tokens", "chunks"]
Arrays = dict[str, NDArray[Any]]

_A_VECTOR_A_ROW = ("dense", "hybrid", "chunks")
_ENTRY = ("index", "token", "weight")
"""The fields of an entry of a sparse vector: its vocabulary id, its name, as `encode_sparse` gives it, its weight."""

_OF_ALL_TEXTS = ("int8", "uint8")
"""Precisions whose steps depend on the range of all vectors: they are made when all parts are there."""

_COMMON = ("prompt_name", "prompt", "batch_size", "truncation", "max_length", "max_batch_tokens")
_DENSE = (*_COMMON, "normalize_embeddings", "truncate_dim", "pooling", "precision")
_ARGUMENTS: dict[VectorKind, tuple[str, ...]] = {
    "dense": _DENSE,
    "chunks": (*_DENSE, "chunks", "window_overlap"),
    "sparse": (*_COMMON, "max_active_dims", "route"),
    "hybrid": (*(name for name in _DENSE if name != "pooling"), "max_active_dims"),
    "tokens": (*_COMMON, "normalize_embeddings", "is_query", "skip_words", "precision"),
}


class ShardEncoder:
    """Encodes shards with a model."""

    def __init__(self, model: Model, arguments: Mapping[str, Any], method: BulkMethod = "encode") -> None:
        """Check the arguments of the call, by encoding one short text.

        Args:
            model: the model.
            arguments: arguments of the method. `precision` may also be "float16".
            method: the method of the model; "encode" gives what suits the model's task.

        Raises:
            InputError: the model has no such method, or an argument is unknown or out of range.
        """
        self._model = model
        self.kind: VectorKind = _kind_of(model, arguments, method)
        known = _ARGUMENTS[self.kind]
        if unknown := [name for name in arguments if name not in known]:
            raise InputError(
                f"{unknown[0]} is not an option for files with {model.path}, a model for {model.spec.task}; options "
                f"are {', '.join(known)}"
            )
        if self.kind == "chunks" and not isinstance(arguments["chunks"], TokenChunks | SentenceChunks):
            raise InputError("the chunks of files are TokenChunks(…) or SentenceChunks(…), and not places in each text")
        self._precision = arguments.get("precision") or "float32"
        check_choice("precision", self._precision, FILE_PRECISIONS)
        if self.kind == "tokens" and self._precision not in ("float32", "float16"):
            raise InputError(f"precision {self._precision!r} is not for embeddings of tokens; use float32 or float16")
        self._arguments = {name: value for name, value in arguments.items() if name != "precision"}
        if self._precision in ("binary", "ubinary"):
            self._arguments["precision"] = self._precision
        self._is_query = bool(self._arguments.pop("is_query", False))
        self._prompt = prompt_text(model.spec, arguments.get("prompt"), arguments.get("prompt_name"))
        self.most_bytes = MAX_TEXT_BYTES - len(self._prompt.encode("utf-8"))
        self._compute(["a"])

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a reader of the vectors needs to know, as JSON data."""
        info = self._model.info()
        return {
            "gte_deploy": __version__,
            "model": str(self._model.path),
            "task": self._model.spec.task,
            "kind": self.kind,
            "engine": f"{info['backend']} {info['precision']} {info['device']}",
            **({"is_query": self._is_query} if self.kind == "tokens" else {"prompt": self._prompt}),
            **plain_arguments(self._arguments),
            "precision": self._precision,
        }

    def encode(self, shard: Shard) -> tuple[Shard, Arrays]:
        """Encode a shard.

        Returns:
            The shard, in which texts that the model refused are among the failures, and each chunk is a row; and the
            arrays of a `Part`.

        Raises:
            BackendError: the engine failed.
        """
        reasons: dict[int, str] = {}
        numbers = list(range(len(shard.texts)))
        try:
            arrays = self._compute(shard.texts)
        except (InputError, NonFiniteError):
            reasons = self._too_long(shard.texts)
            numbers = [i for i in numbers if i not in reasons]
            arrays = self._apart(shard.texts, numbers, reasons)
        if self._precision == "float16":
            arrays = self._halved(arrays, numbers, reasons)
        if "indices" in arrays:
            arrays["names"] = self._names(arrays["indices"])
        shard = shard.without(reasons)
        if self.kind == "chunks":
            counts = np.diff(arrays["offsets"])
            ends = zip(np.repeat(np.arange(len(counts)), counts).tolist(), arrays["start"], arrays["end"], strict=True)
            shard = shard.repeated(counts.tolist(), [shard.texts[i][begin:end] for i, begin, end in ends])
        return shard, arrays

    def _compute(self, texts: Sequence[str]) -> Arrays:
        model, options = self._model, self._arguments
        # A model gives no answer to an empty list; one text gives types and widths.
        asked = list(texts) or ["a"]
        if self.kind == "dense":
            return {"embedding": model.encode(asked, **options)[: len(texts)]}
        if self.kind == "chunks":
            chunked = model.encode(asked, **options)
            offsets = np.concatenate([each.offsets for each in chunked[: len(texts)]] or [np.zeros((0, 2), np.int64)])
            # One text may have no token, and so no chunk; all together have the type and the width of the vectors.
            vectors = np.concatenate([each.embeddings for each in chunked])
            return {
                "offsets": _offsets([len(each) for each in chunked[: len(texts)]]),
                "start": offsets[:, 0],
                "end": offsets[:, 1],
                "embedding": vectors[: len(offsets)],
            }
        if self.kind == "sparse":
            return _entries(model.encode_sparse(asked, as_dict=False, **options)[: len(texts)])
        if self.kind == "hybrid":
            both = model.encode_hybrid(asked, as_dict=False, **options)
            return {**_entries(both.sparse[: len(texts)]), "embedding": both.dense[: len(texts)]}
        answers = (model.encode_query if self._is_query else model.encode_document)(asked, **options)
        found = answers[: len(texts)]
        empty = np.zeros((0, answers[0].shape[1]), np.float32)
        return {
            "offsets": _offsets([len(each) for each in found]),
            "embedding": np.concatenate([empty, *found]),
        }

    def _halved(self, arrays: Arrays, numbers: list[int], reasons: dict[int, str]) -> Arrays:
        """Convert to float16; a row [D] with a larger number than it can hold is left out, and `reasons` gets it."""
        array = arrays["embedding"]
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        arrays = {**arrays, "embedding": half}
        if self.kind not in ("dense", "hybrid") or np.isfinite(half).all():
            return arrays
        kept = np.isfinite(half).all(axis=1)
        numbers = [number for number in numbers if number not in reasons]
        for place in np.flatnonzero(~kept):
            largest = np.abs(array[place]).max()
            reasons[numbers[place]] = f"the vector has {largest:,.0f}, and float16 holds 65,504 at most"
        if self.kind == "hybrid":
            counts = np.diff(arrays["offsets"])
            entries = np.repeat(kept, counts)
            arrays |= {name: arrays[name][entries] for name in ("indices", "values")}
            arrays["offsets"] = _offsets(counts[kept].tolist())
        return {**arrays, "embedding": half[kept]}

    def _names(self, indices: NDArray[np.int32]) -> NDArray[np.uint8]:
        """The names of the vocabulary ids that are there, in rising order, as JSON."""
        ids = np.unique(indices).astype(np.int64)
        all_alike = SparseEmbedding(ids, np.ones(len(ids), np.float32), self._model.spec.vocab_size)
        return np.frombuffer(json.dumps([name for name, _ in self._model.decode(all_alike)]).encode(), np.uint8)

    def _too_long(self, texts: Sequence[str]) -> dict[int, str]:
        """Texts with too many tokens: number -> why."""
        limit = self._arguments.get("max_length") or self._model.max_seq_length or self._model.spec.max_length
        if self._arguments.get("truncation") or self.kind in ("tokens", "chunks"):
            return {}
        ids = self._model.tokenizer([f"{self._prompt}{text}" for text in texts])["input_ids"]
        return {
            i: f"the text has {len(row):,} tokens, special tokens included; the limit is {limit:,}. Pass --truncation "
            "to keep the first ones."
            for i, row in enumerate(ids)
            if len(row) > limit
        }

    def _apart(self, texts: Sequence[str], numbers: list[int], reasons: dict[int, str]) -> Arrays:
        """The arrays of the chosen texts, without those that the model refuses, which `reasons` gets."""
        try:
            return self._compute([texts[i] for i in numbers])
        except (InputError, NonFiniteError) as error:
            if len(numbers) == 1:
                reasons[numbers[0]] = str(error)
                return self._compute([])
        half = len(numbers) // 2
        return _concatenated([self._apart(texts, part, reasons) for part in (numbers[:half], numbers[half:])])


def _kind_of(model: Model, arguments: Mapping[str, Any], method: BulkMethod) -> VectorKind:
    check_choice("method", method, BULK_METHODS)
    task = model.spec.task
    if method == "encode_multi_vector" and task != "multi-vector":
        raise InputError(f"this needs a multi-vector model, and {model.path} is made for {task}")
    if method in ("encode_sparse", "encode_hybrid"):
        return "sparse" if method == "encode_sparse" else "hybrid"
    if task in ("sparse", "multi-vector"):
        return "sparse" if task == "sparse" else "tokens"
    return "dense" if arguments.get("chunks") is None else "chunks"


def vector_names(kind: VectorKind, name: str) -> tuple[str, ...]:
    """The names of the columns that the output gets; those of vectors begin with `name`."""
    if kind == "hybrid":
        return (name, f"{name}_sparse")
    return ("chunk_start", "chunk_end", name) if kind == "chunks" else (name,)


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as JSON data; a rule for chunks as Python writes it."""
    return {name: repr(value) if name == "chunks" else value for name, value in arguments.items()}


@dataclass(frozen=True)
class VectorColumns:
    """The columns of an output that hold its vectors.

    Args:
        kind: what the model gave.
        name: name of the column, or the first part of the names of several.
        precision: type of the vectors.
        ranges: for int8 and uint8, the least and the largest value [D] of each dimension.
    """

    kind: VectorKind
    name: str
    precision: str
    ranges: tuple[NDArray[np.float32], NDArray[np.float32]] | None

    @classmethod
    def of(cls, parts: Sequence[Part], name: str) -> "VectorColumns":
        """Read from the parts what was computed.

        Raises:
            InputError: int8 or uint8 of fewer than two vectors, which have no range.
        """
        made_by = parts[0].made_by
        ranges = None
        if made_by["precision"] in _OF_ALL_TEXTS:
            if sum(part.rows for part in parts) < 2:
                raise InputError(
                    f"precision {made_by['precision']!r} takes each dimension's range from two rows or more"
                )
            found = [part.array("embedding") for part in parts if part.rows]
            low = np.min([array.min(axis=0) for array in found], axis=0)
            ranges = low, np.max([array.max(axis=0) for array in found], axis=0)
        return cls(made_by["kind"], name, made_by["precision"], ranges)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return vector_names(self.kind, self.name)

    def describe(self, parts: Sequence[Part]) -> str:
        """What the vectors of all parts are, for people."""
        rows = sum(part.rows for part in parts)
        if self.kind == "sparse":
            return f"{rows:,} sparse vectors"
        first = self.dense(parts[0])
        width = f"{rows:,} lists of [{first.shape[1]}]" if self.kind == "tokens" else f"({rows}, {first.shape[1]})"
        more = {"chunks": " of chunks", "hybrid": " and sparse vectors"}.get(self.kind, "")
        return f"{width} {first.dtype}{more}"

    def dense(self, part: Part) -> NDArray[Any]:
        """The vectors [N, D] of a part, in their type."""
        array = part.array("embedding")
        return array if self.ranges is None else quantize(array, self.precision, self.ranges)  # type: ignore[arg-type]

    def arrow(self, part: Part) -> list[Any]:
        """The columns of a part as Arrow arrays: fixed-size lists of numbers, lists of them, or lists of entries."""
        pyarrow = import_pyarrow()
        columns = []
        if self.kind == "chunks":
            columns = [pyarrow.array(np.asarray(part.array(name))) for name in ("start", "end")]
        if self.kind in _A_VECTOR_A_ROW:
            columns.append(_fixed_size_lists(self.dense(part)))
        if self.kind in ("sparse", "hybrid"):
            indices, names, places = _named_entries(part)
            tokens = pyarrow.array(names, pyarrow.string()).take(pyarrow.array(places))
            fields = [pyarrow.array(indices), tokens, pyarrow.array(np.asarray(part.array("values")))]
            entries = pyarrow.StructArray.from_arrays(fields, _ENTRY)
            columns.append(pyarrow.LargeListArray.from_arrays(pyarrow.array(part.array("offsets")), entries))
        if self.kind == "tokens":
            vectors = _fixed_size_lists(part.array("embedding"))
            columns.append(pyarrow.LargeListArray.from_arrays(pyarrow.array(part.array("offsets")), vectors))
        return columns

    def lists(self, part: Part) -> list[dict[str, Any]]:
        """The columns of each row of a part, as JSON data."""
        columns: list[Any] = []
        if self.kind == "chunks":
            columns = [part.array(name).tolist() for name in ("start", "end")]
        if self.kind in _A_VECTOR_A_ROW:
            columns.append(self.dense(part).tolist())
        if self.kind in ("sparse", "hybrid"):
            indices, names, places = _named_entries(part)
            values = zip(indices.tolist(), places.tolist(), part.array("values").tolist(), strict=True)
            entries = [dict(zip(_ENTRY, (index, names[place], value), strict=True)) for index, place, value in values]
            columns.append(_cut(entries, part.array("offsets")))
        if self.kind == "tokens":
            columns.append([each.tolist() for each in _cut(part.array("embedding"), part.array("offsets"))])
        return [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]

    def metadata(self, parts: Sequence[Part]) -> dict[str, Any]:
        """What a reader needs to know, as JSON data; with the ranges of int8 and uint8, which queries need, too."""
        facts = {**parts[0].made_by, "engine": sorted({part.made_by["engine"] for part in parts})}
        if self.ranges is not None:
            facts["ranges"] = [each.tolist() for each in self.ranges]
        return facts


def _fixed_size_lists(array: NDArray[Any]) -> Any:
    pyarrow = import_pyarrow()
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.asarray(array).reshape(-1)), array.shape[1])


def _entries(embeddings: Sequence[SparseEmbedding]) -> Arrays:
    """The entries of all embeddings one after the other, those of each by their weight, the heaviest first."""
    orders = [np.argsort(-each.values, kind="stable") for each in embeddings]
    ordered = list(zip(embeddings, orders, strict=True))
    return {
        "offsets": _offsets([len(each) for each in embeddings]),
        "indices": np.concatenate([[], *(each.indices[order] for each, order in ordered)]).astype(np.int32),
        "values": np.concatenate([[], *(each.values[order] for each, order in ordered)]).astype(np.float32),
    }


def _named_entries(part: Part) -> tuple[NDArray[np.int32], list[str], NDArray[np.intp]]:
    """The vocabulary ids [E] of a part's entries, the names of those that are there, and which [E] of the names."""
    indices = np.asarray(part.array("indices"))
    return indices, json.loads(part.array("names").tobytes()), np.unique(indices, return_inverse=True)[1]


def _cut(values: Any, offsets: NDArray[np.int64]) -> list[Any]:
    """The values of each row."""
    places = offsets.tolist()
    return [values[begin:end] for begin, end in zip(places, places[1:], strict=False)]


def _offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _concatenated(arrays: Sequence[Arrays]) -> Arrays:
    first, *others = arrays
    joined = {name: np.concatenate([each[name] for each in arrays]) for name in first if name != "offsets"}
    if "offsets" in first:
        offsets = first["offsets"]
        for other in others:
            offsets = np.concatenate([offsets, other["offsets"][1:] + offsets[-1]])
        joined["offsets"] = offsets
    return joined

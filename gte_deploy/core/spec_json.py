"""Reads a `ModelSpec` from JSON, in a bundle's manifest or in the description that a server publishes."""

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from gte_deploy.core.files import is_below
from gte_deploy.core.spec import (
    LATE_INTERACTIONS,
    LOGITS,
    POOLINGS,
    SIMILARITIES,
    SPARSE_ACTIVATIONS,
    SPARSE_HEADS,
    SPARSE_POOLINGS,
    SPARSE_ROUTES,
    TASK_NAMES,
    ModelSpec,
    MultiVectorSpec,
    QueryExpansion,
    SparseSpec,
)
from gte_deploy.core.typed_json import JsonValue

# Beyond every model; they bound what a wrong number could make a program allocate.
_MAX_LENGTH = 1 << 24
_MAX_VOCABULARY = 1 << 26
_MAX_WIDTH = 1 << 20


def spec_from_json(data: Mapping[str, Any], place: str = "spec") -> ModelSpec:
    """Rebuild a spec from `dataclasses.asdict(spec)` that was stored as JSON; `place` names it in errors.

    Raises:
        ValueError: the data are not a spec; the message names the field.
    """
    return read_spec(JsonValue(data, place))


def read_spec(data: JsonValue) -> ModelSpec:
    """Read a spec from a value of a document. Fields that older bundles lack have the defaults of `ModelSpec`.

    Raises:
        ValueError: the data are not a spec; the message names the field.
    """
    from gte_deploy.core.activations import ACTIVATIONS  # needs numpy, for which a command's --help need not wait

    data.has_only([field.name for field in dataclasses.fields(ModelSpec)])
    task = data["task"].one_of(TASK_NAMES)
    vocab_size = data["vocab_size"].whole(1, _MAX_VOCABULARY)
    prompts = {name: prompt.text() for name, prompt in data["prompts"].fields().items()}
    labels = data["id2label"]
    spec = ModelSpec(
        task=task,
        max_length=data["max_length"].whole(1, _MAX_LENGTH),
        vocab_size=vocab_size,
        hidden_size=data["hidden_size"].whole(1, _MAX_WIDTH),
        pad_token_id=data["pad_token_id"].whole(0, vocab_size - 1),
        pooling=data["pooling"].one_of(POOLINGS),
        logits=data["logits"].one_of(LOGITS),
        num_labels=data["num_labels"].whole(0, _MAX_WIDTH),
        id2label={_label_id(name, labels): label.text() for name, label in labels.fields().items()},
        prompts=prompts,
        default_prompt_name=data["default_prompt_name"].one_of((None, *prompts)),
        normalize=data["normalize"].flag(),
        token_types=data.get("token_types", False).flag(),
        type_vocab_size=data.get("type_vocab_size", 0).whole(0, _MAX_WIDTH),
        embedding_size=data.get("embedding_size").or_none(lambda size: size.whole(1, _MAX_WIDTH)),
        truncate_dim=data.get("truncate_dim").or_none(lambda size: size.whole(1, _MAX_WIDTH)),
        similarity=data.get("similarity").one_of(
            (None, *(LATE_INTERACTIONS if task == "multi-vector" else SIMILARITIES))
        ),
        activation=data.get("activation").one_of((None, *ACTIVATIONS)),
        sparse=data.get("sparse").or_none(_sparse),
        multi_vector=data.get("multi_vector").or_none(_multi_vector),
    )
    _check_together(spec)
    return spec


def _label_id(name: str, labels: JsonValue) -> int:
    return int(JsonValue(name, f"a name in {labels.place}").text("[0-9]{1,9}"))


def _check_together(spec: ModelSpec) -> None:
    if spec.token_types and spec.type_vocab_size < 2:
        raise ValueError(f"spec.token_types is true, and spec.type_vocab_size {spec.type_vocab_size} is below 2")
    if spec.task in ("sparse", "hybrid") and spec.sparse is None:
        raise ValueError(f"spec.sparse is missing, though the task is {spec.task}")
    if spec.task == "hybrid" and spec.sparse is not None and spec.sparse.head != "token-weights":
        raise ValueError(f"spec.sparse.head is {spec.sparse.head!r}, though the task is hybrid")
    if (spec.multi_vector is None) != (spec.task != "multi-vector"):
        raise ValueError(f"spec.multi_vector is {spec.multi_vector}, though the task is {spec.task}")
    if spec.multi_vector is not None:
        _check_multi_vector(spec.multi_vector, spec)


def _sparse(data: JsonValue) -> SparseSpec:
    data.has_only([field.name for field in dataclasses.fields(SparseSpec)])
    return SparseSpec(
        head=data["head"].one_of(SPARSE_HEADS),
        activation=data.get("activation", "relu").one_of(SPARSE_ACTIVATIONS),
        pooling=data.get("pooling", "max").one_of(SPARSE_POOLINGS),
        query_weights=data.get("query_weights").or_none(read_name),
        default_route=data.get("default_route", "document").one_of((None, *SPARSE_ROUTES)),
        max_active_dims=data.get("max_active_dims").or_none(lambda size: size.whole(1, _MAX_VOCABULARY)),
        unweighted=_token_ids(data.get("unweighted", [])),
    )


def _multi_vector(data: JsonValue) -> MultiVectorSpec:
    data.has_only([field.name for field in dataclasses.fields(MultiVectorSpec)])
    return MultiVectorSpec(
        query_length=data["query_length"].whole(1, _MAX_LENGTH),
        document_length=data["document_length"].whole(1, _MAX_LENGTH),
        query_prefix=data["query_prefix"].or_none(_token_id),
        document_prefix=data["document_prefix"].or_none(_token_id),
        expansion=data["expansion"].or_none(_expansion),
        skipped_in_queries=_token_ids(data["skipped_in_queries"]),
        skipped_in_documents=_token_ids(data["skipped_in_documents"]),
    )


def _expansion(data: JsonValue) -> QueryExpansion:
    data.has_only([field.name for field in dataclasses.fields(QueryExpansion)])
    return QueryExpansion(
        token=_token_id(data["token"]),
        length=data["length"].whole(1, _MAX_LENGTH),
        attended=data["attended"].flag(),
        fixed=data["fixed"].flag(),
    )


def _token_id(data: JsonValue) -> int:
    return data.whole(0, _MAX_VOCABULARY)


def _token_ids(data: JsonValue) -> tuple[int, ...]:
    return tuple(_token_id(entry) for entry in data.entries())


def _check_multi_vector(found: MultiVectorSpec, spec: ModelSpec) -> None:
    lengths = {"query_length": found.query_length, "document_length": found.document_length}
    ids: list[int] = [*found.skipped_in_queries, *found.skipped_in_documents, *found.prefixes]
    if (expansion := found.expansion) is not None:
        lengths["expansion.length"] = expansion.length
        ids.append(expansion.token)
    for name, length in lengths.items():
        if length > spec.max_length:
            raise ValueError(f"spec.multi_vector.{name} must be 1 to {spec.max_length}, not {length!r}")
    if any(token >= spec.vocab_size for token in ids):
        raise ValueError(f"spec.multi_vector has token ids outside the vocabulary of {spec.vocab_size}: {ids}")


def read_name(data: JsonValue) -> str:
    """Return a path below a folder, with forward slashes. Raises ValueError: it is another string, or none."""
    name = data.text()
    if not name or not is_below(name) or str(PurePosixPath(name)) != name:
        raise data.refuse("a plain relative path")
    return name

"""Checks the answers of a server, and its description of its model, before anything is computed with them.

An answer of the wrong number of rows would be spread over all texts, and one of another width or type would go on to
the caller. So each output tensor has a form here: a type, and sizes that the call and the model fix.

Shapes: B rows of a request, S tokens, T tokens of the text itself, D embedding size, H hidden size, L labels, M masks,
K answers for each, N entries or entities.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import BackendError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.core.spec_json import spec_from_json
from gte_deploy.core.typed_json import JsonValue
from gte_deploy.tasks import classify, embed, fill_mask, hybrid, multi_vector, sparse, token_classify
from gte_deploy.tasks.base import Ensemble, Tensors
from gte_deploy.text.inputs import MAX_BATCH_SIZE

_FLOAT32 = (np.dtype(np.float32),)
_ENCODED = (np.dtype(np.float32), np.dtype(np.float16))  # as the encoder's graph or plan gives it
_INT32 = (np.dtype(np.int32),)
_INT64 = (np.dtype(np.int64),)
_TEXT = (np.dtype(np.object_),)
_DESCRIPTIONS = ("gte_deploy", "gte_deploy_spec")


@dataclass(frozen=True)
class Form:
    """The form of an output tensor.

    Args:
        dtypes: the types that it may have.
        dims: its sizes behind the rows: a number, or a letter for a size that tensors with the same letter share.
        low: the least value; None if values are free.
        high: the largest value; None for no limit.
        counts: the letter of the size of which this tensor says how much each row uses.
        counted_by: the tensor that says how much of each row is used; the rest may have other values.
    """

    dtypes: tuple[np.dtype[Any], ...]
    dims: tuple[int | str, ...]
    low: int | None = None
    high: int | None = None
    counts: str | None = None
    counted_by: str | None = None


@dataclass(frozen=True)
class ServedDescription:
    """The description of its model that a server publishes.

    Args:
        spec: the facts that decide what the model computes.
        max_rows: the most rows of a request.
        max_state_rows: the most rows of a request for token embeddings; None for `max_rows`.
        hidden_states: whether the encoder gives hidden states.
        response_cache: whether the ensembles of texts use the server's response cache.
        tokenizer: the fingerprint of the tokenizer; None if the server takes no token ids.
        buckets: the lengths that rows of token ids are padded to, in rising order.
        max_masks: the most masks of a text; None if the model fills no masks.
        told: all facts but the spec as the server tells them.
    """

    spec: ModelSpec
    max_rows: int
    max_state_rows: int | None
    hidden_states: bool
    response_cache: bool
    tokenizer: str | None
    buckets: tuple[int, ...]
    max_masks: int | None
    told: Mapping[str, Any] = field(default_factory=dict)


def forms(ensemble: Ensemble, spec: ModelSpec, width: int) -> dict[str, Form]:
    """The form of each tensor that an ensemble may answer; `width` is the size of its embeddings."""
    make = _FORMS.get(ensemble.name)
    return _dense(width) if make is None else make(spec, width)


def _dense(width: int) -> dict[str, Form]:
    return {"EMBEDDING": Form(_ENCODED, (width,)), "NORMALIZED_EMBEDDING": Form(_ENCODED, (width,))}


def _weights(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {
        "TOKENS": Form(_INT32, (1,), low=0, counts="N"),
        "TOKEN": Form(_TEXT, ("N",)),
        "TOKEN_ID": Form(_INT64, ("N",), low=0, high=spec.vocab_size - 1, counted_by="TOKENS"),
        "WEIGHT": Form(_FLOAT32, ("N",)),
    }


def _dense_and_weights(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {**_dense(width), **_weights(spec, width)}


def _states(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {
        "INPUT_IDS": Form(_INT64, ("S",), low=0, high=spec.vocab_size - 1),
        "ATTENTION_MASK": Form(_INT64, ("S",), low=0, high=1),
        "TOKEN_TYPE_IDS": Form(_INT64, ("S",), low=0, high=max(0, spec.type_vocab_size - 1)),
        "TOKEN_EMBEDDINGS": Form(_ENCODED, ("S", spec.hidden_size)),
    }


def _vectors(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {"TOKENS": _TOKENS, "TOKEN_EMBEDDINGS": Form(_FLOAT32, ("T", spec.embedding_width))}


def _scores(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {name: Form(_FLOAT32, (max(1, spec.num_labels),)) for name in ("SCORE", "LOGITS")}


def _masks(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {
        "MASKS": Form(_INT32, (1,), low=1, counts="M"),
        "TOKEN": Form(_TEXT, ("M", "K")),
        "TOKEN_ID": Form(_INT64, ("M", "K"), low=0, high=spec.vocab_size - 1, counted_by="MASKS"),
        "SCORE": Form(_FLOAT32, ("M", "K")),
        "SEQUENCE": Form(_TEXT, ("M", "K")),
    }


def _entities(spec: ModelSpec, width: int) -> dict[str, Form]:
    return {
        "ENTITIES": Form(_INT32, (1,), low=0, counts="N"),
        **{name: Form(_TEXT, ("N",)) for name in ("LABEL", "WORD")},
        "INDEX": Form(_INT32, ("N",), low=-1),
        **{name: Form(_INT32, ("N",), low=0, counted_by="ENTITIES") for name in ("START", "END")},
        "SCORE": Form(_FLOAT32, ("N",)),
        "TOKENS": _TOKENS,
        "LOGITS": Form(_FLOAT32, ("T", spec.num_labels)),
    }


_TOKENS = Form(_INT32, (1,), low=0, counts="T")
_FORMS: Mapping[str, Callable[[ModelSpec, int], dict[str, Form]]] = {
    embed.TOKENS_SERVED.name: _states,
    sparse.SERVED.name: _weights,
    sparse.QUERIES_SERVED.name: _weights,
    hybrid.SERVED.name: _dense_and_weights,
    multi_vector.QUERY_VECTORS_SERVED.name: _vectors,
    multi_vector.DOCUMENT_VECTORS_SERVED.name: _vectors,
    classify.SERVED.name: _scores,
    fill_mask.SERVED.name: _masks,
    token_classify.ENTITIES_SERVED.name: _entities,
}


def checked_answer(values: Tensors, expected: Mapping[str, Form], rows: int, *, where: str) -> dict[str, NDArray[Any]]:
    """Return the tensors of an answer, embeddings in float32. Numbers that are not finite are not looked for.

    Args:
        values: the tensors by name.
        expected: the form of each.
        rows: the number of rows of the request.
        where: the ensemble and its server, for errors.

    Raises:
        BackendError: a tensor has another type or shape, values out of its range, counts more than there is, or a text
            that is not UTF-8; the message says which one.
    """
    sizes: dict[str, int] = {}
    for name, array in values.items():
        _check_form(name, array, expected[name], rows, sizes, where)
    for name, array in values.items():
        form = expected[name]
        if form.low is not None:
            used = array if form.counted_by is None else array[_counted(values[form.counted_by], array)]
            _check_range(name, used, form.low, form.high if form.counts is None else sizes[form.counts], where)
        elif array.dtype == np.object_:
            _check_texts(name, array, where)
    return {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in values.items()}


def _counted(counts: NDArray[Any], array: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each place of `array` [B, N, ...] is one of those that `counts` [B, 1] counts."""
    counted: NDArray[np.bool_] = np.arange(array.shape[1]) < counts
    return counted


def _check_form(name: str, array: NDArray[Any], form: Form, rows: int, sizes: dict[str, int], where: str) -> None:
    if array.dtype not in form.dtypes:
        wanted = " or ".join("text" if dtype == np.object_ else dtype.name for dtype in form.dtypes)
        raise BackendError(f"{where}: {name} has the type {array.dtype}, and it must be {wanted}. {_ADVICE}")
    dims = (rows, *(sizes.get(size, size) if isinstance(size, str) else size for size in form.dims))
    if array.ndim != len(dims) or any(
        isinstance(wanted, int) and wanted != got for wanted, got in zip(dims, array.shape, strict=True)
    ):
        shown = ", ".join(map(str, dims))
        raise BackendError(f"{where}: {name} has the shape {list(array.shape)}, and it must be [{shown}]. {_ADVICE}")
    sizes.update({size: got for size, got in zip(dims, array.shape, strict=True) if isinstance(size, str)})


def _check_range(name: str, array: NDArray[Any], low: int, high: int | None, where: str) -> None:
    wrong = array[(array < low) | (array > (np.iinfo(array.dtype).max if high is None else high))]
    if wrong.size:
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise BackendError(f"{where}: {name} has the value {wrong[0]}, and it must be {bounds}. {_ADVICE}")


def _check_texts(name: str, array: NDArray[Any], where: str) -> None:
    for value in array.reshape(-1):
        try:
            value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BackendError(f"{where}: {name} has a text that is not UTF-8 ({error}). {_ADVICE}") from error


_ADVICE = "The server has another model than it described, or something changed its answer."


def read_description(config: Mapping[str, Any], url: str) -> ServedDescription:
    """Read what gte-export wrote about the model into the configuration of every ensemble.

    Raises:
        BackendError: the configuration has other parts, or values that no export writes.
    """
    try:
        parameters = JsonValue(config)["parameters"]
        facts, spec = (json.loads(parameters[name]["string_value"].text()) for name in _DESCRIPTIONS)
        return _description(JsonValue(facts), spec_from_json(spec), config)
    except (ValueError, RecursionError) as error:
        raise BackendError(
            f"gte_embed at {url} does not come from this version of gte-export ({error!s:.300}). Export the repository "
            "again with gte-export --format triton."
        ) from error


def _description(facts: JsonValue, spec: ModelSpec, config: Mapping[str, Any]) -> ServedDescription:
    most = JsonValue(config.get("max_batch_size") or facts.get("max_batch_size", 1).value, "max_batch_size")
    buckets = facts.get("length_buckets").or_none(lambda sizes: [size.whole(1) for size in sizes.entries()]) or []
    if buckets != sorted(buckets):
        raise facts["length_buckets"].refuse("rising lengths")
    tokenizer = facts.get("tokenizer").or_none(JsonValue.text)
    return ServedDescription(
        spec=spec,
        max_rows=min(_count(most), MAX_BATCH_SIZE),
        max_state_rows=facts.get("max_state_rows").or_none(_count),
        hidden_states=facts.get("hidden_states", True).flag(),
        response_cache=facts.get("response_cache", False).flag(),
        tokenizer=tokenizer if buckets else None,
        buckets=tuple(buckets),
        max_masks=facts.get("max_masks").or_none(_count),
        told=facts.value,
    )


def _count(number: JsonValue) -> int:
    """Return an integer of at least 1. Triton writes those of 64 bits as texts."""
    is_text = isinstance(number.value, str) and re.fullmatch("[0-9]{1,12}", number.value)
    return (JsonValue(int(number.value), number.place) if is_text else number).whole(1)

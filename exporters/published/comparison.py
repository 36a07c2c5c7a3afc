"""Computes what others recorded for a checkpoint on its bundle, and compares the two."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import GteDeployError
from gte_deploy.exporters.published.recorded import Recorded
from gte_deploy.model import Model

_ENGINE = 1e-4
"""What an FP32 engine may differ from PyTorch, absolutely and relatively, besides the source's own bound."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """The comparison with one `Recorded`.

    Args:
        source: of the expected values.
        quantity: what they are.
        passed: whether all are within the bound.
        count: number of values.
        largest: the largest difference; None for words, or if nothing could be computed.
        bound: the bound at the value where the difference exceeds it most, or comes nearest to it.
        found: what the bundle gives, rounded; None if that failed.
        error: why nothing could be compared.
    """

    source: str
    quantity: str
    passed: bool
    count: int
    largest: float | None = None
    bound: float | None = None
    found: Any = None
    error: str | None = None

    def describe(self) -> str:
        """Say in one line what was compared."""
        if self.error is not None:
            return f"{self.quantity}: {self.error} ({self.source})"
        if self.largest is None:
            return f"{self.quantity}: {', '.join(map(str, self.found))} ({self.source})"
        differ = f"{self.count} values differ by at most {self.largest:.2g}, bound {self.bound:.2g}"
        return f"{self.quantity}: {differ} ({self.source})"


def compare_recorded(model: Model, expected: Recorded) -> Outcome:
    """Compute the quantity on a model and compare it. An error of the model is a failed comparison."""
    count = len(expected.values) if expected.quantity == "words" else int(np.size(expected.values))
    try:
        if expected.quantity == "words":
            found = [answer["token_str"].strip() for answer in model.fill_mask(expected.texts[0], top_k=count)]
            return Outcome(expected.source, "words", found == list(expected.values), count, found=found)
        values = _QUANTITIES[expected.quantity](model, expected)[selection(expected.select)] * expected.scale
    except (GteDeployError, IndexError) as error:
        return Outcome(expected.source, expected.quantity, False, count, error=f"{type(error).__name__}: {error}")
    return _judge(expected, np.asarray(values, np.float64))


def _judge(expected: Recorded, found: NDArray[np.float64]) -> Outcome:
    wanted = np.asarray(expected.values, np.float64)
    rounded = np.round(found, 6).tolist()
    if found.shape != wanted.shape:
        error = f"the bundle gives the shape {found.shape}, and the source {wanted.shape}"
        return Outcome(expected.source, expected.quantity, False, wanted.size, error=error)
    difference = np.abs(found - wanted)
    bound = expected.atol + _ENGINE + (expected.rtol + _ENGINE) * np.abs(wanted)
    worst = np.unravel_index(np.argmax(np.nan_to_num(difference / bound, nan=math.inf)), wanted.shape)
    return Outcome(
        expected.source,
        expected.quantity,
        bool(np.all(difference <= bound)),
        wanted.size,
        largest=float(difference.max()),
        bound=float(bound[worst]),
        found=rounded,
    )


def selection(text: str) -> tuple[Any, ...]:
    """Read a selection such as "[:, 1:4, -1]"; several numbers with spaces between them select these places."""
    return tuple(_place(part.strip()) for part in text.strip().strip("[]").split(","))


def _place(text: str) -> Any:
    if text == "...":
        return ...
    if ":" in text:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    places = [int(part) for part in text.split()]
    return places if len(places) > 1 else places[0]


def _batch(model: Model, expected: Recorded) -> Batch:
    """The inputs as one batch, padded on the right: the token ids of the source, or those of its texts."""
    if expected.token_ids:
        ids = np.asarray(expected.token_ids, np.int64)
        mask = np.ones_like(ids) if expected.attention_mask is None else np.asarray(expected.attention_mask, np.int64)
        return Batch(ids, mask)
    tokens = model.tokenize(list(expected.texts))
    return Batch(**tokens)


def _hidden(model: Model, expected: Recorded) -> Array:
    return model._backend.run(_batch(model, expected), ("last_hidden_state",))["last_hidden_state"]


def _mean_hidden(model: Model, expected: Recorded) -> Array:
    mask = _batch(model, expected).attention_mask[..., None].astype(np.float32)
    return (_hidden(model, expected) * mask).sum(1) / mask.sum(1)


def _as_it_is(logits: Array) -> Array:
    return logits


def _logits(model: Model, expected: Recorded) -> Array:
    """[N, S, V] of a fill-mask model, NaN where the batch is padded; else [N, L]."""
    if expected.pairs:
        activation = None if expected.own_activation else _as_it_is
        scores = np.asarray(model.predict([list(pair) for pair in expected.pairs], activation_fn=activation))
        return scores if scores.ndim > 1 else scores[:, None]
    batch = _batch(model, expected)
    if model.spec.task != "fill-mask":
        return model._backend.run(batch, ("logits",))["logits"]
    if model.spec.logits == "all":
        return model._backend.run(batch, ("logits",))["logits"]
    places = np.argwhere(batch.attention_mask == 1)
    asked = Batch(batch.input_ids, batch.attention_mask, places, batch.token_type_ids)
    found = model._backend.run(asked, ("logits",))["logits"]
    logits = np.full((*batch.input_ids.shape, found.shape[-1]), np.nan, np.float32)
    logits[places[:, 0], places[:, 1]] = found
    return logits


def _embedding(model: Model, expected: Recorded) -> Array:
    return np.asarray(model.encode(list(expected.texts), prompt="", normalize_embeddings=expected.normalized))


def _similarity(model: Model, expected: Recorded) -> Array:
    vectors = np.asarray(model.encode(list(expected.texts), prompt="", normalize_embeddings=True))
    return vectors[1:] @ vectors[0]


def _sparse(model: Model, expected: Recorded) -> Array:
    encode = model.encode_query if expected.is_query else model.encode_document
    return np.asarray(encode(list(expected.texts), convert_to_sparse_tensor=False, convert_to_tensor=True).numpy())


def _multi_vector(model: Model, expected: Recorded) -> Array:
    encode = model.encode_query if expected.is_query else model.encode_document
    return np.asarray(encode(list(expected.texts))[0])


def _sparse_similarity(model: Model, expected: Recorded) -> Array:
    vectors = _sparse(model, expected)
    return vectors @ vectors[0]


_QUANTITIES: Mapping[str, Callable[[Model, Recorded], Array]] = {
    "last_hidden_state": _hidden,
    "mean_hidden_state": _mean_hidden,
    "logits": _logits,
    "embedding": _embedding,
    "similarity": _similarity,
    "sparse": _sparse,
    "sparse_similarity": _sparse_similarity,
    "multi_vector": _multi_vector,
}

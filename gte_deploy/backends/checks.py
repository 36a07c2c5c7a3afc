"""Validates batches that go into a backend and outputs that come out."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import BackendError, InputError, NonFiniteError
from gte_deploy.core.spec import ModelSpec


def has_costly_head(spec: ModelSpec) -> bool:
    """Whether the graph's head computes the whole vocabulary for every token, even if nobody asks for its output."""
    return spec.logits == "all" or spec.task == "sparse"


def check_batch(batch: Batch, spec: ModelSpec) -> None:
    """Refuse a batch that would make a graph crash or compute garbage or NaN.

    Raises:
        InputError: wrong type, rank, dtype or shape; an id outside the vocabulary; a mask value other than 0 and 1; a
            row without a token; a token type that the model does not know; a mask position outside the batch or on
            padding.
    """
    _check_array("input_ids", batch.input_ids, 2)
    _check_array("attention_mask", batch.attention_mask, 2)
    rows, length = batch.input_ids.shape
    if batch.attention_mask.shape != batch.input_ids.shape:
        raise InputError(
            f"attention_mask has shape {batch.attention_mask.shape}, and input_ids has shape "
            f"{batch.input_ids.shape}; the shapes must be equal"
        )
    if rows < 1 or not 1 <= length <= spec.max_length:
        raise InputError(f"input_ids has shape {(rows, length)}; expected at least one row of 1 to {spec.max_length:,}")
    _check_values(batch, spec.vocab_size)
    if batch.token_type_ids is not None:
        _check_types(batch.token_type_ids, batch.input_ids.shape, spec)
    if batch.mask_positions is not None:
        _check_positions(batch.mask_positions, batch.attention_mask)


def check_graph_inputs(graph: object, names: Collection[str], spec: ModelSpec) -> None:
    """Refuse a graph with an input that no batch provides, or without an input that the model needs.

    Raises:
        BackendError: the message names `graph` and the inputs.
    """
    known = {"input_ids", "attention_mask", "mask_positions", *(["token_type_ids"] if spec.token_types else [])}
    if unknown := sorted(set(names) - known):
        raise BackendError(f"{graph} has the unknown inputs {', '.join(unknown)}.")
    check_takes_types(graph, names, spec)


def check_graph_outputs(graph: object, shapes: Mapping[str, Sequence[int | str | None]], spec: ModelSpec) -> None:
    """Refuse a graph whose outputs do not have the widths of the model.

    Args:
        graph: names the graph in messages.
        shapes: name of each output -> its shape; an axis that is no positive number is not known before it runs.
        spec: the facts about the model.

    Raises:
        BackendError: the message names `graph`, the output and both widths.
    """
    for name, shape in shapes.items():
        width, found = spec.width_of(name), shape[-1] if shape else None
        if width is not None and isinstance(found, int) and 0 < found != width:
            raise BackendError(
                f"the output {name} of {graph} has {found} values in a row, and the model {width}. Export the bundle "
                "again."
            )


def check_takes_types(graph: object, names: Collection[str], spec: ModelSpec) -> None:
    """Refuse a graph that takes token types if the model has none, or that lacks them if the model has some.

    Raises:
        BackendError: the message names `graph`.
    """
    if ("token_type_ids" in names) != spec.token_types:
        has, says = ("takes", "has none") if "token_type_ids" in names else ("does not take", "has them")
        raise BackendError(f"{graph} {has} token_type_ids, and the model {says}. Export the bundle again.")


def check_outputs(names: Sequence[str], offered: Sequence[str]) -> None:
    """Refuse names that a backend does not compute.

    Raises:
        BackendError: the message names the outputs that the backend computes.
    """
    for name in names:
        if name not in offered:
            # Only an engine that was exported for its answer alone lacks hidden states.
            advice = ". Export it with --outputs all" if name == "last_hidden_state" else ""
            raise BackendError(f"this model has no output {name!r}; it offers {', '.join(offered)}{advice}")


def _check_array(name: str, array: NDArray[np.int64], rank: int) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} must be a numpy array, not {type(array).__name__}")
    if array.ndim != rank or array.dtype != np.int64:
        raise InputError(f"{name} must be int64 of rank {rank}; it is {array.dtype} of rank {array.ndim}")


def _check_values(batch: Batch, vocab_size: int) -> None:
    ids, mask = batch.input_ids, batch.attention_mask
    if ids.view(np.uint64).max() >= vocab_size:  # a negative number is a large one there
        row, column = np.argwhere((ids < 0) | (ids >= vocab_size))[0]
        raise InputError(
            f"input_ids[{row}, {column}] is {ids[row, column]}; the ids of this model go from 0 to {vocab_size - 1:,}"
        )
    if (mask == 1).all():
        return
    if ((mask != 0) & (mask != 1)).any():
        row, column = np.argwhere((mask != 0) & (mask != 1))[0]
        raise InputError(f"attention_mask[{row}, {column}] is {mask[row, column]}; it must be 0 or 1")
    if not mask.any(axis=1).all():
        row = int(np.argmin(mask.any(axis=1)))
        raise InputError(f"attention_mask[{row}] is all zero; every row needs at least one token")


def _check_types(types: NDArray[np.int64], shape: tuple[int, ...], spec: ModelSpec) -> None:
    if not spec.token_types:
        raise InputError("token_type_ids is given, and this model has no token types; leave it out")
    _check_array("token_type_ids", types, 2)
    if types.shape != shape:
        raise InputError(
            f"token_type_ids has shape {types.shape}, and input_ids has shape {shape}; the shapes must be equal"
        )
    if types.min() < 0 or types.max() >= spec.type_vocab_size:
        row, column = np.argwhere((types < 0) | (types >= spec.type_vocab_size))[0]
        raise InputError(
            f"token_type_ids[{row}, {column}] is {types[row, column]}; the token types of this model go from 0 to "
            f"{spec.type_vocab_size - 1}"
        )


def _check_positions(positions: NDArray[np.int64], mask: NDArray[np.int64]) -> None:
    _check_array("mask_positions", positions, 2)
    if positions.shape[1] != 2:
        raise InputError(f"mask_positions must have the shape [num_masks, 2] of (row, token), not {positions.shape}")
    outside = ((positions < 0) | (positions >= np.array(mask.shape))).any(axis=1)
    if outside.any():
        index = int(np.argmax(outside))
        raise InputError(f"mask_positions[{index}] is {positions[index].tolist()}, outside the batch {mask.shape}")
    on_padding = mask[positions[:, 0], positions[:, 1]] == 0
    if on_padding.any():
        index = int(np.argmax(on_padding))
        raise InputError(f"mask_positions[{index}] is {positions[index].tolist()}, which is padding")


def check_finite(
    outputs: Mapping[str, NDArray[np.float32]],
    batch: Batch,
    indices: Sequence[int],
    counted: NDArray[np.bool_] | None = None,
) -> None:
    """Refuse outputs with NaN or Inf. Values at padding do not count.

    `indices` are the numbers of the rows in the caller's list. `counted` [B, S] names the tokens that count, if some of
    them have the attention mask 0.

    Raises:
        NonFiniteError: the message names the inputs.
    """
    for name, values in outputs.items():
        numbers = np.isfinite(values)
        if numbers.all():
            continue
        finite = numbers.all(axis=-1)
        if finite.ndim == 2:
            finite = (finite | (batch.attention_mask == 0 if counted is None else ~counted)).all(axis=1)
        if finite.all():
            continue
        rows = np.flatnonzero(~finite)
        if (
            name == "logits" and values.ndim == 2 and batch.mask_positions is not None
        ):  # one row of logits for each mask
            rows = np.unique(batch.mask_positions[rows, 0])
        named = ", ".join(map(str, sorted(indices[row] for row in rows.tolist())))
        raise NonFiniteError(
            f"the model gave NaN or Inf in {name} for the inputs {named}; this call returns nothing. "
            "Verify the bundle with gte-deploy verify."
        )

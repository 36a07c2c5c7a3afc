"""The interface of a backend: the code that runs a batch of token ids on one engine.

A backend knows token ids and tensors. It does not know texts, pooling or HTTP.

Shapes: B rows, S tokens of the longest row, M masks, H hidden size, V vocabulary, L labels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.spec import Precision

WARM_SHAPES = tuple(itertools.product((1, 32), (16, 128, 512)))
"""(rows, tokens of a row) of the batches that an engine without profiles warms up with."""


@dataclass(frozen=True)
class Batch:
    """One rectangular batch, padded on the right.

    Args:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 1 for a token and 0 for padding.
        mask_positions: [M, 2] int64 of (row, token): the tokens whose vocabulary logits are wanted. None if the task
            has no masks.
        token_type_ids: [B, S] int64; None means that all are 0. Only for models whose spec has `token_types`.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    mask_positions: NDArray[np.int64] | None = None
    token_type_ids: NDArray[np.int64] | None = None

    def graph_inputs(self, names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The named inputs of a graph of padded texts, in that order. Zeros or no rows replace a missing one."""
        return {name: self._missing(name) if (array := getattr(self, name)) is None else array for name in names}

    def _missing(self, name: str) -> NDArray[np.int64]:
        return np.empty((0, 2), np.int64) if name == "mask_positions" else np.zeros_like(self.input_ids)


class Backend(Protocol):
    """Runs batches on one engine. Several threads may call an implementation at once."""

    name: str
    """ "onnx", "openvino", "torch", "tensorrt" or "executorch". """
    device: str
    """The device that it runs on, such as "cpu" or "cuda:0"."""
    num_threads: int
    """CPU threads inside one operator."""
    outputs: tuple[str, ...]
    """The names that `run` can return."""

    @property
    def precision(self) -> Precision:
        """The precision that it computes in: its own choice if the graph leaves one, else the bundle's precision."""
        ...

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Compute the named outputs.

        `last_hidden_state` [B, S, H], `sentence_embedding` [B, H] (embed), `logits` [M, V] (fill-mask with masked
        logits), [B, S, V] (fill-mask with all logits), [B, L] (classify) or [B, S, L] (token-classify),
        `sparse_embedding` [B, V] (sparse), `sentence_embedding` and `token_weights` [B, S, 1] (hybrid); all float32.

        Raises:
            InputError: the batch has a wrong rank, dtype, id or mask position.
            BackendError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Free the engine. Idempotent; a later `run` raises BackendError."""
        ...


@runtime_checkable
class LanedBackend(Backend, Protocol):
    """A backend that works on several batches at once, and that prepares work for each shape of a batch."""

    lanes: int
    """The number of batches that `run` works on at once; further calls wait."""

    def shapes_to_warm_up(self) -> list[tuple[int, int]]:
        """Return (rows, tokens of a row) of the shapes that are worth preparing for."""
        ...

    def warm_up(self, batches: Sequence[Batch], outputs: Sequence[str]) -> None:
        """Prepare every lane for the shapes of these batches and for these outputs.

        Raises:
            InputError, BackendError: see `run`.
        """
        ...

"""The one seam between the model's graph and everything above it.

A backend knows token ids and tensors. It knows no text, no pooling of its own, no HTTP.

Shapes: B rows, S tokens of the longest row, M masks, H hidden size, V vocabulary, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.spec import Precision


@dataclass(frozen=True)
class Batch:
    """One rectangular batch, padded on the right.

    Args:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 1 for a token and 0 for padding.
        mask_positions: [M, 2] int64 of (row, token), the places whose vocabulary logits are wanted; None where the
            task has none.
        token_type_ids: [B, S] int64; None is all 0. For a model whose spec has `token_types` alone.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    mask_positions: NDArray[np.int64] | None = None
    token_type_ids: NDArray[np.int64] | None = None

    def graph_inputs(self, names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The named inputs of a graph of padded texts, in that order; an array in place of None."""
        types, positions = self.token_type_ids, self.mask_positions
        offered = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": np.zeros_like(self.input_ids) if types is None else types,
            "mask_positions": np.empty((0, 2), np.int64) if positions is None else positions,
        }
        return {name: offered[name] for name in names}


class Backend(Protocol):
    """What runs a batch. Implementations may be called from several threads at once."""

    name: str
    """ "onnx", "openvino", "torch" or "tensorrt". """
    device: str
    """Where it runs, such as "cpu" or "cuda:0"."""
    num_threads: int
    """CPU threads inside one operator."""
    outputs: tuple[str, ...]
    """The names that `run` can return."""

    @property
    def precision(self) -> Precision:
        """What it computes in wherever the graph leaves it the choice; where its types are fixed, the bundle's."""
        ...

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Compute the named outputs.

        `last_hidden_state` [B, S, H], `sentence_embedding` [B, H] (embed), `logits` [M, V] (fill-mask with masked
        logits), [B, S, V] (fill-mask with all logits), [B, L] (classify) or [B, S, L] (token-classify),
        `sparse_embedding` [B, V] (sparse); all float32.

        Raises:
            InputError: the batch has a wrong rank, dtype, id or mask position.
            BackendError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Free the engine. Idempotent; a later `run` raises BackendError."""
        ...

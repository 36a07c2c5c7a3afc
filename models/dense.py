"""sentence-transformers' Dense modules in PyTorch, which project a pooled embedding.

Shapes: B rows, I input width, O output width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gte_deploy.core.errors import CheckpointError
from gte_deploy.models.modules import DenseModule
from gte_deploy.models.stored_tensors import open_tensors
from gte_deploy.models.weight_files import WEIGHTS, refuse_pickle

INNER_WEIGHT = "linear.weight"
"""The name of the projection among the weights of Stanford's ColBERT."""


class Dense(nn.Module):
    """activation(x W + b); a residual module adds x or a projection of x."""

    def __init__(self, module: DenseModule) -> None:
        super().__init__()
        width, out = module.in_features, module.out_features
        self.linear = nn.Linear(width, out, bias=module.bias)
        # Softmax without an axis guesses one; for [B, O] it is the last.
        self.activation = nn.Softmax(dim=-1) if module.activation == "Softmax" else getattr(nn, module.activation)()
        self.is_residual = module.residual
        self.residual = nn.Linear(width, out, bias=False) if module.residual and width != out else None

    def forward(self, embedding: Tensor) -> Tensor:
        """Project [B, I] to [B, O]."""
        projected = self.activation(self.linear(embedding))
        if not self.is_residual:
            return projected
        return projected + (embedding if self.residual is None else self.residual(embedding))


def load_dense(
    folder: Path,
    modules: Sequence[DenseModule],
    *,
    width: int,
    dtype: torch.dtype,
    weight_files: Mapping[Path, set[str] | None] = MappingProxyType({}),
) -> nn.Sequential:
    """Load the Dense modules of a checkpoint with their weights, in order; the first takes embeddings of `width`.

    `weight_files` are the checkpoint's own, for a module without a folder.

    Raises:
        CheckpointError: weights are missing, pickled, or do not fit; the message names the module.
    """
    layers = nn.Sequential()
    for module in modules:
        where = folder / module.path
        if module.in_features != width:
            raise CheckpointError(f"{where / 'config.json'}: in_features is {module.in_features}; expected {width}")
        width = module.out_features
        layer = Dense(module)
        if module.path:
            refuse_pickle(where, WEIGHTS)
            try:
                layer.load_state_dict(load_file(where / WEIGHTS), strict=True)
            except (RuntimeError, OSError, ValueError) as error:
                raise CheckpointError(f"{where / WEIGHTS} is not what its config.json describes: {error}") from error
        else:
            layer.load_state_dict({INNER_WEIGHT: inner_weight(weight_files, module)}, strict=True)
        layers.append(layer)
    return layers.to(dtype).eval()


def inner_weight(weight_files: Mapping[Path, set[str] | None], module: DenseModule) -> Tensor:
    """Return [O, I], the weight of a projection that a checkpoint has among its other weights.

    Raises:
        CheckpointError: the weight is missing, or has another shape.
    """
    with ExitStack() as stack:
        stored = open_tensors(weight_files, stack)
        shape = (module.out_features, module.in_features)
        found = stored.get(INNER_WEIGHT)
        if found is None or found.shape != shape:
            has = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise CheckpointError(f"{next(iter(weight_files))}: {INNER_WEIGHT} {has}; expected {list(shape)}")
        return found.read().clone()

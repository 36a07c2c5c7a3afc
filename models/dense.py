"""sentence-transformers' Dense modules in PyTorch, which project a pooled embedding.

Shapes: B rows, I input width, O output width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gte_deploy.core.errors import CheckpointError
from gte_deploy.models.modules import DenseModule
from gte_deploy.models.weight_files import WEIGHTS, refuse_pickle


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


def load_dense(folder: Path, modules: Sequence[DenseModule], *, width: int, dtype: torch.dtype) -> nn.Sequential:
    """Load the Dense modules of a checkpoint with their weights, in order; the first takes embeddings of `width`.

    Raises:
        CheckpointError: weights are missing, pickled, or do not fit; the message names the module.
    """
    layers = nn.Sequential()
    for module in modules:
        where = folder / module.path
        if module.in_features != width:
            raise CheckpointError(f"{where / 'config.json'}: in_features is {module.in_features}; expected {width}")
        width = module.out_features
        refuse_pickle(where, WEIGHTS)
        layer = Dense(module)
        try:
            layer.load_state_dict(load_file(where / WEIGHTS), strict=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"{where / WEIGHTS} is not what its config.json describes: {error}") from error
        layers.append(layer)
    return layers.to(dtype).eval()

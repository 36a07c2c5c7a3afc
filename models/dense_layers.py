"""sentence-transformers' Dense modules in numpy, for embeddings that no graph computes. No torch.

Shapes: N embeddings, I width of the input, O width of the output.
"""

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.core.activations import ACTIVATIONS, Floats
from gte_deploy.core.errors import CheckpointError
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import DenseModule, read_dense
from gte_deploy.models.weight_files import WEIGHTS

# The first bytes of a safetensors file hold the length of its JSON header, little-endian.
_LENGTH_BYTES = 8
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class DenseLayer:
    """activation(x W + b), plus x or a projection of x if the module is residual.

    Args:
        module: the module.
        weight: [O, I].
        bias: [O], or None.
        residual: [O, I], the projection of x; None for x itself.
    """

    module: DenseModule
    weight: Floats
    bias: Floats | None
    residual: Floats | None

    def __call__(self, embeddings: Floats) -> Floats:
        """Project [N, I] to [N, O]."""
        product = embeddings @ self.weight.T
        found = ACTIVATIONS[self.module.activation.lower()](product if self.bias is None else product + self.bias)
        if self.module.residual:
            found = found + (embeddings if self.residual is None else embeddings @ self.residual.T)
        return found.astype(np.float32)


def read_dense_layers(folder: Path, width: int, out: int) -> list[DenseLayer]:
    """Read the Dense modules of a checkpoint or bundle, which project [N, width] to [N, out].

    Raises:
        CheckpointError, ConfigError: a file is missing or damaged, or the modules do not fit each other.
    """
    files = CheckpointFiles(folder)
    layers, found = [], width
    for entry in files.modules or ():
        if entry.kind == "Dense":
            module = read_dense(files, entry.path)
            layers.append(_layer(module, folder / posixpath.join(entry.path, WEIGHTS)))
            if module.in_features != found:
                raise CheckpointError(f"{folder / entry.path}: in_features is {module.in_features}; expected {found}")
            found = module.out_features
    if not layers or found != out:
        raise CheckpointError(f"the Dense modules in {folder} give {found} dimensions; expected {out}. Export it again")
    return layers


def _layer(module: DenseModule, file: Path) -> DenseLayer:
    out, width = module.out_features, module.in_features
    expected: dict[str, tuple[int, ...]] = {"linear.weight": (out, width)}
    if module.bias:
        expected["linear.bias"] = (out,)
    if module.residual and out != width:
        expected["residual.weight"] = (out, width)
    tensors = _tensors(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != expected:
        raise CheckpointError(f"{file} holds {shapes}; its config.json describes {expected}")
    return DenseLayer(module, tensors["linear.weight"], tensors.get("linear.bias"), tensors.get("residual.weight"))


def _tensors(file: Path) -> dict[str, Floats]:
    """Read the tensors of a small safetensors file as float32. The library itself gives numpy no bfloat16."""
    try:
        data = file.read_bytes()
        start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        header = json.loads(data[_LENGTH_BYTES:start])
        header.pop("__metadata__", None)
        return {name: _tensor(data[start:], **fields) for name, fields in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}). Copy it again.") from error


def _tensor(data: bytes, *, dtype: str, shape: list[int], data_offsets: list[int], **_: Any) -> Floats:
    values = np.frombuffer(data[slice(*data_offsets)], _TYPES[dtype]).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)

"""Activation functions in numpy that turn logits into scores, and the names of their torch classes.

A checkpoint names an activation by the path of its class, such as "torch.nn.modules.activation.Sigmoid", and constructs
it without arguments. Each function here computes the same as the torch module: from [N, L] to [N, L].

Shapes: N inputs, L labels.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Activation = Callable[[Floats], Floats]

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
_SOFTPLUS_THRESHOLD = 20  # as in torch: above it softplus is the identity
_SHRINK = 0.5
_LEAK = 0.01
_erf = np.vectorize(math.erf, otypes=[np.float64])


def identity(values: Floats) -> Floats:
    """The unchanged values."""
    return values


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)) for each element."""
    # exp of a positive number may overflow; this form never computes one.
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small))


def softmax(values: Floats) -> Floats:
    """Probabilities along the last axis."""
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _log_softmax(values: Floats) -> Floats:
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _log_sigmoid(values: Floats) -> Floats:
    return np.minimum(values, 0) - np.log1p(np.exp(-np.abs(values)))


def _softplus(values: Floats) -> Floats:
    inner = np.minimum(values, _SOFTPLUS_THRESHOLD)
    return np.where(values > _SOFTPLUS_THRESHOLD, values, np.log1p(np.exp(inner)))


def _softsign(values: Floats) -> Floats:
    return np.asarray(values / (1 + np.abs(values)), dtype=values.dtype)


def _gelu(values: Floats) -> Floats:
    return np.asarray(values * (0.5 + 0.5 * _erf(values / math.sqrt(2))), dtype=values.dtype)


def _elu(values: Floats) -> Floats:
    return np.where(values > 0, values, np.expm1(np.minimum(values, 0)))


def _hard_sigmoid(values: Floats) -> Floats:
    return np.asarray(np.clip(values + 3, 0, 6) / np.float32(6), dtype=values.dtype)


def _selu(values: Floats) -> Floats:
    below = np.float32(_SELU_ALPHA) * np.expm1(np.minimum(values, 0))
    return np.float32(_SELU_SCALE) * np.where(values > 0, values, below)


# Class of torch.nn -> function. Classes are left out that draw at random (RReLU), learn (PReLU), change the shape (GLU)
# or need arguments (Threshold).
_BY_CLASS: dict[str, Activation] = {
    "CELU": _elu,  # equal with alpha 1
    "ELU": _elu,
    "GELU": _gelu,
    "Hardshrink": lambda x: np.where(np.abs(x) > _SHRINK, x, 0),
    "Hardsigmoid": _hard_sigmoid,
    "Hardswish": lambda x: x * _hard_sigmoid(x),
    "Hardtanh": lambda x: np.clip(x, -1, 1),
    "Identity": identity,
    "LeakyReLU": lambda x: np.where(x > 0, x, _LEAK * x),
    "LogSigmoid": _log_sigmoid,
    "LogSoftmax": _log_softmax,
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU6": lambda x: np.clip(x, 0, 6),
    "SELU": _selu,
    "SiLU": lambda x: x * sigmoid(x),
    "Sigmoid": sigmoid,
    "Softmax": softmax,
    "Softmin": lambda x: softmax(-x),
    "Softplus": _softplus,
    "Softshrink": lambda x: x - np.clip(x, -_SHRINK, _SHRINK),
    "Softsign": _softsign,
    "Tanh": np.tanh,
    "Tanhshrink": lambda x: x - np.tanh(x),
}

TORCH_CLASSES: Mapping[str, str] = {name.lower(): name for name in _BY_CLASS}
"""Name of an activation in a spec -> its class in torch.nn, which is constructed without arguments."""

ACTIVATIONS: Mapping[str, Activation] = {name.lower(): function for name, function in _BY_CLASS.items()}
"""Name of an activation in a spec -> the function, from float32 [N, L] to float32 [N, L]."""


def activation_of(dotted_path: str) -> str | None:
    """The key of `ACTIVATIONS` for the path of a torch.nn class, in any of its spellings.

    It is None for anything else: a function of torch.nn.functional, which no library constructs, a class without a
    function here, or a class of another package.
    """
    module, _, name = dotted_path.rpartition(".")
    home = "torch.nn.modules.linear" if name == "Identity" else "torch.nn.modules.activation"
    known = name in _BY_CLASS and module in ("torch.nn", "torch.nn.modules", home)
    return name.lower() if known else None


def default_activation(activation: str | None, num_labels: int) -> Activation:
    """The activation of a classifier if the caller names none: see `ModelSpec.activation`."""
    if activation is None:
        return sigmoid if num_labels == 1 else identity
    return ACTIVATIONS[activation]

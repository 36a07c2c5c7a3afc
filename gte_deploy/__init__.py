"""gte-deploy: train, export, verify and run GTE-v1.5 text encoders.

import gte_deploy

model = gte_deploy.load("my-bundle")
model.fill_mask("Paris is the [MASK] of France.")
model.encode(["a text", "another"])
"""

from typing import TYPE_CHECKING, Any

from gte_deploy._version import __version__
from gte_deploy.core.calls import Call, JoinOptions, Usage
from gte_deploy.core.errors import (
    BackendError,
    BundleError,
    CancelledCallError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    ExportError,
    GteDeployError,
    InputError,
    MissingDependencyError,
    NoAnswerError,
    NonFiniteError,
    OutputExistsError,
    OverloadedError,
    ParityError,
    SignatureError,
    UnavailableError,
    UnreachableError,
)
from gte_deploy.core.quiet import turn_off_telemetry

if TYPE_CHECKING:
    from gte_deploy.loading import load
    from gte_deploy.model import Model
    from gte_deploy.tasks.chunks import ChunkEmbeddings
    from gte_deploy.text.chunking import SentenceChunks, TokenChunks

__all__ = [
    "BackendError",
    "BundleError",
    "Call",
    "CancelledCallError",
    "CheckpointError",
    "ChunkEmbeddings",
    "ConfigError",
    "DeadlineError",
    "ExportError",
    "GteDeployError",
    "InputError",
    "JoinOptions",
    "MissingDependencyError",
    "Model",
    "NoAnswerError",
    "NonFiniteError",
    "OutputExistsError",
    "OverloadedError",
    "ParityError",
    "SentenceChunks",
    "SignatureError",
    "TokenChunks",
    "UnavailableError",
    "UnreachableError",
    "Usage",
    "__version__",
    "load",
]

turn_off_telemetry()

# Imported on first use: numpy and tokenizers would triple the time of `import gte_deploy` in every command.
_LAZY = {
    "load": "gte_deploy.loading",
    "Model": "gte_deploy.model",
    "ChunkEmbeddings": "gte_deploy.tasks.chunks",
    "SentenceChunks": "gte_deploy.text.chunking",
    "TokenChunks": "gte_deploy.text.chunking",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value

"""`load`: from a path or name to a Model."""

import os
from pathlib import Path
from typing import Any, Literal

from gte_deploy.backends.base import Backend
from gte_deploy.backends.devices import parse_device
from gte_deploy.bundle import MANIFEST_NAME, is_bundle, open_bundle
from gte_deploy.errors import BackendError, InputError
from gte_deploy.inputs import check_integer
from gte_deploy.model import Model
from gte_deploy.spec import ModelSpec
from gte_deploy.tokenization import load_tokenizer

BackendName = Literal["auto", "onnx", "torch", "tensorrt"]

_MAX_THREADS = 1024
# A CPU is busy with few tokens, and small batches waste little padding; a GPU needs many.
_MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: BackendName = "auto",
    device: str | None = None,
    num_threads: int | None = None,
    max_batch_tokens: int | None = None,
) -> Model:
    """Load a bundle or a checkpoint.

    Args:
        path: a bundle folder, a checkpoint folder, a name on the Hugging Face Hub, or None for the built-in model.
        backend: "onnx" runs a bundle, "torch" a checkpoint; "auto" takes the one that fits.
        device: "cpu" (the default), "cuda" or "cuda:N".
        num_threads: CPU threads; by default every CPU that the process may use (affinity and cgroup). With torch
            the count is the whole process's, see `backends.torch_backend.TorchBackend`.
        max_batch_tokens: tokens of a batch at most, padding included; 2,048 on a CPU and 32,768 on a GPU by default.

    Raises:
        InputError: an argument out of its range.
        BundleError: the bundle is incomplete or altered; checked before anything of it is loaded.
        CheckpointError, ConfigError: the checkpoint cannot be read or honoured.
        BackendError: the backend cannot run this, or not on this device.
        MissingDependencyError: naming the extra to install.
    """
    device = "cpu" if device is None else device
    kind, _ = parse_device(device)
    if num_threads is not None:
        num_threads = check_integer("num_threads", num_threads, 1, _MAX_THREADS)
    if backend not in ("auto", "onnx", "torch", "tensorrt"):
        raise InputError(f"backend must be 'auto', 'onnx', 'torch' or 'tensorrt', not {backend!r}")
    folder = _resolve(path)
    opened, spec = _open(folder, backend, {"device": device, "num_threads": num_threads})
    budget = _MAX_BATCH_TOKENS[kind] if max_batch_tokens is None else max_batch_tokens
    return Model(opened, load_tokenizer(folder), spec, max_batch_tokens=budget, path=folder)


def _resolve(path: str | os.PathLike[str] | None) -> Path:
    if path is not None and is_bundle(Path(path)):
        return Path(path)
    from gte_deploy.models import resolve_checkpoint

    return resolve_checkpoint(None if path is None else os.fspath(path))


def _open(folder: Path, backend: str, settings: dict[str, Any]) -> tuple[Backend, ModelSpec]:
    if backend == "tensorrt":
        raise BackendError(f"{folder} holds no TensorRT engine. Load it with backend='auto'.")
    bundle = is_bundle(folder)
    if bundle and backend == "torch":
        raise BackendError(
            f"{folder} is a bundle, and the torch backend runs checkpoints. Load it with backend='onnx', or load the "
            "checkpoint that it was exported from."
        )
    if not bundle and backend == "onnx":
        raise BackendError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME}. Export it with gte-export and load the result, or "
            "load it with backend='torch'."
        )
    return _open_bundle(folder, settings) if bundle else _open_checkpoint(folder, settings)


def _open_bundle(folder: Path, settings: dict[str, Any]) -> tuple[Backend, ModelSpec]:
    manifest = open_bundle(folder)
    from gte_deploy.backends.onnx_backend import OnnxBackend
    from gte_deploy.onnx_inspection import check_graphs

    check_graphs(folder, manifest)
    return OnnxBackend(folder / manifest.graphs["onnxruntime"].path, manifest.spec, **settings), manifest.spec


def _open_checkpoint(folder: Path, settings: dict[str, Any]) -> tuple[Backend, ModelSpec]:
    from gte_deploy.backends.torch_backend import open_torch_backend

    opened = open_torch_backend(folder, **settings)
    return opened, opened.spec

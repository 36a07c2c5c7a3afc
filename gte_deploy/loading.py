"""`load`: from a path or name to a Model."""

import logging
import os
from pathlib import Path
from typing import Any, Literal, get_args

from gte_deploy.backends.base import Backend
from gte_deploy.backends.devices import parse_device
from gte_deploy.bundle import MANIFEST_NAME, Manifest, is_bundle, open_bundle
from gte_deploy.engine_choice import ENGINE_OF, EngineChoice, choose_engine
from gte_deploy.errors import BackendError, InputError
from gte_deploy.inputs import check_integer
from gte_deploy.model import Model
from gte_deploy.onnx_inspection import check_graphs
from gte_deploy.spec import COMPUTE_PRECISIONS, ComputePrecision, ModelSpec
from gte_deploy.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "onnx", "openvino", "torch", "tensorrt"]

_ASKED = "it was asked for"
_MAX_THREADS = 1024
# A CPU is busy with few tokens, and small batches waste little padding; a GPU needs many.
_MAX_BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: BackendName = "auto",
    precision: ComputePrecision | None = None,
    device: str | None = None,
    num_threads: int | None = None,
    max_batch_tokens: int | None = None,
) -> Model:
    """Load a bundle or a checkpoint.

    Args:
        path: a bundle folder, a checkpoint folder, a name on the Hugging Face Hub, or None for the built-in model.
        backend: "onnx" (ONNX Runtime) and "openvino" run a bundle, "torch" a checkpoint. "auto" takes what fits; for a
            bundle what `gte-deploy bench --pick` recorded on this machine, else what was measured to be faster on CPUs
            like this. `Model.info` says what was taken and why.
        precision: what the engine computes in wherever the bundle leaves it the choice: "fp32", or "bf16" with
            openvino on a CPU that has it. None for fp32, or as recorded.
        device: "cpu" (the default), "cuda" or "cuda:N".
        num_threads: CPU threads; by default every CPU that the process may use (affinity and cgroup). With torch
            the count is the whole process's, see `backends.torch_backend.TorchBackend`.
        max_batch_tokens: tokens of a batch at most, padding included; 1,024 on a CPU and 32,768 on a GPU by default.

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
    if backend not in get_args(BackendName):
        raise InputError(f"backend must be one of {', '.join(get_args(BackendName))}, not {backend!r}")
    if precision is not None and precision not in COMPUTE_PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(COMPUTE_PRECISIONS)}, not {precision!r}")
    folder = _resolve(path)
    opened, spec, reason = _open(folder, backend, precision, {"device": device, "num_threads": num_threads})
    logger.info("%s runs on %s in %s: %s", folder, opened.name, opened.precision, reason)
    budget = _MAX_BATCH_TOKENS[kind] if max_batch_tokens is None else max_batch_tokens
    return Model(opened, load_tokenizer(folder), spec, max_batch_tokens=budget, path=folder, backend_reason=reason)


def _resolve(path: str | os.PathLike[str] | None) -> Path:
    if path is not None and is_bundle(Path(path)):
        return Path(path)
    from gte_deploy.models import resolve_checkpoint

    return resolve_checkpoint(None if path is None else os.fspath(path))


def _open(
    folder: Path, backend: str, precision: ComputePrecision | None, settings: dict[str, Any]
) -> tuple[Backend, ModelSpec, str]:
    """The backend, the model's facts, and why this backend."""
    if backend == "tensorrt":
        raise BackendError(f"{folder} holds no TensorRT engine. Load it with backend='auto'.")
    bundle = is_bundle(folder)
    if bundle and backend == "torch":
        raise BackendError(
            f"{folder} is a bundle, and the torch backend runs checkpoints. Load it with backend='onnx', or load the "
            "checkpoint that it was exported from."
        )
    if not bundle and backend in ENGINE_OF:
        raise BackendError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME}. Export it with gte-export and load the result, or "
            "load it with backend='torch'."
        )
    if precision == "bf16" and (not bundle or backend == "onnx"):
        raise InputError(
            f"precision 'bf16' is what the openvino backend can compute a bundle in; {folder} would run on "
            f"{'onnx' if bundle else 'torch'}, which computes in fp32. Leave precision out."
        )
    if not bundle:
        opened, spec = _open_checkpoint(folder, settings)
        return opened, spec, _ASKED if backend == "torch" else "torch runs checkpoints"
    manifest = open_bundle(folder)
    check_graphs(folder, manifest)
    if backend == "auto":
        choice = choose_engine(manifest, device=settings["device"], precision=precision)
    else:
        choice = EngineChoice(backend, precision or "fp32", _ASKED)
    return _open_graph(folder, manifest, choice, settings), manifest.spec, choice.reason


def _open_graph(folder: Path, manifest: Manifest, choice: EngineChoice, settings: dict[str, Any]) -> Backend:
    graph = manifest.graphs.get(ENGINE_OF[choice.backend])
    if graph is None:
        raise BackendError(
            f"{folder} has no graph for OpenVINO: openvino was not installed where it was exported, or its precision "
            f"{manifest.precision} has none. Load it with backend='onnx', or export it again."
        )
    if choice.precision not in graph.computes:
        logger.warning(
            "%s was not shown to stay within its bounds in %s when it was exported; see its report.html",
            folder,
            choice.precision,
        )
    if choice.backend == "openvino":
        from gte_deploy.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(folder / graph.path, manifest.spec, precision=choice.precision, **settings)
    from gte_deploy.backends.onnx_backend import OnnxBackend

    return OnnxBackend(folder / graph.path, manifest.spec, **settings)


def _open_checkpoint(folder: Path, settings: dict[str, Any]) -> tuple[Backend, ModelSpec]:
    from gte_deploy.backends.torch_backend import open_torch_backend

    opened = open_torch_backend(folder, **settings)
    return opened, opened.spec

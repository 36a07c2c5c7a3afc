"""Opens the TensorRT engine of a bundle.

A plan (a serialised engine) is executable code, so everything that can be checked is checked first.
"""

import functools
import hashlib
import importlib
import logging
from pathlib import Path
from typing import Any

from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.variants import DTYPE_NAMES, QUERY_LENGTHS, VARIANTS
from gte_deploy.bundle.manifest import FileEntry, PlanEntry
from gte_deploy.core.errors import BackendError, BundleError
from gte_deploy.core.install import install_command

logger = logging.getLogger(__name__)


def check_plan(plan: PlanEntry, device: str) -> tuple[Any, Cuda]:
    """The module of TensorRT and the GPU that run this plan; the plan itself is not read.

    Raises:
        BackendError: the plan needs another variant, version or GPU, or `device` is not a GPU. The message names what
            is needed and what is here.
        MissingDependencyError: cuda-bindings is not installed.
    """
    kind, index = parse_device(device)
    if kind != "cuda":
        raise BackendError(f"a TensorRT engine runs on a GPU, not on device {device!r}. Load it with device='cuda'.")
    trt, extra = _module_for(plan)
    cuda = Cuda(index, extra=extra)
    capability = cuda.capability()
    if capability not in plan.compute_capabilities:
        raise BackendError(
            f"the engine {plan.path} was built for GPUs of compute capability {', '.join(plan.compute_capabilities)}, "
            f"and {device} has {capability}. Export for this GPU: gte-export --format trt --target "
            f"sm{capability.replace('.', '')}."
        )
    return trt, cuda


def open_plan(folder: Path, plan: PlanEntry, file: FileEntry, device: str) -> tuple[Any, Cuda, Any]:
    """The module of TensorRT, the GPU, and the engine of the plan at `folder`/`plan.path`.

    Raises:
        BundleError: the bytes of the plan do not match `file`, or the engine does not match the manifest.
        BackendError, MissingDependencyError: see `check_plan`; or TensorRT refuses the plan.
    """
    trt, cuda = check_plan(plan, device)
    data = (folder / plan.path).read_bytes()
    # The hash covers the very bytes that are deserialised: the file may have changed since the bundle was verified.
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise BundleError(f"{folder / plan.path} has sha256 {digest}, and the manifest says {file.sha256}.")
    with cuda.use():
        engine = trt.Runtime(_logger_for(trt)).deserialize_cuda_engine(data)
    if engine is None:
        raise BackendError(f"{VARIANTS[plan.variant].title} {trt.__version__} refuses {plan.path}; its log says why.")
    _check_engine(engine, plan)
    return trt, cuda, engine


def _module_for(plan: PlanEntry) -> tuple[Any, str]:
    variant = VARIANTS[plan.variant]
    built = f"the engine {plan.path} was built with {variant.title} {plan.version} and runs only with that version"
    try:
        trt = importlib.import_module(variant.module)
    except ImportError as error:
        raise BackendError(
            f"{built}; {variant.module!r} is not installed here: "
            f"{install_command(variant.extra, f'{variant.distribution}=={plan.version}')}"
        ) from error
    if trt.__version__ != plan.version:
        raise BackendError(
            f"{built}; version {trt.__version__} is installed here: pip install "
            f"'{variant.distribution}=={plan.version}', or export the bundle again on this machine."
        )
    return trt, variant.extra


def engine_tensors(engine: Any) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Name of a tensor -> its data type, None if the runtime does not know it, and its shape, -1 for dynamic axes."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {
        name: (DTYPE_NAMES.get(engine.get_tensor_dtype(name).name), tuple(engine.get_tensor_shape(name)))
        for name in names
    }


def engine_profiles(engine: Any, *, padding_free: bool) -> list[tuple[tuple[int, ...], ...]]:
    """(batch, sequence) of each profile at min, opt and max; if padding-free, (texts, tokens of all texts)."""
    found = []
    for index in range(engine.num_optimization_profiles):
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape("input_ids", index)]
        if padding_free:
            lengths = engine.get_tensor_profile_shape(QUERY_LENGTHS, index)
            shapes = [(number - 1, tokens) for (number,), (tokens,) in zip(lengths, shapes, strict=True)]
        found.append(tuple(shapes))
    return found


def _check_engine(engine: Any, plan: PlanEntry) -> None:
    """Check that the manifest describes the engine correctly. The sizes of buffers come from the manifest."""
    tensors = engine_tensors(engine)
    said = {
        tensor.name: (tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
        for tensor in (*plan.inputs, *plan.outputs)
    }
    if tensors != said:
        raise BundleError(f"the engine {plan.path} has the tensors {tensors}, and the manifest says {said}.")
    profiles = engine_profiles(engine, padding_free=plan.padding_free)
    expected = [(profile.min, profile.opt, profile.max) for profile in plan.profiles]
    if profiles != expected:
        raise BundleError(f"the engine {plan.path} has the profiles {profiles}, and the manifest says {expected}.")


@functools.cache  # a logger must outlive its users
def _logger_for(trt: Any) -> Any:
    """A logger that passes the messages of a variant of TensorRT to ours."""
    severity = trt.ILogger.Severity
    levels = {severity.WARNING: logging.WARNING, severity.INFO: logging.DEBUG, severity.VERBOSE: logging.DEBUG}

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            logger.log(levels.get(severity, logging.ERROR), "%s: %s", trt.__name__, message)

    return Logger()

"""Chooses the engine for a bundle if the caller names none, and gives the reason."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from gte_deploy.backends import picks
from gte_deploy.backends.stream_plan import ListPick, StreamPlan, plan_streams
from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.cpus import available_cpus, numa_nodes
from gte_deploy.core.errors import BackendError, InputError, MissingDependencyError
from gte_deploy.core.spec import COMPUTE_PRECISIONS, ComputePrecision, Engine

ENGINE_OF: dict[str, Engine] = {"onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
"""Backend, as `gte_deploy.load` takes it -> the engine whose graph it runs."""

# Linux's flag for an instruction with dot products of 8-bit integers -> its usual name.
_INT8_FLAGS = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX"}
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class EngineChoice:
    """Backend, precision and device, as `gte_deploy.load` takes them, and the reason for the choice in one sentence.

    `lists` is the recorded measurement of lists with this backend.
    """

    backend: str
    precision: ComputePrecision
    reason: str
    device: str = "cpu"
    lists: ListPick | None = None


def is_for_gpus(manifest: Manifest) -> bool:
    """Whether a bundle is for NVIDIA GPUs. Its data types are fixed, and a CPU runs it slowly or not at all."""
    return manifest.target == "cuda" or manifest.plan is not None or "tensorrt" in manifest.graphs


def choose_engine(
    manifest: Manifest, *, device: str | None = None, precision: ComputePrecision | None = None
) -> EngineChoice:
    """The engine for a bundle on this machine: the requested one, else the recorded pick, else the usually faster one.

    bfloat16 changes answers a little, so it is never chosen by itself; a recorded pick has it if the user allowed it.
    """
    if is_for_gpus(manifest):
        return _for_gpus(manifest, device)
    if precision == "bf16":
        return EngineChoice("openvino", "bf16", "bf16 was requested, and only openvino computes in it", device or "cpu")
    if device not in (None, "cpu"):
        return EngineChoice(
            "onnx", "fp32", f"ONNX Runtime is the only engine of the bundle that runs on {device}", device
        )
    return _picked(manifest, precision) or _by_rule(manifest)


def _for_gpus(manifest: Manifest, device: str | None) -> EngineChoice:
    """TensorRT if the bundle's engine fits this machine; else ONNX Runtime, if the bundle has a graph for it."""
    if manifest.plan is None:
        return EngineChoice("onnx", "fp32", "the bundle has no TensorRT engine", device or _device_of_onnx(manifest))
    from gte_deploy.backends.tensorrt.plan import check_plan

    try:
        check_plan(manifest.plan, device or "cuda")
    except (BackendError, MissingDependencyError) as error:
        reason = f"TensorRT does not run this bundle here: {error}"
        if (
            manifest.graphs and not manifest.plan.padding_free
        ):  # ONNX Runtime lacks the operators of a padding-free graph
            return EngineChoice("onnx", "fp32", reason, device or _device_of_onnx(manifest))
        # Opening the engine raises the same error.
    else:
        reason = "the bundle's engine fits this TensorRT and this GPU"
    return EngineChoice("tensorrt", "fp32", reason, device or "cuda")


def _device_of_onnx(manifest: Manifest) -> str:
    """The GPU if ONNX Runtime has its CUDA provider and the driver has a GPU, else the CPU."""
    if manifest.target == "cuda":
        return "cuda"
    from gte_deploy.backends.tensorrt.cuda import gpu_capability

    if gpu_capability() is None:
        return "cpu"
    try:
        providers = importlib.import_module("onnxruntime").get_available_providers()
    except (ImportError, AttributeError):
        return "cpu"
    return "cuda" if "CUDAExecutionProvider" in providers else "cpu"


def _picked(manifest: Manifest, precision: ComputePrecision | None) -> EngineChoice | None:
    pick = picks.lookup(manifest.to_json()["checksum"])
    if pick is None:
        return None
    wanted = pick.precision or "fp32"
    computes: ComputePrecision | None = next((known for known in COMPUTE_PRECISIONS if known == wanted), None)
    if computes is None or precision not in (None, computes) or not _is_usable(pick.backend, manifest):
        return None
    reason = f"gte-deploy bench --pick found it the fastest here on {pick.date}"
    return EngineChoice(pick.backend, computes, reason, lists=pick.lists)


def streams_of(
    manifest: Manifest, choice: EngineChoice, *, num_threads: int | None = None, streams: int | None = None
) -> StreamPlan:
    """The plan for lists with the chosen engine of a bundle.

    Args:
        manifest: the bundle.
        choice: the engine.
        num_threads: CPU threads of the model; None for every CPU that the process may use.
        streams: the number that the caller wants; None for the best.

    Raises:
        InputError: the caller wants several, and the engine has none.
    """
    if choice.device != "cpu" or choice.backend not in ("onnx", "openvino") or is_for_gpus(manifest):
        if streams is not None and streams > 1:
            raise InputError(
                f"streams={streams} is for bundles for a CPU, on onnx or openvino, and not for {choice.backend} on "
                f"{choice.device}. Leave streams out."
            )
        return StreamPlan(1, num_threads or available_cpus(), 1, 2, True, f"{choice.backend} has no streams here")
    return plan_streams(
        choice.backend,
        cpus=num_threads or available_cpus(),
        nodes=numa_nodes(),
        bundle_bytes=sum(file.size for file in manifest.files.values()),
        streams=streams,
        picked=choice.lists if num_threads in (None, available_cpus()) else None,
    )


def _by_rule(manifest: Manifest) -> EngineChoice:
    if "onnxruntime" not in manifest.graphs:
        return EngineChoice("openvino", "fp32", "the bundle has no graph for ONNX Runtime")
    if "openvino" not in manifest.graphs:
        return EngineChoice("onnx", "fp32", "the bundle has no graph for OpenVINO")
    if not _is_usable("openvino", manifest):
        return EngineChoice("onnx", "fp32", "openvino is not installed")
    if not _is_usable("onnx", manifest):
        return EngineChoice("openvino", "fp32", "onnxruntime is not installed")
    verified = [engine for engine, graph in manifest.graphs.items() if "fp32" in graph.computes]
    if "openvino" in verified and "onnxruntime" not in verified:
        return EngineChoice("openvino", "fp32", "the graph for ONNX Runtime missed its bounds at export")
    if "onnxruntime" in verified and "openvino" not in verified:
        return EngineChoice("onnx", "fp32", "the graph for OpenVINO missed its bounds at export")
    if manifest.precision != "int8":
        reason = f"{manifest.precision} runs on ONNX Runtime unless gte-deploy bench --pick recorded another engine"
        return EngineChoice("onnx", "fp32", reason)
    if (unit := _int8_unit()) is None:
        return EngineChoice(
            "onnx", "fp32", "OpenVINO is not faster here: this CPU has no int8 dot products (VNNI, AMX)"
        )
    return EngineChoice("openvino", "fp32", f"int8 on a CPU with {unit} is fastest on OpenVINO")


def _is_usable(backend: str, manifest: Manifest) -> bool:
    engine = ENGINE_OF.get(backend)
    return engine is not None and engine in manifest.graphs and importlib.util.find_spec(engine) is not None


def _int8_unit() -> str | None:
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return next((unit for flag, unit in _INT8_FLAGS.items() if flag in flags), None)

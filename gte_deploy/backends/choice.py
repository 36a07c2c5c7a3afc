"""Chooses the engine and the compute precision for a bundle if the caller names none, and gives the reason."""

import dataclasses
import importlib
import importlib.util
from dataclasses import dataclass

from gte_deploy.backends import picks
from gte_deploy.backends.bf16_speed import Bf16Speed, bf16_speed
from gte_deploy.backends.stream_plan import ListPick, StreamPlan, plan_streams
from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.cpus import available_cpus, cpu_flags, numa_nodes
from gte_deploy.core.errors import BackendError, InputError, MissingDependencyError
from gte_deploy.core.spec import COMPUTE_PRECISIONS, ComputePrecision, Engine, Precision, computed_in

ENGINE_OF: dict[str, Engine] = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "executorch": "executorch",
}
"""Backend, as `gte_deploy.load` takes it -> the engine whose graph it runs."""

# Linux's flag for an instruction with dot products of 8-bit integers -> its usual name.
_INT8_FLAGS = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX"}
ASKED = "it was asked for"
LEAST_BF16_SPEEDUP = 1.2
"""bfloat16 must be this many times as fast as float32 to be chosen: it is less exact, and timings are noisy."""


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


def precision_of(manifest: Manifest, computes: Precision) -> str:
    """The name of what a bundle is computed in, see `computed_in`. The types of a bundle for GPUs are fixed."""
    return manifest.precision if is_for_gpus(manifest) else computed_in(manifest.precision, computes)


def choose_engine(
    manifest: Manifest,
    *,
    backend: str = "auto",
    device: str | None = None,
    precision: ComputePrecision | None = None,
) -> EngineChoice:
    """The engine for a bundle on this machine, and the precision that it computes in.

    The engine is the requested one, else the recorded pick, else the usually faster one. If no precision is requested,
    a bundle whose export verified bfloat16 for it (see `may_run_in_bf16`) runs in bfloat16 where this CPU is faster in
    it. An FP32 bundle runs in bfloat16 only by a recorded pick, which has it if the user allowed it.

    Args:
        manifest: the bundle's.
        backend: as `gte_deploy.load` takes it; not "torch".
        device: as `gte_deploy.load` takes it; None for the one that suits the bundle.
        precision: the requested precision; None to choose it.
    """
    if backend != "auto":
        choice = EngineChoice(
            backend, precision or "fp32", ASKED, device or ("cuda" if is_for_gpus(manifest) else "cpu")
        )
        return _in_default_precision(manifest, choice) if precision is None else choice
    if is_for_gpus(manifest):
        return _for_gpus(manifest, device)
    if precision == "bf16":
        return EngineChoice("openvino", "bf16", "bf16 was requested, and only openvino computes in it", device or "cpu")
    if device not in (None, "cpu"):
        return EngineChoice(
            "onnx", "fp32", f"ONNX Runtime is the only engine of the bundle that runs on {device}", device
        )
    if (picked := _picked(manifest, precision)) is not None:
        return picked
    if precision is None and manifest.precision == "bf16":
        is_faster, reason = _bf16(manifest)
        if is_faster:
            return EngineChoice("openvino", "bf16", reason)
        return dataclasses.replace(_by_rule(manifest), reason=f"{reason}, and fp32 is more exact")
    choice = _by_rule(manifest)
    return _in_default_precision(manifest, choice) if precision is None else choice


def may_run_in_bf16(manifest: Manifest) -> bool:
    """Whether the export verified that OpenVINO may compute this bundle in bfloat16 without being asked.

    A bundle for bfloat16 may, and the parts of an INT8 bundle that are not INT8. For an FP32 bundle the export checks
    bfloat16 as well, but only users decide about it.
    """
    graph = manifest.graphs.get("openvino")
    return manifest.precision in ("bf16", "int8") and graph is not None and "bf16" in graph.computes


def int8_unit() -> str | None:
    """The usual name of this CPU's instruction with dot products of 8-bit integers; None if it has none."""
    flags = cpu_flags()
    return next((unit for flag, unit in _INT8_FLAGS.items() if flag in flags), None)


def _in_default_precision(manifest: Manifest, choice: EngineChoice) -> EngineChoice:
    """The same choice in bfloat16, if the bundle may run in it and this CPU is faster in it."""
    if choice.backend != "openvino" or not may_run_in_bf16(manifest):
        return choice
    is_faster, reason = _bf16(manifest)
    computes: ComputePrecision = "bf16" if is_faster else "fp32"
    return dataclasses.replace(choice, precision=computes, reason=f"{choice.reason}; {reason}")


def _bf16(manifest: Manifest) -> tuple[bool, str]:
    """Whether OpenVINO runs the bundle faster in bfloat16 on this machine, and the reason."""
    if not _is_usable("openvino", manifest):
        return False, "openvino, which alone computes in bf16 on a CPU, is not installed"
    if not may_run_in_bf16(manifest):
        return False, "bf16 missed its bounds at export"
    speed = bf16_speed()
    if speed is None:
        return False, "this CPU does not compute in bf16"
    ratio, part = speedup(manifest, speed)
    return ratio >= LEAST_BF16_SPEEDUP, f"this CPU computes {part} in bf16 {ratio:.1f} times as fast as in fp32"


def speedup(manifest: Manifest, speed: Bf16Speed) -> tuple[float, str]:
    """How many times as fast as FP32 bfloat16 is where the bundle would use it, and the name of that part."""
    return (speed.attention, "attention") if manifest.precision == "int8" else (speed.layers, "matrix products")


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
    if "executorch" in manifest.graphs:
        return EngineChoice("executorch", "fp32", "the bundle has a program for ExecuTorch alone")
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
    if (unit := int8_unit()) is None:
        return EngineChoice(
            "onnx", "fp32", "OpenVINO is not faster here: this CPU has no int8 dot products (VNNI, AMX)"
        )
    return EngineChoice("openvino", "fp32", f"int8 on a CPU with {unit} is fastest on OpenVINO")


def _is_usable(backend: str, manifest: Manifest) -> bool:
    engine = ENGINE_OF.get(backend)
    return engine is not None and engine in manifest.graphs and importlib.util.find_spec(engine) is not None

"""Which engine runs a bundle where the caller names none, and why."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from gte_deploy import picks
from gte_deploy.bundle import Manifest
from gte_deploy.spec import COMPUTE_PRECISIONS, ComputePrecision, Engine

ENGINE_OF: dict[str, Engine] = {"onnx": "onnxruntime", "openvino": "openvino"}
"""Backend, as `gte_deploy.load` takes it -> engine."""

# Dot products of eight-bit integers, by the names that Linux gives them.
_INT8_FLAGS = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX"}
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class EngineChoice:
    """Backend and precision as `gte_deploy.load` takes them, and the reason in one sentence."""

    backend: str
    precision: ComputePrecision
    reason: str


def choose_engine(
    manifest: Manifest, *, device: str = "cpu", precision: ComputePrecision | None = None
) -> EngineChoice:
    """The engine for a bundle on this machine: the one asked for or recorded, else what was measured to be faster.

    bfloat16 changes answers a little, so it is never chosen unasked; a pick may have been recorded with it on request.
    """
    if precision == "bf16":
        return EngineChoice("openvino", "bf16", "bf16 was asked for, and openvino alone computes in it")
    if device != "cpu":
        return EngineChoice("onnx", "fp32", f"of a bundle's engines ONNX Runtime alone runs on {device}")
    return _picked(manifest, precision) or _by_rule(manifest)


def _picked(manifest: Manifest, precision: ComputePrecision | None) -> EngineChoice | None:
    pick = picks.lookup(manifest.to_json()["checksum"])
    if pick is None:
        return None
    computes = next((known for known in COMPUTE_PRECISIONS if known == (pick.precision or "fp32")), None)
    if computes is None or precision not in (None, computes) or not _is_usable(pick.backend, manifest):
        return None
    return EngineChoice(pick.backend, computes, f"gte-deploy bench --pick found it the fastest here on {pick.date}")


def _by_rule(manifest: Manifest) -> EngineChoice:
    if "openvino" not in manifest.graphs:
        return EngineChoice("onnx", "fp32", "the bundle has no graph for OpenVINO")
    if not _is_usable("openvino", manifest):
        return EngineChoice("onnx", "fp32", "openvino is not installed")
    if not _is_usable("onnx", manifest):
        return EngineChoice("openvino", "fp32", "onnxruntime is not installed")
    if manifest.precision != "int8":
        reason = f"{manifest.precision} runs on ONNX Runtime unless gte-deploy bench --pick has recorded another engine"
        return EngineChoice("onnx", "fp32", reason)
    if (unit := _int8_unit()) is None:
        return EngineChoice(
            "onnx", "fp32", "this CPU has no int8 dot products (VNNI, AMX) for OpenVINO to be faster with"
        )
    return EngineChoice("openvino", "fp32", f"int8 on a CPU with {unit} is fastest on OpenVINO")


def _is_usable(backend: str, manifest: Manifest) -> bool:
    engine = ENGINE_OF.get(backend)
    return engine is not None and engine in manifest.graphs and importlib.util.find_spec(engine) is not None


def _int8_unit() -> str | None:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return next((unit for flag, unit in _INT8_FLAGS.items() if flag in flags), None)

"""Chooses the TensorRT that builds an engine, and the GPUs that it builds for.

Ordinary TensorRT builds on the GPU that the engine is for. TensorRT-RTX builds for several GPUs at once and needs no
GPU.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gte_deploy.backends.tensorrt.cuda import gpu_capability
from gte_deploy.backends.tensorrt.variants import VARIANTS
from gte_deploy.core.errors import ExportError, InputError, MissingDependencyError
from gte_deploy.core.install import install_command
from gte_deploy.core.options import check_choice, did_you_mean
from gte_deploy.core.spec import Precision, TensorRTVariant

RUNTIMES = ("auto", "tensorrt", "rtx")
DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
# From NVIDIA's list of CUDA GPUs (developer.nvidia.com/cuda-gpus).
CAPABILITY_OF: Mapping[str, str] = {
    **dict.fromkeys(("v100",), "7.0"),
    **dict.fromkeys(("xavier",), "7.2"),
    **dict.fromkeys(("t4", "rtx2060", "rtx2070", "rtx2080"), "7.5"),
    **dict.fromkeys(("a100", "a30"), "8.0"),
    **dict.fromkeys(("a2", "a10", "a10g", "a16", "a40", "rtxa4000", "rtxa5000", "rtxa6000"), "8.6"),
    **dict.fromkeys(("rtx3050", "rtx3060", "rtx3070", "rtx3080", "rtx3090"), "8.6"),
    **dict.fromkeys(("orin",), "8.7"),
    **dict.fromkeys(("l4", "l40", "l40s", "rtx4050", "rtx4060", "rtx4070", "rtx4080", "rtx4090"), "8.9"),
    **dict.fromkeys(("h100", "h200", "gh200"), "9.0"),
    **dict.fromkeys(("b200", "gb200"), "10.0"),
    **dict.fromkeys(("b300", "gb300"), "10.3"),
    **dict.fromkeys(("thor",), "11.0"),
    **dict.fromkeys(("rtx5050", "rtx5060", "rtx5070", "rtx5080", "rtx5090"), "12.0"),
    **dict.fromkeys(("gb10", "dgxspark"), "12.1"),
}
"""Name of a GPU, without its maker and form -> its compute capability."""
NO_ENGINE = "No engine was built."
"""How the caveat of an export without an engine begins; `gte-export adopt` takes it out of the card."""
_MAX_ERRORS = 3
# Precision -> the least compute capability that has the hardware.
_NEEDS: Mapping[Precision, tuple[int, int]] = {"bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}


@dataclass(frozen=True)
class Runtime:
    """A TensorRT that can build on this machine, and the reason for choosing it."""

    variant: TensorRTVariant
    reason: str
    module: Any = field(repr=False)

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{VARIANTS[self.variant].title} {self.version}"

    @property
    def version(self) -> str:
        """The version of the module."""
        return str(self.module.__version__)


class MessageLog:
    """Collects the messages of a TensorRT, line by line.

    Args:
        module: the module of the TensorRT.
    """

    def __init__(self, module: Any) -> None:
        log = self
        self.lines: list[str] = []
        self._errors: list[str] = []
        severity = module.ILogger.Severity

        class Logger(module.ILogger):
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                log.lines.append(message)
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    log._errors.append(message)

        self.logger = Logger()

    def last_errors(self) -> str:
        """The last few messages of errors in one line."""
        return "; ".join(self._errors[-_MAX_ERRORS:]) or "TensorRT gives no reason"


def choose_runtime(asked: str) -> Runtime:
    """Choose the TensorRT to build with.

    Args:
        asked: "tensorrt", "rtx", or "auto" for ordinary TensorRT if it and a GPU are present, else TensorRT-RTX.

    Raises:
        InputError: `asked` is none of these.
        MissingDependencyError: the requested TensorRT is not installed; for "auto", neither is.
        ExportError: ordinary TensorRT was requested, but there is no GPU.
    """
    check_choice("runtime", asked, RUNTIMES)
    capability = gpu_capability()
    if asked == "tensorrt":
        module = import_tensorrt("tensorrt")
        if module is None:
            raise MissingDependencyError("tensorrt", "trt")
        if capability is None:
            raise ExportError(
                "TensorRT builds on the GPU that the engine is for, but no CUDA driver with a GPU was found here. Use "
                "--runtime rtx, which needs no GPU, or write the graph with --onnx-only and build it on that machine."
            )
        return Runtime("tensorrt", f"it was requested; the GPU here has compute capability {capability}", module)
    if asked == "auto" and capability is not None and (module := import_tensorrt("tensorrt")) is not None:
        return Runtime(
            "tensorrt", f"it is installed, and this machine has a GPU of compute capability {capability}", module
        )
    module = import_tensorrt("tensorrt-rtx")
    if module is None:
        raise MissingDependencyError(
            "tensorrt_rtx",
            "rtx",
            "It builds engines for RTX GPUs, with or without one. For ordinary TensorRT, which builds on the GPU "
            f"itself: {install_command('trt')}. Or write the graph with --onnx-only and build it elsewhere.",
        )
    if asked == "rtx":
        return Runtime("tensorrt-rtx", "it was requested", module)
    why = "no GPU was found here" if capability is None else "ordinary TensorRT is not installed"
    return Runtime("tensorrt-rtx", f"{why}; it needs no GPU", module)


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Parse compute capabilities, or names of GPUs: "sm86,rtx4090,12.0" gives ("8.6", "8.9", "12.0").

    Raises:
        InputError: the text has another form, or names an unknown GPU.
    """
    return tuple(dict.fromkeys(_capability(part) for part in text.split(",")))


def _capability(text: str) -> str:
    plain = re.sub(r"[\s_-]\d+ ?gb\b", "", text.casefold())  # its memory
    plain = re.sub(r"[\s_-]", "", plain)
    if match := re.fullmatch(r"(?:sm)?(\d{1,2})\.?(\d)", plain):
        return f"{match[1]}.{match[2]}"
    plain = re.sub(r"^(nvidia|geforce|jetson|tesla|quadro|agx)+", "", plain)
    plain = re.sub(r"(ti|super|laptop|nano|nx|agx|pcie|sxm)+$", "", plain)
    if plain not in CAPABILITY_OF:
        near = did_you_mean(plain, CAPABILITY_OF)
        raise InputError(
            f"target is {text.strip()!r}; expected compute capabilities such as sm86,sm89,sm120, or GPUs such as orin "
            f"or rtx4090{near or '.'}",
            advice="`nvidia-smi --query-gpu=compute_cap --format=csv` prints that of a GPU.",
        )
    return CAPABILITY_OF[plain]


def resolve_capabilities(runtime: Runtime, asked: Sequence[str] | None, precision: Precision) -> tuple[str, ...]:
    """The compute capabilities that the engine is built for.

    Raises:
        InputError: this TensorRT does not build for one of them, or one cannot compute in `precision`.
    """
    needed = _NEEDS.get(precision, (0, 0))
    if runtime.variant == "tensorrt":
        here = gpu_capability()
        assert here is not None  # choose_runtime found one
        if asked and tuple(asked) != (here,):
            raise InputError(
                f"TensorRT builds only for the GPU here, {sm_name(here)}, and the target is "
                f"{','.join(map(sm_name, asked))}. Leave out --target, build on such a GPU, or use --runtime rtx."
            )
        chosen: tuple[str, ...] = (here,)
    elif asked:
        chosen = tuple(asked)
        known = [name for name in dir(runtime.module.ComputeCapability) if name.startswith("SM")]
        if unknown := [sm_name(one) for one in chosen if sm_name(one).upper() not in known]:
            raise InputError(
                f"{runtime.title} does not build for {', '.join(unknown)}, only for {', '.join(known).lower()}. "
                "A data centre GPU needs ordinary TensorRT, on a machine that has one."
            )
    else:
        chosen = tuple(one for one in DEFAULT_CAPABILITIES if _numbers(one) >= needed)
    if unable := [sm_name(one) for one in chosen if _numbers(one) < needed]:
        raise InputError(
            f"{', '.join(unable)} cannot compute in {precision}, which needs sm{needed[0]}{needed[1]} or later; "
            "remove it from --target, or use fp16 or int8"
        )
    return chosen


def import_tensorrt(variant: TensorRTVariant) -> Any:
    """The module of a variant, None where it is not installed."""
    try:
        return importlib.import_module(VARIANTS[variant].module)
    except (ImportError, OSError, RuntimeError):  # a wheel without its libraries counts as missing
        return None


def sm_name(capability: str) -> str:
    """The name of a compute capability: "sm89" for "8.9"."""
    return f"sm{capability.replace('.', '')}"


def _numbers(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)

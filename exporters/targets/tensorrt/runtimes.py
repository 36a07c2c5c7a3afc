"""Which TensorRT builds here, and for which GPUs.

Ordinary TensorRT builds on the GPU that the engine is for. TensorRT-RTX builds for several GPUs at once, on a machine
without any.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gte_deploy.backends.tensorrt.cuda import gpu_capability
from gte_deploy.backends.tensorrt.variants import VARIANTS
from gte_deploy.core.errors import ExportError, InputError, MissingDependencyError
from gte_deploy.core.spec import Precision, TensorRTVariant

RUNTIMES = ("auto", "tensorrt", "rtx")
DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
# The least compute capability with the hardware for it.
_NEEDS: Mapping[Precision, tuple[int, int]] = {"bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}


@dataclass(frozen=True)
class Runtime:
    """A TensorRT that can build here, and why it was taken."""

    variant: TensorRTVariant
    reason: str
    module: Any = field(repr=False)

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{VARIANTS[self.variant].title} {self.version}"

    @property
    def version(self) -> str:
        """As the module has it."""
        return str(self.module.__version__)


def choose_runtime(asked: str) -> Runtime:
    """The TensorRT to build with.

    Args:
        asked: "tensorrt", "rtx", or "auto" for ordinary TensorRT where it and a GPU are present, else TensorRT-RTX.

    Raises:
        MissingDependencyError: what was asked for is not installed; for "auto", neither is.
        ExportError: ordinary TensorRT was asked for, and there is no GPU.
    """
    if asked not in RUNTIMES:
        raise InputError(f"runtime is {asked!r}; expected one of {', '.join(RUNTIMES)}")
    capability = gpu_capability()
    if asked == "tensorrt":
        module = _import("tensorrt")
        if module is None:
            raise MissingDependencyError("tensorrt", "trt")
        if capability is None:
            raise ExportError(
                "TensorRT builds on the GPU that the engine is for, and no CUDA driver with a GPU was found here. Take "
                "--runtime rtx, which builds without one, or write the graph with --onnx-only and build it there."
            )
        return Runtime("tensorrt", f"it was asked for; the GPU here has compute capability {capability}", module)
    if asked == "auto" and capability is not None and (module := _import("tensorrt")) is not None:
        return Runtime("tensorrt", f"it is installed, and here is a GPU of compute capability {capability}", module)
    module = _import("tensorrt-rtx")
    if module is None:
        raise MissingDependencyError("tensorrt_rtx", "rtx", _INSTALL)
    if asked == "rtx":
        return Runtime("tensorrt-rtx", "it was asked for", module)
    why = "no GPU was found here" if capability is None else "ordinary TensorRT is not installed"
    return Runtime("tensorrt-rtx", f"{why}, and it builds without", module)


_INSTALL = (
    "It builds engines for RTX GPUs, with or without one. For ordinary TensorRT, which builds on the GPU itself: "
    "pip install 'gte-deploy[trt]'. Or write the graph with --onnx-only and build it elsewhere."
)


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Compute capabilities from "sm86,sm89,sm120": ("8.6", "8.9", "12.0").

    Raises:
        InputError: another form.
    """
    found = [re.fullmatch(r"sm(\d{1,2})(\d)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise InputError(f"target is {text!r}; expected compute capabilities such as sm86,sm89,sm120")
    return tuple(dict.fromkeys(f"{match[1]}.{match[2]}" for match in found if match))


def resolve_capabilities(runtime: Runtime, asked: Sequence[str] | None, precision: Precision) -> tuple[str, ...]:
    """The compute capabilities that the engine is built for.

    Raises:
        InputError: one that this TensorRT does not build for, or that cannot compute in `precision`.
    """
    needed = _NEEDS.get(precision, (0, 0))
    if runtime.variant == "tensorrt":
        here = gpu_capability()
        assert here is not None  # choose_runtime found one
        if asked and tuple(asked) != (here,):
            raise InputError(
                f"TensorRT builds for the GPU here, {sm_name(here)}, and the target is "
                f"{','.join(map(sm_name, asked))}. Leave --target away, build on such a GPU, or take --runtime rtx."
            )
        chosen: tuple[str, ...] = (here,)
    elif asked:
        chosen = tuple(asked)
        known = [name for name in dir(runtime.module.ComputeCapability) if name.startswith("SM")]
        if unknown := [sm_name(one) for one in chosen if sm_name(one).upper() not in known]:
            raise InputError(
                f"{runtime.title} does not build for {', '.join(unknown)}; it does for {', '.join(known).lower()}. "
                "A data centre GPU needs ordinary TensorRT, on a machine that has one."
            )
    else:
        chosen = tuple(one for one in DEFAULT_CAPABILITIES if _numbers(one) >= needed)
    if unable := [sm_name(one) for one in chosen if _numbers(one) < needed]:
        raise InputError(
            f"{', '.join(unable)} cannot compute in {precision}, which begins with sm{needed[0]}{needed[1]}; leave it "
            "away from --target, or take fp16 or int8"
        )
    return chosen


def _import(variant: TensorRTVariant) -> Any:
    try:
        return importlib.import_module(VARIANTS[variant].module)
    except (ImportError, OSError, RuntimeError):  # the wheel without its libraries counts as none
        return None


def sm_name(capability: str) -> str:
    """The name of a compute capability: "sm89" for "8.9"."""
    return f"sm{capability.replace('.', '')}"


def _numbers(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)

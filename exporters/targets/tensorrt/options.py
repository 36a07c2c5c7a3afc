"""The options of the target "tensorrt"."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import natural, option
from gte_deploy.core.spec import Profile
from gte_deploy.exporters.targets.calibration import CalibrationOptions
from gte_deploy.exporters.targets.cuda.target import Padding
from gte_deploy.exporters.targets.tensorrt.profiles import parse_profile
from gte_deploy.exporters.targets.tensorrt.runtimes import RUNTIMES, parse_capabilities

if TYPE_CHECKING:
    from gte_deploy.exporters.quantization.calibration import Calibrator

EngineOutputs = Literal["all", "answer"]


def _mebibytes(text: str) -> int:
    if not (size := natural(text)):
        raise InputError(f"workspace is {text!r}; expected a positive number of MiB")
    return size << 20


@dataclass(frozen=True)
class TensorRTOptions(CalibrationOptions):
    """Options for building an engine.

    Args:
        padding: "remove" for a padding-free engine, which needs ordinary TensorRT 11.1 or later; see
            `gte_deploy.exporters.targets.tensorrt.padding_free`. "keep" and "auto" keep padding.
        outputs: "answer" for an engine that gives only the answer of the task, without hidden states. Its last layer
            then computes only the tokens that the answer needs.
        runtime: "auto", "tensorrt" or "rtx", see `choose_runtime`.
        compute_capabilities: the GPUs that the engine is for, such as "8.9". None is the GPU of this machine; with
            TensorRT-RTX, it is those of `DEFAULT_CAPABILITIES` that compute in the precision.
        profiles: the shapes that the engine takes; empty for the default profiles.
        lengths: a file with one length in tokens per line; the profiles follow its distribution.
        calibrator: how INT8 and FP8 scales are chosen, see `gte_deploy.exporters.quantization.calibration`.
        fp8_attention: whether FP8 includes attention, which only ordinary TensorRT fuses; see
            `gte_deploy.exporters.targets.tensorrt.fp8_attention`. No such engine has been built so far.
        onnx_only: whether to write only the graph.
        keep_onnx: whether the graph stays in the bundle beside the engine.
        workspace: bytes of scratch memory that the kernels may use; None for TensorRT's own limit, all of the GPU's
            memory (TensorRT-RTX without a GPU: 64 GiB).
        timing_cache: the timing cache of an earlier build, which makes this build faster (ordinary TensorRT).
    """

    padding: Padding = option(
        "auto",
        "remove: a padding-free engine, for TensorRT 11.1 or later (default: keep)",
        choices=get_args(Padding),
    )
    outputs: EngineOutputs = option(
        "all",
        "answer: an engine without hidden states, whose last layer computes only the tokens that the answer needs",
        choices=get_args(EngineOutputs),
    )
    runtime: str = option(
        "auto",
        "the TensorRT that builds the engine (default: tensorrt if it and a GPU are present, else rtx)",
        choices=RUNTIMES,
    )
    compute_capabilities: tuple[str, ...] | None = option(
        None,
        "GPUs that the engine is for, such as sm86,sm89,sm120 (default: the GPU here; with rtx, these three)",
        flags=("--target",),
        metavar="GPUS",
        parse=parse_capabilities,
    )
    profiles: tuple[Profile, ...] = option(
        (),
        "shapes as batch x sequence, such as 1x1:8x128:32x512 (with --padding remove as texts x tokens of all texts); "
        "repeat it for several (default: short, middle, long)",
        flags=("--profile",),
        metavar="MIN:OPT:MAX",
        parse=parse_profile,
        repeated=True,
    )
    lengths: Path | None = option(
        None,
        "fit the profiles to the lengths of your texts: a file with one number of tokens per line",
        metavar="FILE",
        parse=Path,
    )
    calibrator: "Calibrator" = option(
        "max", "how ranges are clipped", choices=("max", "percentile", "entropy"), precisions=("int8", "fp8")
    )
    fp8_attention: bool = option(
        False,
        "quantize attention to FP8 too, for ordinary TensorRT; no such engine has been built so far",
        precisions=("fp8",),
    )
    onnx_only: bool = option(False, "write the graph and the trtexec command, but build no engine")
    keep_onnx: bool = option(False, "keep the graph in the bundle, beside the engine")
    workspace: int | None = option(
        None,
        "limit for the scratch memory of the kernels (default: no limit but the GPU's memory)",
        metavar="MIB",
        parse=_mebibytes,
    )
    timing_cache: Path | None = option(
        None, "the timing cache of an earlier build, which makes this build faster", metavar="FILE", parse=Path
    )

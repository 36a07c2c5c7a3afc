"""ONNX -> TensorRT engine, with ordinary TensorRT or with TensorRT-RTX: one builder, the module is a parameter.

Ordinary TensorRT builds on the GPU that the engine is for. TensorRT-RTX builds for several GPUs at once, on a machine
without any. What came of the build is read from the network's types and from the builder's own log, since an engine
cannot be opened where there is no GPU.
"""

import ctypes
import importlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.bundle import PlanEntry
from gte_deploy.errors import ExportError, InputError, MissingDependencyError
from gte_deploy.exporters.profiles import profile_shapes
from gte_deploy.spec import Precision, Profile, TensorRTFlavour, TensorSpec, is_packed

if TYPE_CHECKING:
    from gte_deploy.exporters.calibration import Calibrator
    from gte_deploy.exporters.graph import Graph

RUNTIMES = ("auto", "tensorrt", "rtx")
DEFAULT_TARGETS = ("8.6", "8.9", "12.0")
DEFAULT_WORKSPACE = 4 << 30
PADDING_FREE_FROM = (11, 1)
"""The first TensorRT with kernels for attention over texts in a row. TensorRT-RTX has none."""
PLAN_PATH = "tensorrt/model.plan"
TIMING_CACHE_PATH = "tensorrt/timing.cache"
_MODULES: Mapping[TensorRTFlavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES: Mapping[TensorRTFlavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# The least compute capability with the hardware for it.
_NEEDS: Mapping[Precision, tuple[int, int]] = {"bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}
_GEMM_TYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8"}
# As the builder and the inspector print a layer; what the compiler made of a profile ends in _myl<profile>_<number>.
_LAYER = re.compile(
    r"Name: (?P<name>.*?(?:_myl(?P<profile>\d+)_\d+)?), LayerType: (?P<type>\w+)"
    r"(?:, Inputs: \[ \{.*?Datatype: (?P<dtype>\w+))?"
)
_MAX_ERRORS = 3


@dataclass(frozen=True)
class Runtime:
    """A TensorRT that can build here, and why it was taken."""

    flavour: TensorRTFlavour
    reason: str
    module: Any = field(repr=False)

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{_TITLES[self.flavour]} {self.version}"

    @property
    def version(self) -> str:
        """As the module has it."""
        return str(self.module.__version__)


@dataclass(frozen=True)
class TensorRTOptions:
    """What an engine is built with and for.

    Args:
        runtime: "auto", "tensorrt" or "rtx", see `choose_runtime`.
        targets: compute capabilities such as "8.9"; None for the GPU here, or with TensorRT-RTX for `DEFAULT_TARGETS`
            as far as they can compute in the precision.
        profiles: shapes that the engine takes; none for `default_profiles`.
        lengths: a file with one length in tokens a line, to make the profiles of; see `profiles_for_lengths`.
        calibrator: how INT8 and FP8 scales are chosen, see `gte_deploy.exporters.calibration.measure_peaks`.
        onnx_only: write the graph alone.
        keep_onnx: leave the graph in the bundle beside the engine.
        workspace: bytes of scratch that a kernel may take.
        timing_cache: a cache of an earlier build, which makes this one faster (ordinary TensorRT).
    """

    runtime: str = "auto"
    targets: tuple[str, ...] | None = None
    profiles: tuple[Profile, ...] = ()
    lengths: Path | None = None
    calibrator: "Calibrator" = "max"
    onnx_only: bool = False
    keep_onnx: bool = False
    workspace: int = DEFAULT_WORKSPACE
    timing_cache: Path | None = None


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


def require_padding_free(runtime: Runtime) -> None:
    """Check that `runtime` can build an engine without padding.

    Raises:
        ExportError: it is TensorRT-RTX, or too old.
    """
    wanted = ".".join(map(str, PADDING_FREE_FROM))
    if runtime.flavour != "tensorrt":
        reason = f"{runtime.title} has no kernel for it; it was taken because {runtime.reason}"
    elif tuple(map(int, re.findall(r"\d+", runtime.version)[:2])) < PADDING_FREE_FROM:
        reason = f"this is {runtime.title}"
    else:
        return
    raise ExportError(
        f"Attention without padding needs ordinary TensorRT {wanted} or later and the GPU that the engine is for: "
        f"{reason}. Leave --padding remove away, or write the graph with --onnx-only and build it there."
    )


def parse_targets(text: str) -> tuple[str, ...]:
    """Compute capabilities from "sm86,sm89,sm120": ("8.6", "8.9", "12.0").

    Raises:
        InputError: another form.
    """
    found = [re.fullmatch(r"sm(\d{1,2})(\d)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise InputError(f"target is {text!r}; expected compute capabilities such as sm86,sm89,sm120")
    return tuple(dict.fromkeys(f"{match[1]}.{match[2]}" for match in found if match))


def resolve_targets(runtime: Runtime, targets: Sequence[str] | None, precision: Precision) -> tuple[str, ...]:
    """The compute capabilities that the engine is built for.

    Raises:
        InputError: one that this TensorRT does not build for, or that cannot compute in `precision`.
    """
    needed = _NEEDS.get(precision, (0, 0))
    if runtime.flavour == "tensorrt":
        here = gpu_capability()
        assert here is not None  # choose_runtime found one
        if targets and tuple(targets) != (here,):
            raise InputError(
                f"TensorRT builds for the GPU here, {_sm(here)}, and the target is {','.join(map(_sm, targets))}. "
                "Leave --target away, build on such a GPU, or take --runtime rtx."
            )
        chosen: tuple[str, ...] = (here,)
    elif targets:
        chosen = tuple(targets)
        known = [name for name in dir(runtime.module.ComputeCapability) if name.startswith("SM")]
        if unknown := [_sm(target) for target in chosen if _sm(target).upper() not in known]:
            raise InputError(
                f"{runtime.title} does not build for {', '.join(unknown)}; it does for {', '.join(known).lower()}. "
                "A data centre GPU needs ordinary TensorRT, on a machine that has one."
            )
    else:
        chosen = tuple(target for target in DEFAULT_TARGETS if _numbers(target) >= needed)
    if unable := [_sm(target) for target in chosen if _numbers(target) < needed]:
        raise InputError(
            f"{', '.join(unable)} cannot compute in {precision}, which begins with sm{needed[0]}{needed[1]}; leave it "
            "away from --target, or take fp16 or int8"
        )
    return chosen


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, such as "8.9"; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for number, attribute in zip(numbers, (75, 76), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"{numbers[0].value}.{numbers[1].value}"


def build_plan(
    onnx: Path,
    folder: Path,
    runtime: Runtime,
    options: TensorRTOptions,
    *,
    graph: "Graph",
    num_layers: int,
    targets: Sequence[str],
    profiles: Sequence[Profile],
) -> PlanEntry:
    """Compile `onnx` into `folder`/tensorrt.

    Args:
        onnx: a strongly typed graph, see `gte_deploy.exporters.tensorrt_graph`.
        folder: of the bundle.
        runtime: what builds.
        options: workspace and timing cache.
        graph: what `onnx` holds.
        num_layers: of the encoder; each must have got a fused attention kernel. TensorRT builds no other for a
            padding-free graph, so there its attentions are counted in the network, whatever their kernels are named.
        targets: compute capabilities, of `resolve_targets`.
        profiles: that the engine takes.

    Raises:
        ExportError: TensorRT refuses the graph, or the engine is not what was asked for.
    """
    trt = runtime.module
    log = _Log(runtime)
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"{runtime.title} cannot read the graph: {errors}")
    _check_types(trt, network, graph, runtime)
    padding_free = is_packed(graph.inputs)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # what is FP32 in the graph is meant so
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, network, profile, padding_free=padding_free))
    if runtime.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, _sm(target).upper()), index)
    cache = _timing_cache(config, runtime, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{runtime.title} cannot build the engine: {log.last_errors()}")
    layers = count_layers(_layer_lines(trt, plan, log))
    if padding_free:
        layers["fused_attention"] = _count_attentions(trt, network)
    _check_layers(layers, graph, num_layers, runtime)
    path = folder / PLAN_PATH
    path.parent.mkdir()
    path.write_bytes(plan)
    if cache is not None:
        (folder / TIMING_CACHE_PATH).write_bytes(cache.serialize())
    specs = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return PlanEntry(
        path=PLAN_PATH,
        flavour=runtime.flavour,
        version=runtime.version,
        compute_capabilities=tuple(targets),
        profiles=tuple(profiles),
        inputs=tuple(_tensor(tensor, specs) for tensor in inputs),
        outputs=tuple(_tensor(tensor, specs) for tensor in outputs),
        layers=layers,
        timing_cache=None if cache is None else TIMING_CACHE_PATH,
    )


def count_layers(lines: Sequence[str]) -> dict[str, int]:
    """What an engine is made of, from its layers as TensorRT prints them in detail: kind -> how many.

    "fused_attention" kernels, and GEMMs by the type of their input, such as "fp16_gemm"; GEMMs that were joined count
    as many as they were. Where profiles differ, the least.
    """
    profiles: dict[str, Counter[str]] = {}
    for line in lines:
        if (found := _LAYER.match(line)) is None:
            continue
        counts = profiles.setdefault(found["profile"] or "", Counter())
        if "mha" in found["name"]:
            counts["fused_attention"] += 1
        elif found["type"] in ("gemm", "runtime_fusion") and found["dtype"] in _GEMM_TYPES:
            counts[f"{_GEMM_TYPES[found['dtype']]}_gemm"] += 1 + found["name"].count("+")
    kinds = sorted({kind for counts in profiles.values() for kind in counts})
    return {kind: min(counts[kind] for counts in profiles.values()) for kind in kinds}


def _fp32_products(graph: "Graph") -> set[str | None]:
    """Names of the GEMMs that the graph has in FP32: pooling alone."""
    return {
        node.name
        for node in graph.model.graph
        if node.op_type in ("MatMul", "Gemm") and str(node.outputs[0].dtype) == "FLOAT"
    }


def _check_layers(layers: Mapping[str, int], graph: "Graph", num_layers: int, runtime: Runtime) -> None:
    wide = len(_fp32_products(graph))
    wanted = {"fused_attention": num_layers}
    wanted |= {
        f"{kind}_gemm": graph.fusions[f"{kind}_linears"]
        for kind in ("int8", "fp8")
        if f"{kind}_linears" in graph.fusions
    }
    wrong = [
        f"{layers.get(kind, 0)} {kind.replace('_', ' ')} layers where the graph has {count}"
        for kind, count in wanted.items()
        if layers.get(kind, 0) < count
    ]
    if layers.get("fp32_gemm", 0) > wide:
        wrong.append(f"{layers['fp32_gemm']} GEMMs in FP32 where the graph has {wide}")
    if wrong:
        raise ExportError(
            f"{runtime.title} built an engine that would be slow: {'; '.join(wrong)}. Nothing was written; try another "
            "version of it, or another --precision."
        )


def trtexec_line(
    onnx: str,
    profiles: Sequence[Profile],
    *,
    has_masks: bool,
    has_types: bool = False,
    padding_free: bool = False,
) -> str:
    """The command that builds the same engine with TensorRT's own tool; for TensorRT-RTX the tool is tensorrt_rtx."""
    parts = [f"trtexec --onnx={onnx} --saveEngine=model.plan"]
    if not padding_free:  # that needs a TensorRT in which every network is
        parts.append("--stronglyTyped")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        shapes = profile_shapes(profile, padding_free=padding_free)
        for name, taken in (("mask_positions", has_masks), ("token_type_ids", has_types)):
            if not taken:
                del shapes[name]
        for end, name in enumerate(("min", "opt", "max")):
            sizes = (f"{tensor}:{'x'.join(map(str, found[end]))}" for tensor, found in shapes.items())
            parts.append(f"--{name}Shapes={','.join(sizes)}")
    return " ".join(parts)


class _Log:
    """What the builder says, line by line."""

    def __init__(self, runtime: Runtime) -> None:
        log = self
        self.lines: list[str] = []
        self._errors: list[str] = []
        severity = runtime.module.ILogger.Severity

        class Logger(runtime.module.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                runtime.module.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                log.lines.append(message)
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    log._errors.append(message)

        self.logger = Logger()

    def last_errors(self) -> str:
        return "; ".join(self._errors[-_MAX_ERRORS:]) or "it gives no reason"


def _layer_lines(trt: Any, plan: Any, log: _Log) -> list[str]:
    """The engine's layers, from its inspector where there is a GPU to open it on, else from the builder's log."""
    if gpu_capability() is not None:
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        if engine is not None:
            inspector = engine.create_engine_inspector()
            return inspector.get_engine_information(trt.LayerInformationFormat.ONELINE).splitlines()
    return [line for message in log.lines for line in message.splitlines()]


def _network_flags(trt: Any) -> int:
    # TensorRT 11 knows no other networks, and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _count_attentions(trt: Any, network: Any) -> int:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return kinds.count(trt.LayerType.ATTENTION_OUTPUT)


def _profile(builder: Any, network: Any, profile: Profile, *, padding_free: bool) -> Any:
    made = builder.create_optimization_profile()
    shapes = profile_shapes(profile, padding_free=padding_free)
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        made.set_shape(name, *shapes[name])
    return made


def _timing_cache(config: Any, runtime: Runtime, file: Path | None) -> Any:
    """The cache that the builder reads and adds to; TensorRT-RTX tunes on the user's machine and has none."""
    if runtime.flavour == "tensorrt-rtx":
        if file is not None:
            raise InputError("--timing-cache is for ordinary TensorRT; TensorRT-RTX tunes when the engine is first run")
        return None
    try:
        cache = config.create_timing_cache(b"" if file is None else file.read_bytes())
    except OSError as error:
        raise InputError(f"the timing cache {file} cannot be read: {error}") from error
    config.set_timing_cache(cache, False)
    return cache


def _check_types(trt: Any, network: Any, graph: "Graph", runtime: Runtime) -> None:
    """Refuse a network whose GEMMs are not in the types that the graph has.

    An FP16 request that quietly gives an FP32 engine is slow, and nothing else tells.
    """
    fp32 = _fp32_products(graph)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and layer.name not in fp32:
            types = {layer.get_input(i).dtype for i in range(layer.num_inputs)}
            if types & {trt.DataType.FLOAT}:
                raise ExportError(f"{runtime.title} takes {layer.name} in FP32, and the graph has it in 16 bits")


def _tensor(tensor: Any, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """As the network has it; the names of dynamic axes are the graph's."""
    names = specs[tensor.name].shape
    shape = tuple(name if size < 0 else int(size) for size, name in zip(tensor.shape, names, strict=True))
    return TensorSpec(tensor.name, _DTYPES[tensor.dtype.name], shape)


def _import(flavour: TensorRTFlavour) -> Any:
    try:
        return importlib.import_module(_MODULES[flavour])
    except (ImportError, OSError, RuntimeError):  # the wheel without its libraries counts as none
        return None


def _sm(capability: str) -> str:
    return f"sm{capability.replace('.', '')}"


def _numbers(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)

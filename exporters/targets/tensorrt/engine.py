"""Compiles an ONNX graph to a TensorRT engine, with ordinary TensorRT or with TensorRT-RTX.

Ordinary TensorRT builds on the GPU that the engine is for. TensorRT-RTX builds for several GPUs at once and needs no
GPU. Without a GPU an engine cannot be opened, so the checks of the result read the network's data types and the log of
the builder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.backends.tensorrt.variants import DTYPE_NAMES
from gte_deploy.bundle.manifest import PlanEntry
from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.core.spec import Profile, TensorSpec
from gte_deploy.exporters.targets.tensorrt import runtimes
from gte_deploy.exporters.targets.tensorrt.layers import (
    Expected,
    Layer,
    LayerComparison,
    compare_layers,
    inspector_lines,
    listing_caveats,
    overflow_line,
    overflowing_sums,
    parse_layers,
)
from gte_deploy.exporters.targets.tensorrt.layouts import TextLayout, layout_of
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.runtimes import MessageLog, Runtime, sm_name

if TYPE_CHECKING:
    from gte_deploy.exporters.graph.build import Graph

PLAN_PATH = "tensorrt/model.plan"
TIMING_CACHE_PATH = "tensorrt/timing.cache"
_REQUESTED_MEMORY = re.compile(r"OutOfMemory.*?Requested size was (\d+) bytes", re.DOTALL)


def build_plan(
    onnx: Path,
    folder: Path,
    runtime: Runtime,
    options: TensorRTOptions,
    *,
    graph: "Graph",
    num_layers: int,
    compute_capabilities: Sequence[str],
    profiles: Sequence[Profile],
) -> PlanEntry:
    """Compile `onnx` into `folder`/tensorrt.

    Args:
        onnx: a strongly typed graph, see `gte_deploy.exporters.targets.tensorrt.graph`.
        folder: the folder of the bundle.
        runtime: the TensorRT that builds.
        options: workspace and timing cache.
        graph: the graph in `onnx`.
        num_layers: number of layers of the encoder; each must get a fused attention kernel. For a padding-free graph
            TensorRT has no other kernel, so the attention layers of the network are counted.
        compute_capabilities: the GPUs that the engine is for; see `resolve_capabilities`.
        profiles: the profiles of the engine.

    Raises:
        ExportError: TensorRT refuses the graph, or builds an engine other than requested.
    """
    trt = runtime.module
    log = MessageLog(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"{runtime.title} cannot read the graph: {errors}")
    _check_types(trt, network, graph, runtime)
    layout = layout_of(graph.inputs)
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 would round what the graph computes in FP32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, network, profile, layout))
    if runtime.variant == "tensorrt-rtx":
        config.num_compute_capabilities = len(compute_capabilities)
        for index, capability in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm_name(capability).upper()), index)
    cache = _timing_cache(config, runtime, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = log.last_errors()
        raise ExportError(
            f"{runtime.title} cannot build the engine: {reason}{_memory_advice(reason, options, profiles)}"
        )
    layers = parse_layers(_layer_lines(trt, plan, log))
    attentions = _count_attentions(trt, network) if layout.has_attention_operator else None
    compared = _compare(layers, graph, num_layers, len(profiles), attentions)
    if compared.wrong:
        raise ExportError(
            f"{runtime.title} built an engine that would be slow: {'; '.join(compared.wrong)}. Nothing was written; "
            "try another version of it, or another --precision."
        )
    if overflows := overflowing_sums(layers):
        raise ExportError(
            f"{runtime.title} built an engine that would give wrong answers: {overflow_line(overflows)}. Nothing was "
            "written; use --precision fp16 or bf16, or another version of it."
        )
    path = folder / PLAN_PATH
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(plan)
    if cache is not None:
        (folder / TIMING_CACHE_PATH).write_bytes(cache.serialize())
    specs = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return PlanEntry(
        path=PLAN_PATH,
        variant=runtime.variant,
        version=runtime.version,
        compute_capabilities=tuple(compute_capabilities),
        profiles=tuple(profiles),
        inputs=tuple(_tensor(tensor, specs) for tensor in inputs),
        outputs=tuple(_tensor(tensor, specs) for tensor in outputs),
        layers=compared.counts,
        timing_cache=None if cache is None else TIMING_CACHE_PATH,
        caveats=listing_caveats(compared),
    )


def _fp32_products(graph: "Graph") -> set[str | None]:
    """Names of the FP32 GEMMs in the graph: only those of pooling."""
    return {
        node.name
        for node in graph.model.graph
        if node.op_type in ("MatMul", "Gemm") and str(node.outputs[0].dtype) == "FLOAT"
    }


def _compare(
    layers: Sequence[Layer], graph: "Graph", num_layers: int, num_profiles: int, attentions: int | None
) -> LayerComparison:
    """Compare the layers with the graph. `attentions`: attention operators in the network, None if it has none."""
    kinds = ("int8", "fp8")
    expected = Expected(
        attentions=num_layers if attentions is None else 0,
        profiles=num_profiles,
        quantized={kind: graph.fusions[f"{kind}_linears"] for kind in kinds if f"{kind}_linears" in graph.fusions},
        half=sum(graph.fusions.get(f"{kind}_linears", 0) for kind in ("fp16", "bf16")),
        fp32=len(_fp32_products(graph)),
    )
    compared = compare_layers(layers, expected)
    if attentions is None:
        return compared
    # TensorRT has no other kernel for the operator than the fused one.
    counts = {**compared.counts, "fused_attention": attentions}
    missing = (f"{attentions} fused attention layers where the graph has {num_layers}",)
    return replace(compared, counts=counts, wrong=compared.wrong + missing * (attentions < num_layers))


def _memory_advice(reason: str, options: TensorRTOptions, profiles: Sequence[Profile]) -> str:
    """Say what to do if a build failed for lack of memory; an empty text for other reasons."""
    if (found := _REQUESTED_MEMORY.search(reason)) is None:
        return ""
    largest = max(profiles, key=lambda profile: profile.max[0] * profile.max[1])
    smaller = f"a --profile with a smaller maximum than {largest}"
    need = f". The kernels need {int(found[1]) / (1 << 20):,.0f} MiB of scratch memory at once"
    if options.workspace is None:
        return f"{need}, and this GPU has less: give {smaller}"
    return f"{need}, and --workspace allows {options.workspace >> 20:,} MiB: leave it out, raise it, or give {smaller}"


def _layer_lines(trt: Any, plan: Any, log: MessageLog) -> list[str]:
    """The layers of the engine: from its inspector if there is a GPU to open it, else from the builder's log."""
    if runtimes.gpu_capability() is not None:
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        if engine is not None:
            return inspector_lines(trt, engine)
    return [line for message in log.lines for line in message.splitlines()]


def _network_flags(trt: Any) -> int:
    # TensorRT 11 has only strongly typed networks, and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _count_attentions(trt: Any, network: Any) -> int:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return kinds.count(trt.LayerType.ATTENTION_OUTPUT)


def _profile(builder: Any, network: Any, profile: Profile, layout: TextLayout) -> Any:
    built = builder.create_optimization_profile()
    shapes = layout.shapes(profile)
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        built.set_shape(name, *shapes[name])
    return built


def _timing_cache(config: Any, runtime: Runtime, file: Path | None) -> Any:
    """The timing cache that the builder reads and extends. TensorRT-RTX tunes on the user's machine and has none."""
    if runtime.variant == "tensorrt-rtx":
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
    """Refuse a network whose GEMMs do not have the data types of the graph.

    If an FP16 request silently gave an FP32 engine, it would be slow, and nothing else would report it.
    """
    fp32 = _fp32_products(graph)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and layer.name not in fp32:
            types = {layer.get_input(i).dtype for i in range(layer.num_inputs)}
            if types & {trt.DataType.FLOAT}:
                raise ExportError(f"{runtime.title} computes {layer.name} in FP32, but the graph has it in 16 bits")


def _tensor(tensor: Any, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """The spec of a tensor of the network, with the graph's names for dynamic axes."""
    names = specs[tensor.name].shape
    shape = tuple(name if size < 0 else int(size) for size, name in zip(tensor.shape, names, strict=True))
    return TensorSpec(tensor.name, DTYPE_NAMES[tensor.dtype.name], shape)

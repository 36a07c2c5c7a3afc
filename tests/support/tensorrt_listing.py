"""Builds an engine with TensorRT-RTX, and counts its kernels in the listing that the builder logs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.core.spec import Profile
from gte_deploy.exporters.targets.tensorrt.layouts import PADDED

_LISTED = re.compile(r"Name: (?P<name>.*?_myl(?P<profile>\d+)_\d+), LayerType: (?P<type>\w+),")
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")
# Entries of the listing that launch no kernel: events between streams, and the computation of shapes.
_NO_KERNEL = frozenset(("signal", "wait", "shape_call"))
_WORKSPACE = 4 << 30


@dataclass(frozen=True)
class Listing:
    """The kernels of an engine.

    Args:
        kernels: index of a profile -> the names of its kernels, in order.
        scratch: the scratch memory of each profile, bytes.
    """

    kernels: Mapping[int, Sequence[str]]
    scratch: Sequence[int]

    def between_attentions(self, profile: int) -> list[int]:
        """The number of kernels from the attention of each layer to the next: the kernels of one layer."""
        at = [index for index, name in enumerate(self.kernels[profile]) if "mha" in name]
        return [later - earlier for earlier, later in zip(at, at[1:], strict=False)]


def build_listing(trt: Any, onnx: Path, profiles: Sequence[Profile], *, capability: str = "SM89") -> Listing:
    """Build an engine for one compute capability from a strongly typed graph; return what the builder listed."""
    lines: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    logger = Logger()
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(onnx)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    for profile in profiles:
        made, shapes = builder.create_optimization_profile(), PADDED.shapes(profile)
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            made.set_shape(name, *shapes[name])
        config.add_optimization_profile(made)
    assert builder.build_serialized_network(network, config) is not None, lines[-5:]
    kernels: defaultdict[int, list[str]] = defaultdict(list)
    for found in filter(None, map(_LISTED.match, lines)):
        if found["type"] not in _NO_KERNEL:
            kernels[int(found["profile"])].append(found["name"])
    scratch = [int(found[1]) for found in filter(None, map(_SCRATCH.match, lines))]
    return Listing(kernels, scratch)

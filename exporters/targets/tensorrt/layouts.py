"""Defines how the tensors of an engine hold texts: as padded rows, or as the tokens of all texts without padding.

All differences between the two layouts are in this module: the versions of TensorRT with the kernels, the profiles and
their shapes, the rewriting of the graph, and its emulation on a CPU.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from gte_deploy.backends.tensorrt.variants import KV_LENGTHS, POSITIONS, QUERY_LENGTHS
from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.core.spec import ModelSpec, Profile, TensorSpec, is_packed
from gte_deploy.exporters.targets.base import require_padding_free
from gte_deploy.exporters.targets.tensorrt.profiles import (
    check_packed_profiles,
    check_profiles,
    default_profiles,
    mask_profile,
    packed_profiles,
    profiles_for_lengths,
)
from gte_deploy.exporters.targets.tensorrt.runtimes import Runtime

if TYPE_CHECKING:
    import onnx_ir as ir

    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx, PaddingFreeOnnx
    from gte_deploy.models.description import Description

PADDING_FREE_FROM = (11, 1)
"""The first version of TensorRT with kernels for padding-free attention. TensorRT-RTX has none."""

# What `build_plan` sets as well: FP32 is not rounded to TF32, and the engine lists its layers.
_TRTEXEC_FLAGS = ("--noTF32", "--profilingVerbosity=detailed")

ProfileShapes = dict[str, list[tuple[int, ...]]]
"""Name of an input -> its shapes at min, opt and max."""


class TextLayout(Protocol):
    """The interface of both layouts."""

    has_attention_operator: ClassVar[bool]
    """Whether attention is an operator of TensorRT, rather than a pattern that it fuses."""
    trtexec_flags: ClassVar[tuple[str, ...]]
    """Flags that TensorRT's tool trtexec needs for the network."""

    def check_model(self, checkpoint: "Description") -> None:
        """Refuse a model that this layout cannot run.

        Raises:
            InputError: the message says why.
        """

    def check_runtime(self, runtime: Runtime) -> None:
        """Refuse a version of TensorRT without kernels for this layout.

        Raises:
            ExportError: the message says which TensorRT has them.
        """

    def profiles(self, asked: Sequence[Profile], lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
        """The requested profiles, or profiles for the given lengths in tokens, or the default profiles.

        Raises:
            InputError: the profiles do not cover inputs of up to `max_length` tokens.
        """
        ...

    def shapes(self, profile: Profile) -> ProfileShapes:
        """The shapes of every possible input; few graphs have `mask_positions` and `token_type_ids`."""
        ...

    def rewrite(self, model: "ir.Model", sites: Mapping[str, int]) -> dict[str, int]:
        """Rewrite a plain FP32 graph in place for this layout; return pass -> number of matches."""
        ...

    def emulation(
        self, graph: "Graph", spec: ModelSpec, *, profiles: Sequence[Profile], num_heads: int
    ) -> "PaddedOnnx | PaddingFreeOnnx":
        """The object that runs the graph on a CPU like the engine."""
        ...

    def caveats(self) -> list[str]:
        """One sentence for each thing that the emulation does not verify."""
        ...


class Padded:
    """Rows [batch, sequence] with an attention mask."""

    has_attention_operator: ClassVar[bool] = False
    # For TensorRT 10. In TensorRT 11 every network is strongly typed, and trtexec ignores the flag.
    trtexec_flags: ClassVar[tuple[str, ...]] = ("--stronglyTyped",)

    def check_model(self, checkpoint: "Description") -> None:
        """Accept every model."""

    def check_runtime(self, runtime: Runtime) -> None:
        """Accept every version of TensorRT."""

    def profiles(self, asked: Sequence[Profile], lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
        """See `TextLayout`; a profile is (rows, tokens of a row)."""
        if lengths and not asked:
            return profiles_for_lengths(lengths, max_length)
        profiles = tuple(asked) or default_profiles(max_length)
        check_profiles(profiles, max_length)
        return profiles

    def shapes(self, profile: Profile) -> ProfileShapes:
        """See `TextLayout`."""
        sizes: list[tuple[int, ...]] = [profile.min, profile.opt, profile.max]
        rows: ProfileShapes = {name: list(sizes) for name in ("input_ids", "attention_mask", "token_type_ids")}
        return rows | {"mask_positions": [(count, 2) for count in mask_profile(profile)]}

    def rewrite(self, model: "ir.Model", sites: Mapping[str, int]) -> dict[str, int]:
        """Join queries, keys and values; the trace has this layout already."""
        from gte_deploy.exporters.targets.tensorrt.qkv import join_projections

        return join_projections(model, sites=sites)

    def emulation(
        self, graph: "Graph", spec: ModelSpec, *, profiles: Sequence[Profile], num_heads: int
    ) -> "PaddedOnnx":
        """See `TextLayout`."""
        from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx

        return PaddedOnnx(graph, spec, num_heads=num_heads)

    def caveats(self) -> list[str]:
        """Return no caveats: the emulation runs the graph itself."""
        return []


class PaddingFree:
    """The tokens of all texts one after another; see `gte_deploy.exporters.targets.tensorrt.padding_free`."""

    has_attention_operator: ClassVar[bool] = True
    # In the versions of TensorRT with the kernels, every network is strongly typed.
    trtexec_flags: ClassVar[tuple[str, ...]] = ()

    def check_model(self, checkpoint: "Description") -> None:
        """Refuse sparse models, whose head pools padded rows, and families without padding-free attention."""
        if checkpoint.spec.task == "sparse":
            raise InputError(
                "padding 'remove' is not for task sparse with format trt: its head pools padded rows. Keep padding."
            )
        require_padding_free(checkpoint)

    def check_runtime(self, runtime: Runtime) -> None:
        """Refuse TensorRT-RTX, and versions of TensorRT before `PADDING_FREE_FROM`."""
        wanted = ".".join(map(str, PADDING_FREE_FROM))
        if runtime.variant != "tensorrt":
            reason = f"{runtime.title} has no kernel for it; it was chosen because {runtime.reason}"
        elif tuple(map(int, re.findall(r"\d+", runtime.version)[:2])) < PADDING_FREE_FROM:
            reason = f"this is {runtime.title}"
        else:
            return
        raise ExportError(
            f"Attention without padding needs ordinary TensorRT {wanted} or later and the GPU that the engine is for: "
            f"{reason}. Leave out --padding remove, or write the graph with --onnx-only and build the engine there."
        )

    def profiles(self, asked: Sequence[Profile], lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
        """See `TextLayout`; a profile is (texts, tokens of all texts)."""
        profiles = tuple(asked) or packed_profiles(max_length, lengths)
        check_packed_profiles(profiles, max_length)
        return profiles

    def shapes(self, profile: Profile) -> ProfileShapes:
        """See `TextLayout`."""
        sizes = (profile.min, profile.opt, profile.max)
        shapes: ProfileShapes = {
            name: [(tokens,) for _, tokens in sizes] for name in ("input_ids", POSITIONS, "token_type_ids")
        }
        shapes |= {name: [(texts + 1,) for texts, _ in sizes] for name in (QUERY_LENGTHS, KV_LENGTHS)}
        return shapes | {"mask_positions": [(count,) for count in mask_profile(profile)]}

    def rewrite(self, model: "ir.Model", sites: Mapping[str, int]) -> dict[str, int]:
        """See `TextLayout`."""
        from gte_deploy.exporters.targets.tensorrt.padding_free import make_padding_free

        return make_padding_free(model, sites=sites)

    def emulation(
        self, graph: "Graph", spec: ModelSpec, *, profiles: Sequence[Profile], num_heads: int
    ) -> "PaddingFreeOnnx":
        """See `TextLayout`."""
        from gte_deploy.exporters.targets.tensorrt.emulation import PaddingFreeOnnx

        return PaddingFreeOnnx(graph, spec, profiles=profiles, num_heads=num_heads)

    def caveats(self) -> list[str]:
        """Say that the emulation does not run TRT_Attention itself."""
        return [
            "ONNX Runtime does not have TRT_Attention. The comparison computed attention for each text separately, as "
            "TensorRT's documentation describes the operator."
        ]


PADDED, PADDING_FREE = Padded(), PaddingFree()
TEXT_LAYOUTS: Mapping[str, TextLayout] = {"auto": PADDED, "keep": PADDED, "remove": PADDING_FREE}
"""Value of `TensorRTOptions.padding` -> its layout."""


def layout_of(inputs: Iterable[TensorSpec]) -> TextLayout:
    """The layout of a graph or an engine with these inputs."""
    return PADDING_FREE if is_packed(inputs) else PADDED


def trtexec_line(
    onnx: str, profiles: Sequence[Profile], inputs: Sequence[TensorSpec], *, workspace: int | None = None
) -> str:
    """The command that builds the same engine with TensorRT's tool trtexec. TensorRT-RTX's tool is tensorrt_rtx.

    Args:
        onnx: path of the graph.
        profiles: the profiles of the engine.
        inputs: the inputs of the graph.
        workspace: limit for the scratch memory of the kernels, in bytes; None for no limit.
    """
    layout, names = layout_of(inputs), {tensor.name for tensor in inputs}
    parts = [f"trtexec --onnx={onnx} --saveEngine=model.plan", *layout.trtexec_flags, *_TRTEXEC_FLAGS]
    if workspace is not None:
        parts.append(f"--memPoolSize=workspace:{workspace >> 20}M")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        shapes = {name: found for name, found in layout.shapes(profile).items() if name in names}
        for i, name in enumerate(("min", "opt", "max")):
            sizes = (f"{tensor}:{'x'.join(map(str, found[i]))}" for tensor, found in shapes.items())
            parts.append(f"--{name}Shapes={','.join(sizes)}")
    return " ".join(parts)

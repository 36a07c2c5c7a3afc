"""How texts lie in the tensors of an engine: padded rows, or the tokens of all texts in a row without padding.

Everything that differs between the two stands here: which TensorRT has the kernels, the profiles and their shapes, how
the graph is rewritten, and what emulates the graph on a CPU.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from gte_deploy.backends.tensorrt.padding_free import KV_LENGTHS, POSITIONS, QUERY_LENGTHS
from gte_deploy.core.errors import ExportError, InputError
from gte_deploy.core.spec import ModelSpec, Profile, TensorSpec, is_packed
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

PADDING_FREE_FROM = (11, 1)
"""The first TensorRT with kernels for attention over texts in a row. TensorRT-RTX has none."""

Shapes = dict[str, list[tuple[int, ...]]]
"""Input's name -> its shapes at min, opt and max."""


class Layout(Protocol):
    """What the two layouts offer."""

    has_attention_operator: ClassVar[bool]
    """Whether attention is an operator of TensorRT's own, rather than a pattern that it fuses."""
    trtexec_flags: ClassVar[tuple[str, ...]]
    """What the network needs from TensorRT's own tool."""

    def check_model(self, spec: ModelSpec) -> None:
        """Refuse a model that this layout cannot run.

        Raises:
            InputError: saying why.
        """

    def check_runtime(self, runtime: Runtime) -> None:
        """Refuse a TensorRT without the kernels.

        Raises:
            ExportError: saying which TensorRT has them.
        """

    def profiles(self, asked: Sequence[Profile], lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
        """The profiles that were asked for, those made from texts' lengths in tokens, or the default ones.

        Raises:
            InputError: they do not suit inputs of up to `max_length` tokens.
        """
        ...

    def shapes(self, profile: Profile) -> Shapes:
        """The shapes of every input that a graph may have; few have `mask_positions` and `token_type_ids`."""
        ...

    def rewrite(self, model: "ir.Model", num_layers: int) -> dict[str, int]:
        """Rewrite a plain FP32 graph in place for this layout; pass -> how often it fired."""
        ...

    def emulation(
        self, graph: "Graph", spec: ModelSpec, *, file: Path, profiles: Sequence[Profile], num_heads: int
    ) -> "PaddedOnnx | PaddingFreeOnnx":
        """What runs the graph on a CPU as the engine would; `file` is where the graph is saved."""
        ...

    def caveats(self) -> list[str]:
        """What the emulation does not show, one sentence each."""
        ...


class Padded:
    """Rows [batch, sequence] with an attention mask."""

    has_attention_operator: ClassVar[bool] = False
    trtexec_flags: ClassVar[tuple[str, ...]] = ("--stronglyTyped",)

    def check_model(self, spec: ModelSpec) -> None:
        """Every model runs so."""

    def check_runtime(self, runtime: Runtime) -> None:
        """Every TensorRT has the kernels."""

    def profiles(self, asked: Sequence[Profile], lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
        """See `Layout`; a profile is (rows, tokens of a row)."""
        if lengths and not asked:
            return profiles_for_lengths(lengths, max_length)
        profiles = tuple(asked) or default_profiles(max_length)
        check_profiles(profiles, max_length)
        return profiles

    def shapes(self, profile: Profile) -> Shapes:
        """See `Layout`."""
        ends: list[tuple[int, ...]] = [profile.min, profile.opt, profile.max]
        rows: Shapes = {name: list(ends) for name in ("input_ids", "attention_mask", "token_type_ids")}
        return rows | {"mask_positions": [(count, 2) for count in mask_profile(profile)]}

    def rewrite(self, model: "ir.Model", num_layers: int) -> dict[str, int]:
        """The trace has this layout already."""
        return {}

    def emulation(
        self, graph: "Graph", spec: ModelSpec, *, file: Path, profiles: Sequence[Profile], num_heads: int
    ) -> "PaddedOnnx":
        """See `Layout`."""
        from gte_deploy.exporters.targets.tensorrt.emulation import PaddedOnnx

        return PaddedOnnx(graph, spec, file=file, num_heads=num_heads)

    def caveats(self) -> list[str]:
        """The graph itself is run."""
        return []


class PaddingFree:
    """Tokens of all texts in a row; `gte_deploy.exporters.targets.tensorrt.padding_free` has the inputs."""

    has_attention_operator: ClassVar[bool] = True
    # Only a TensorRT in which every network is strongly typed has the kernels.
    trtexec_flags: ClassVar[tuple[str, ...]] = ()

    def check_model(self, spec: ModelSpec) -> None:
        """A sparse head pools padded rows."""
        if spec.task == "sparse":
            raise InputError(
                "padding 'remove' is not for task sparse with format trt: its head pools padded rows. Keep it."
            )

    def check_runtime(self, runtime: Runtime) -> None:
        """See `PADDING_FREE_FROM`."""
        wanted = ".".join(map(str, PADDING_FREE_FROM))
        if runtime.variant != "tensorrt":
            reason = f"{runtime.title} has no kernel for it; it was taken because {runtime.reason}"
        elif tuple(map(int, re.findall(r"\d+", runtime.version)[:2])) < PADDING_FREE_FROM:
            reason = f"this is {runtime.title}"
        else:
            return
        raise ExportError(
            f"Attention without padding needs ordinary TensorRT {wanted} or later and the GPU that the engine is for: "
            f"{reason}. Leave --padding remove away, or write the graph with --onnx-only and build it there."
        )

    def profiles(self, asked: Sequence[Profile], lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
        """See `Layout`; a profile is (texts, tokens of all texts)."""
        profiles = tuple(asked) or packed_profiles(max_length, lengths)
        check_packed_profiles(profiles, max_length)
        return profiles

    def shapes(self, profile: Profile) -> Shapes:
        """See `Layout`."""
        ends = (profile.min, profile.opt, profile.max)
        shapes: Shapes = {
            name: [(tokens,) for _, tokens in ends] for name in ("input_ids", POSITIONS, "token_type_ids")
        }
        shapes |= {name: [(texts + 1,) for texts, _ in ends] for name in (QUERY_LENGTHS, KV_LENGTHS)}
        return shapes | {"mask_positions": [(count,) for count in mask_profile(profile)]}

    def rewrite(self, model: "ir.Model", num_layers: int) -> dict[str, int]:
        """See `Layout`."""
        from gte_deploy.exporters.targets.tensorrt.padding_free import make_padding_free

        return make_padding_free(model, num_layers=num_layers)

    def emulation(
        self, graph: "Graph", spec: ModelSpec, *, file: Path, profiles: Sequence[Profile], num_heads: int
    ) -> "PaddingFreeOnnx":
        """See `Layout`."""
        from gte_deploy.exporters.targets.tensorrt.emulation import PaddingFreeOnnx

        return PaddingFreeOnnx(graph, spec, profiles=profiles, num_heads=num_heads)

    def caveats(self) -> list[str]:
        """ONNX Runtime has no such operator."""
        return [
            "In place of TRT_Attention, which ONNX Runtime does not have, each text attended to itself, as TensorRT's "
            "documentation says of the operator."
        ]


PADDED, PADDING_FREE = Padded(), PaddingFree()
LAYOUTS: Mapping[str, Layout] = {"auto": PADDED, "keep": PADDED, "remove": PADDING_FREE}
"""Value of `TensorRTOptions.padding` -> layout."""


def layout_of(inputs: Iterable[TensorSpec]) -> Layout:
    """The layout of a graph or an engine with these inputs."""
    return PADDING_FREE if is_packed(inputs) else PADDED


def trtexec_line(onnx: str, profiles: Sequence[Profile], inputs: Sequence[TensorSpec]) -> str:
    """The command that builds the same engine with TensorRT's own tool; for TensorRT-RTX the tool is tensorrt_rtx.

    Args:
        onnx: path of the graph.
        profiles: shapes that the engine takes.
        inputs: inputs of the graph.
    """
    layout, names = layout_of(inputs), {tensor.name for tensor in inputs}
    parts = [f"trtexec --onnx={onnx} --saveEngine=model.plan", *layout.trtexec_flags]
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        shapes = {name: found for name, found in layout.shapes(profile).items() if name in names}
        for end, name in enumerate(("min", "opt", "max")):
            sizes = (f"{tensor}:{'x'.join(map(str, found[end]))}" for tensor, found in shapes.items())
            parts.append(f"--{name}Shapes={','.join(sizes)}")
    return " ".join(parts)

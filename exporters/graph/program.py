"""Turns a transformers model into a program for ExecuTorch, whose XNNPACK backend runs it on CPUs of any kind.

The program computes the outputs of the ONNX graphs from the same inputs (see `build`), in the same order. Batch, tokens
and masks have upper bounds: ExecuTorch plans the memory of every tensor for the largest of them when it writes the
program.
"""

import copy
import functools
import io
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from gte_deploy.core.errors import ExportError
from gte_deploy.core.quiet import quiet_libraries
from gte_deploy.core.spec import ModelSpec, Precision
from gte_deploy.exporters.graph.trace import Wrapper, traceable_module
from gte_deploy.models.heads import HeadOptions, PaddedStates


@dataclass(frozen=True)
class ProgramLimits:
    """The largest inputs of a program.

    Args:
        batch: texts.
        length: tokens of a text.
        masks: rows of `mask_positions`, for fill-mask.
    """

    batch: int
    length: int
    masks: int


def build_program(model: PreTrainedModel, spec: ModelSpec, limits: ProgramLimits, precision: Precision) -> bytes:
    """Export a model with the head of its task, and lower it to XNNPACK.

    Args:
        model: float32; its state is restored afterwards.
        spec: the facts about the model; its logits are "masked".
        limits: the largest inputs.
        precision: "fp32", or "int8" for linear layers with INT8 weights for each channel and INT8 activations, whose
            ranges XNNPACK takes from each token.

    Returns:
        The content of a .pte file.

    Raises:
        ExportError: torch or ExecuTorch cannot express the model.
    """
    options, types = HeadOptions.of(spec), spec.token_types
    built = _quantized(model) if precision == "int8" else model
    # ExecuTorch's passes print, log and warn about torch's deprecations.
    with (
        quiet_libraries(io.StringIO()),
        traceable_module(built, options, max_length=limits.length, token_types=types) as wrapper,
    ):
        wrapper.states = PaddedStates
        try:
            return _lowered(_exported(wrapper, limits, token_types=types), precision)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError, AssertionError) as error:
            line = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"ExecuTorch cannot express this {type(model).__name__} for task {spec.task} ({type(error).__name__}: "
                f"{line}). Export it with --format onnx; docs/edge-conversions.md lists other ways to devices."
            ) from error


def _exported(wrapper: Wrapper, limits: ProgramLimits, *, token_types: bool) -> Any:
    # Torch makes an axis of size 1 a constant, so the examples have another size wherever the axis is dynamic.
    rows, tokens, masks = min(2, limits.batch), min(15, limits.length), min(3, limits.masks)
    # A tensor of its own for each input: torch takes equal objects for one input.
    ones, zeros = functools.partial(torch.ones, dtype=torch.long), functools.partial(torch.zeros, dtype=torch.long)
    texts = _axes(batch=(0, limits.batch), sequence=(1, limits.length))
    inputs = {
        "input_ids": (ones((rows, tokens)), texts),
        "attention_mask": (ones((rows, tokens)), texts),
        "mask_positions": (zeros((masks, 2)), _axes(num_masks=(0, limits.masks))),
        "token_type_ids": (zeros((rows, tokens)), texts),
    }
    names = (*wrapper.input_names, *(["token_type_ids"] if token_types else []))
    examples, axes = zip(*(inputs[name] for name in names), strict=True)
    with torch.no_grad():
        return torch.export.export(wrapper, examples, dynamic_shapes=axes, strict=False)


def _axes(**sizes: tuple[int, int]) -> dict[int, Any]:
    """Number of the axis -> its dynamic size; an axis that can only be 1 is none."""
    return {axis: torch.export.Dim(name, min=1, max=most) for name, (axis, most) in sizes.items() if most > 1}


def _lowered(program: Any, precision: Precision) -> bytes:
    from executorch.backends.xnnpack.partition import xnnpack_partitioner as xnnpack  # pyright: ignore[reportMissingImports]
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    # Dynamically quantized layers first, each with the operators that quantize its input.
    dynamic = [xnnpack.XnnpackDynamicallyQuantizedPartitioner()] if precision == "int8" else []
    lowered = to_edge_transform_and_lower(program, partitioner=[*dynamic, xnnpack.XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def _quantized(model: PreTrainedModel) -> PreTrainedModel:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_  # pyright: ignore[reportMissingImports]
    from torchao.quantization.granularity import PerAxis  # pyright: ignore[reportMissingImports]

    changed = copy.deepcopy(model)
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(changed, config)
    return changed

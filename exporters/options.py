"""The options of an export: the common ones of every target, and those of the chosen target."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choice, check_choices, option, options_given, options_of
from gte_deploy.core.spec import (
    LOGITS,
    POOLINGS,
    PRECISION_ALIASES,
    PRECISIONS,
    TASK_ALIASES,
    TASK_NAMES,
    Logits,
    Precision,
)
from gte_deploy.exporters.graph import MAX_OPSET, MIN_OPSET
from gte_deploy.exporters.targets import TARGETS, target_class, target_classes
from gte_deploy.exporters.targets.base import Target
from gte_deploy.exporters.text_files import read_texts
from gte_deploy.exporters.verification.bounds import Bounds
from gte_deploy.text.inputs import check_integer

FORMATS = tuple(dict.fromkeys(kind.format for kind in target_classes()))
"""The values of `format`, the default first."""


@dataclass(frozen=True)
class ExportOptions:
    """The options that every target takes.

    Args:
        task: "fill-mask", "embed", "classify", "token-classify", "sparse", "hybrid", "multi-vector", or "auto" for the
            checkpoint's own task.
        precision: a precision of the target; None for its first. On CPUs "fp32"; "bf16" (for CPUs that are faster in
            it; others run the bundle in FP32); "int8" (weights and activations); "int8-weight" or "int4-weight"
            (weights alone, for small disks). For target cuda "fp16", "bf16" or "fp32".
            For TensorRT "fp16", "bf16", "int8" or "fp8". docs/numerics.md compares them.
        max_length: longest input in tokens; None for the checkpoint's own limit.
        pooling: "mean", "cls", or "auto" for the checkpoint's own.
        logits: "masked" computes vocabulary logits only for the masks, "all" for every token (fill-mask).
        opset: ONNX opset of the graph; None for the default.
        bounds: if a bound is missed or a check fails, "strict" raises and leaves no bundle; "report" writes the bundle
            with its misses in the manifest, the report and `gte-deploy info`, and loading it warns. A bundle that gives
            numbers that are not finite, has other shapes or does not run is never written.
        eval_texts: a UTF-8 file with one text per line, like the texts in production: the accuracy is measured on them
            and must keep its bounds there; None for built-in texts. For precisions below fp32.
        reference_cache: the folder that keeps PyTorch's outputs for long inputs, which later exports of the same
            weights use; None for the user's cache folder; "off" to compute them each time.
    """

    task: str = option(
        "auto",
        "what the model is for (default: what the checkpoint is for)",
        choices=("auto", *TASK_NAMES),
        aliases=TASK_ALIASES,
    )
    precision: str | None = option(
        None,
        "precision of weights and graphs (default: fp32 on CPUs, fp16 on GPUs)",
        choices=PRECISIONS,
        aliases=PRECISION_ALIASES,
    )
    max_length: int | None = option(
        None,
        "longest input in tokens (default: the checkpoint's own limit)",
        flags=("--max-len", "--max-length"),
        metavar="TOKENS",
        parse=int,
    )
    pooling: str = option(
        "auto", "how an embedding is made (default: as the checkpoint says)", choices=("auto", *POOLINGS)
    )
    logits: Logits = option(
        "masked",
        "fill-mask: compute logits for the masks alone or for every token",
        choices=LOGITS,
        not_for=("executorch", "triton"),
    )
    opset: int | None = option(
        None,
        f"ONNX opset, {MIN_OPSET} to {MAX_OPSET} (default: the one that the graph is tested with)",
        metavar="N",
        parse=int,
        not_for=("executorch",),
    )
    bounds: Bounds = option(
        "strict",
        "report: write a bundle that misses its bounds too, with the misses in its manifest",
        choices=get_args(Bounds),
    )
    eval_texts: Path | None = option(
        None,
        "UTF-8 file with your own texts, one per line: the accuracy must keep its bounds on them (default: built-in "
        "texts)",
        metavar="FILE",
        parse=Path,
        precisions=tuple(precision for precision in PRECISIONS if precision != "fp32"),
    )
    reference_cache: str | os.PathLike[str] | None = option(
        None,
        "folder that keeps PyTorch's outputs for later exports of the same weights, or off (default: the user's cache)",
        metavar="DIR",
    )


@dataclass(frozen=True)
class ExportRequest:
    """A checked request: the target with its own options, and the options of every target."""

    target: Target
    options: ExportOptions
    precision: Precision

    @property
    def kind(self) -> str:
        """The name for the default output folder: the format, or the target if it is not the format's first."""
        first = next(kind for kind in target_classes() if kind.format == self.target.format)
        return self.target.format if type(self.target) is first else self.target.name


def make_request(
    options: ExportOptions | None = None,
    *,
    format: str = "onnx",
    target: str | None = None,
    tensorrt: Any = None,
    **given: Any,
) -> ExportRequest:
    """Check everything that can be checked before a file is read.

    Args:
        options: the options of every target.
        format: "onnx", "executorch" or "trt".
        target: name of a target of that format; None for its first.
        tensorrt: all options of target tensorrt.
        **given: single fields of `ExportOptions` or of the target's options.

    Raises:
        InputError: an option is unknown, out of range, or belongs to another target or precision.
    """
    kind = _target_of(format, target)
    common = {name: value for name, value in given.items() if name in options_of(ExportOptions)}
    own = {name: value for name, value in given.items() if name not in common}
    for name in own:
        if name not in options_of(kind.Options):
            raise InputError(f"{name} is {own[name]!r}; {_whose(name)}")
    # Not isinstance: TensorRT's options inherit from those of other targets.
    if tensorrt is not None and type(tensorrt) is not kind.Options:
        raise InputError(f"tensorrt is for format trt, and the target is {kind.name}: leave it out")
    options = dataclasses.replace(options or ExportOptions(), **common)
    precision = kind.precisions[0] if options.precision is None else options.precision
    known = {name: meant for name, meant in PRECISION_ALIASES.items() if meant in kind.precisions}
    check_choice(f"precision of format {format}, target {kind.name}", precision, kind.precisions, known)
    check_choices(options)
    base: Any = kind.Options() if tensorrt is None else tensorrt
    chosen = kind(dataclasses.replace(base, **own))
    chosen.check(cast(Precision, precision))
    chosen.check_precision(options, cast(Precision, precision))
    for file in (options.eval_texts, getattr(chosen.options, "calibration", None)):
        if file is not None:
            read_texts(Path(file))
    request = ExportRequest(chosen, options, cast(Precision, precision))
    refuse_options_not_for(format, request)
    if options.opset is not None:
        check_integer("opset", options.opset, MIN_OPSET, MAX_OPSET)
    return request


def refuse_options_not_for(format: str, request: ExportRequest) -> None:
    """Refuse options that a format cannot take, although its targets have them.

    Args:
        format: one of `FORMATS`, or "triton".
        request: the export.

    Raises:
        InputError: the message names the option and the format.
    """
    for options in (request.options, request.target.options):
        for name, described in options_given(options):
            if format in described.not_for:
                raise InputError(
                    f"{name} is {getattr(options, name)!r}, which is not for format {format}; leave it out"
                )


def targets_of(format: str) -> Mapping[str, type[Target]]:
    """Return the targets of a format by name, the default first."""
    return {kind.name: kind for kind in target_classes() if kind.format == format}


def _target_of(format: str, target: str | None) -> type[Target]:
    check_choice("format", format, FORMATS)
    known = targets_of(format)
    if target is None or (format == "trt" and target == "cpu"):
        return next(iter(known.values()))
    check_choice(f"target of format {format}", target, tuple(known))
    return known[target]


def _whose(name: str) -> str:
    """Return the end of an error message: the targets that have an option of this name."""
    having = [target_class(target) for target in TARGETS]
    titles = [kind.name for kind in having if name in options_of(kind.Options)]
    return f"that is for target {' and '.join(titles)}" if titles else "there is no such option"

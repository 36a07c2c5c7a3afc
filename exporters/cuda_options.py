"""What `gte-export --target cuda` takes; apart from the graph itself, so that asking costs no import."""

from typing import Literal, get_args

from gte_deploy.errors import InputError
from gte_deploy.spec import Precision

Padding = Literal["auto", "keep", "remove"]
PADDINGS: tuple[Padding, ...] = get_args(Padding)
CUDA_PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "fp32")
"""The default first."""


def removes_padding(precision: str, padding: str) -> bool:
    """Whether a graph of `precision` is padding-free: by default in FP16, where the kernels are made for it.

    Raises:
        InputError: ONNX Runtime's CUDA provider has no kernels for this.
    """
    if precision not in CUDA_PRECISIONS:
        raise InputError(f"target cuda is written in {', '.join(CUDA_PRECISIONS)}, not in {precision}")
    if padding not in PADDINGS:
        raise InputError(f"padding is {padding!r}; expected one of {', '.join(PADDINGS)}")
    if precision == "bf16" and padding == "remove":
        raise InputError("ONNX Runtime removes padding in fp16 and fp32 only; take one of them, or padding 'keep'")
    return padding == "remove" or (padding == "auto" and precision == "fp16")

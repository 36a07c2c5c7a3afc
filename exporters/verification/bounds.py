"""Bounds on the differences between an exported graph and PyTorch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gte_deploy.core.spec import ComputePrecision, Precision

Bounds = Literal["strict", "report"]


@dataclass(frozen=True)
class Tolerance:
    """Bounds on a candidate's differences from PyTorch FP32. None leaves a measure unbounded.

    No bound is absolute: the scale of a checkpoint's last LayerNorm or head changes no answer, so it must not change
    the result of a comparison. A difference is divided by its scale, see `Scales`.

    Args:
        max_rel: largest difference of hidden states, embeddings and vocabulary logits, over its component's scale.
        cosine_min: smallest cosine between any two corresponding vectors.
        cosine_mean: mean cosine of an output over all cases, with the same weight for each case.
        labels: `max_rel` for the logits of labels, which are separate numbers and have no cosine; None for the value
            of `max_rel`.
        top1: share of all masks whose best token is PyTorch's.
    """

    cosine_min: float
    cosine_mean: float | None = None
    max_rel: float | None = None
    labels: float | None = None
    top1: float | None = None

    def __str__(self) -> str:
        """Describe the bounds in words."""
        bounds = ((field.name.replace("_", " "), getattr(self, field.name)) for field in dataclasses.fields(self))
        return ", ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)


TOLERANCES: Mapping[Precision | ComputePrecision, Tolerance] = {
    # Both sides take FP32 rotation angles from the same table, so only the order of FP32 sums differs. Measured with
    # outputs multiplied by 1e-3 to 1e4 (benchmarks/parity_scales.py, docs/numerics.md): 1e-6 to 1e-5 for trained models
    # and models of few layers, the same at every scale; 1e-4 to 4e-4 for random models of twelve layers, see `_widened`
    # in parity.py. A dropped bias, a wrong angle or weight, or leaking padding gives about 1e-2 to 1.
    "fp32": Tolerance(max_rel=1e-4, cosine_min=0.99999),
    # Eleven bits of significand in every product, sums in FP32.
    "fp16": Tolerance(max_rel=0.02, cosine_min=0.9999, cosine_mean=0.99999),
    # Eight bits of significand in every product.
    "bf16": Tolerance(max_rel=0.05, cosine_min=0.999, cosine_mean=0.9999),
    # Half of these tokens are random ids, far from any calibration text, so these bounds find only broken graphs. The
    # quality of a precision is measured on text, see accuracy.py. A label may be as far off as a vector at the smallest
    # cosine c: √(2(1 − c)) of its size.
    "int8": Tolerance(cosine_min=0.9, cosine_mean=0.99, labels=0.45),
    "fp8": Tolerance(cosine_min=0.8, cosine_mean=0.97, labels=0.63),
    "int8-weight": Tolerance(cosine_min=0.98, cosine_mean=0.999, labels=0.2),
    "int4-weight": Tolerance(cosine_min=0.8, cosine_mean=0.97, labels=0.63),
}


def tolerance_of(precision: Precision, compute: Precision) -> Tolerance:
    """Return the bounds for a bundle's precision and an engine's compute precision: the coarser one decides."""
    return TOLERANCES[compute if precision == "fp32" else precision]

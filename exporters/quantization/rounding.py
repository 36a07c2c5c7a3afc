"""Rounds weights and activations to 8-bit integers."""

import numpy as np
from numpy.typing import NDArray

MAX_INT8 = 127
# TensorRT multiplies an FP16 tensor by the FP16 reciprocal of its scale, which must be finite.
_MIN_FP16_SCALE = np.float32(2.0**-14)


def quantize_columns(matrix: NDArray[np.float32], largest: int = MAX_INT8) -> tuple[np.ndarray, np.ndarray]:
    """Quantize [in, out] float32 to int8 of the same shape and scales [out] float32. A column of zeros has scale 1."""
    amax = np.abs(matrix).max(axis=0)
    scale = np.where(amax > 0, amax / largest, 1).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """The scale and zero point of uint8 for a range. The range is widened to include 0, so that 0 is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny)) if high > low else 1.0
    return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255))


def fp16_scale(amax: float, largest: int) -> NDArray[np.float16]:
    """The scale amax / largest of an FP16 tensor, rounded up to FP16, so that `amax` is not clipped."""
    exact = max(np.float32(amax) / largest, _MIN_FP16_SCALE)
    rounded = np.float16(exact)
    return np.array(rounded if rounded >= exact else np.nextafter(rounded, np.float16(np.inf)))

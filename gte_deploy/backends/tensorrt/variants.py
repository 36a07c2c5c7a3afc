"""The variants of TensorRT, and the data types that an engine may have; for the runtime and for the exporter."""

from collections.abc import Mapping
from dataclasses import dataclass

from gte_deploy.core.spec import TensorRTVariant


@dataclass(frozen=True)
class Variant:
    """The names of one variant of TensorRT, and its package.

    Args:
        title: its name in messages.
        module: the Python module.
        distribution: the package on PyPI.
        extra: the extra of gte-deploy that installs it.
    """

    title: str
    module: str
    distribution: str
    extra: str


VARIANTS: Mapping[TensorRTVariant, Variant] = {
    "tensorrt": Variant("TensorRT", "tensorrt", "tensorrt", "trt"),
    "tensorrt-rtx": Variant("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", "rtx"),
}
DTYPE_NAMES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
}
"""TensorRT's name of a data type -> the manifest's."""

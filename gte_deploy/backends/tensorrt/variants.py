"""What the runtime and the exporter both know of TensorRT: its variants, data types, and names of inputs.

The command line of the exporter imports this, so it loads nothing that is slow.
"""

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
POSITIONS, QUERY_LENGTHS, KV_LENGTHS = "position_ids", "query_lengths", "kv_lengths"
"""Inputs of a padding-free engine, see `padding_free.py`."""

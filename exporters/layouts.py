"""The layouts of a checkpoint and the types of its weights, between which `conversion.py` converts."""

from collections.abc import Mapping

LAYOUTS = ("native", "original")
FLOAT_TYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
"""Names of torch's types -> the names of safetensors."""
KEPT = "keep"

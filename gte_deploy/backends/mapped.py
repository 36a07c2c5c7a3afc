"""The weights of a verified graph as arrays over its open files, for engines that take weights from memory."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gte_deploy.bundle.verified import VerifiedGraph
from gte_deploy.core.errors import BackendError

# Types of ONNX that NumPy has, by their number in TensorProto.DataType.
_NUMPY_TYPES: Mapping[int, DTypeLike] = {
    **{1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_},
    **{10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64},
}


def mapped_weights(graph: VerifiedGraph) -> dict[str, NDArray[Any]] | None:
    """Return each tensor of a graph that is in another file: its name -> an array over the mapped file, not a copy.

    None if one has a type that NumPy lacks, such as bfloat16.

    Raises:
        BackendError: a tensor is not within its file, or does not have the size of its type and shape.
    """
    if any(tensor.data_type not in _NUMPY_TYPES for tensor in graph.external):
        return None
    found = {}
    for tensor in graph.external:
        dtype, count = np.dtype(_NUMPY_TYPES[tensor.data_type]), math.prod(tensor.dims)
        try:
            if tensor.length not in (None, count * dtype.itemsize):
                raise ValueError(f"{tensor.length} bytes are no {dtype} {list(tensor.dims)}")
            values = np.frombuffer(graph.data[tensor.location].mapped, dtype, count, tensor.offset)
        except ValueError as error:
            raise BackendError(f"{graph} cannot read its tensor {tensor.name!r}: {error}") from error
        found[tensor.name] = values.reshape(tensor.dims)
    return found

"""Similarity of embeddings: sentence-transformers' four functions, for numpy arrays, sparse embeddings and tensors.

The larger a value, the more alike two embeddings are: distances are negative.

Shapes: N and M embeddings, D dimensions, V vocabulary, K entries with a weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import SIMILARITIES, Similarity
from gte_deploy.tasks.base import import_torch
from gte_deploy.tasks.pooling import l2_normalize
from gte_deploy.tasks.sparse import SparseEmbedding

_Array = NDArray[Any]


def similarity_matrix(a: Any, b: Any, name: Similarity) -> Any:
    """Return the similarity [N, M] of each of `a` with each of `b`; see `TextInterface.similarity`."""
    left, right = _read_both(a, b, name)
    if isinstance(left, _Sparse):
        return _like(_sparse_matrix(left, right, name), a, b)
    return _like(_dense_matrix(np.atleast_2d(left), np.atleast_2d(right), name), a, b)


def similarity_of_pairs(a: Any, b: Any, name: Similarity) -> Any:
    """Return the similarity [N] of each of `a` with the one at its place in `b`; see `TextInterface`."""
    left, right = _read_both(a, b, name)
    if left.shape != right.shape:
        raise InputError(f"pairs need equally many embeddings, not the shapes {left.shape} and {right.shape}")
    if isinstance(left, _Sparse):
        return _like(_sparse_pairs(left, right, name), a, b)
    return _like(_PAIRWISE[name](left, right), a, b)


def sparsity_of(embeddings: Any) -> dict[str, float]:
    """Return the mean number of entries with a weight, and the mean share of the others; see `DropIn.sparsity`."""
    read = _as_sparse(_read(embeddings))
    active = np.count_nonzero(read.values) / read.shape[0]
    return {"active_dims": float(active), "sparsity_ratio": float(1 - active / read.shape[1])}


@dataclass(frozen=True)
class _Sparse:
    """The entries of N sparse embeddings, those of each embedding together.

    Args:
        starts: [N + 1] int64, where the entries of each embedding begin, and where the last ones end.
        columns: [K] int64, vocabulary ids.
        values: [K] float32.
        shape: (N, V).
    """

    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]
    shape: tuple[int, int]

    @property
    def rows(self) -> NDArray[np.int64]:
        """[K] int64, the embedding that each entry belongs to."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.starts))

    def sums(self, values: _Array) -> NDArray[np.float64]:
        """Sum of `values` [K] over the entries of each embedding: [N]."""
        return np.bincount(self.rows, weights=values, minlength=self.shape[0]).astype(np.float64, copy=False)

    def dense(self, row: int) -> NDArray[np.float32]:
        """One embedding as [V]."""
        chosen = slice(self.starts[row], self.starts[row + 1])
        found = np.zeros(self.shape[1], np.float32)
        found[self.columns[chosen]] = self.values[chosen]
        return found

    def normalized(self) -> "_Sparse":
        lengths = np.maximum(np.sqrt(self.sums(self.values.astype(np.float64) ** 2)), 1e-12)
        values = (self.values / np.repeat(lengths, np.diff(self.starts))).astype(np.float32)
        return _Sparse(self.starts, self.columns, values, self.shape)


def _sparse_of(rows: _Array, columns: _Array, values: _Array, shape: tuple[int, int]) -> _Sparse:
    """Sparse embeddings of entries in the order of their rows."""
    starts = np.searchsorted(rows, np.arange(shape[0] + 1))
    return _Sparse(starts, columns, values.astype(np.float32, copy=False), shape)


def _read(embeddings: Any) -> Any:
    """Return an array [D] or [N, D] of float32 or float64, or `_Sparse`.

    Raises:
        InputError: the embeddings have another form.
    """
    if isinstance(embeddings, SparseEmbedding):
        embeddings = [embeddings]
    if isinstance(embeddings, list | tuple) and embeddings:
        if all(isinstance(each, SparseEmbedding) for each in embeddings):
            return _sparse_of_vectors(embeddings)
        if all(map(_is_tensor, embeddings)):
            embeddings = import_torch().stack(list(embeddings))
    if _is_tensor(embeddings):
        embeddings = _of_tensor(embeddings)
        if isinstance(embeddings, _Sparse):
            return embeddings
    try:
        array = np.asarray(embeddings)
    except ValueError:  # lists of different lengths
        array = np.empty(0)
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "fiu":
        raise InputError(
            "embeddings must be an array, a tensor or lists of numbers [D] or [N, D], or what encode_sparse gives, not "
            f"{type(embeddings).__name__} of shape {array.shape}"
        )
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _sparse_of_vectors(vectors: Sequence[SparseEmbedding]) -> _Sparse:
    rows = np.repeat(np.arange(len(vectors)), [len(each) for each in vectors])
    columns = np.concatenate([each.indices for each in vectors])
    return _sparse_of(rows, columns, np.concatenate([each.values for each in vectors]), (len(vectors), vectors[0].size))


def _of_tensor(tensor: Any) -> Any:
    """The numbers of a torch tensor as an array, in float32 or of 8 bytes; a sparse tensor as `_Sparse`."""
    tensor = tensor.detach().cpu()
    if tensor.layout == import_torch().strided:
        return (tensor if tensor.element_size() == 8 else tensor.float()).numpy()
    tensor = (tensor if tensor.ndim == 2 else tensor.unsqueeze(0)).to_sparse_coo().coalesce()
    rows, columns = tensor.indices().numpy()
    return _sparse_of(rows, columns, tensor.values().float().numpy(), tuple(tensor.shape))


def _read_both(a: Any, b: Any, name: Similarity) -> tuple[Any, Any]:
    """Return two arrays [D] or [N, D], or `_Sparse` both; a dense one beside a sparse one is converted.

    Raises:
        InputError: the function is unknown, or the embeddings have another form, or not the same width.
    """
    check_choice("similarity", name, SIMILARITIES)
    left, right = _read(a), _read(b)
    if left.shape[-1] != right.shape[-1]:
        raise InputError(f"embeddings of {left.shape[-1]} and of {right.shape[-1]} dimensions cannot be compared")
    if isinstance(left, _Sparse) or isinstance(right, _Sparse):
        return _as_sparse(left), _as_sparse(right)
    return left, right


def _as_sparse(embeddings: Any) -> _Sparse:
    if isinstance(embeddings, _Sparse):
        return embeddings
    array = np.atleast_2d(embeddings)
    rows, columns = np.nonzero(array)
    return _sparse_of(rows, columns, array[rows, columns], array.shape)


def _is_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor, without an import of torch."""
    return hasattr(value, "detach") and hasattr(value, "layout")


def _like(found: _Array, a: Any, b: Any) -> Any:
    """The result as a tensor on the device of the inputs if one of them is a tensor or a list of tensors."""
    for given in (a, b):
        given = given[0] if isinstance(given, list | tuple) else given
        if _is_tensor(given):
            return import_torch().as_tensor(found, device=given.device)
    return found


def _dense_matrix(a: _Array, b: _Array, name: Similarity) -> _Array:
    if name == "cosine":
        return l2_normalize(a) @ l2_normalize(b).T
    if name == "dot":
        return a @ b.T
    # Row by row: all differences at once would take N times M times D numbers, and the formula of squares loses digits.
    return np.stack([_PAIRWISE[name](row, b) for row in a])


_PAIRWISE: dict[str, Callable[[_Array, _Array], _Array]] = {
    "cosine": lambda a, b: (l2_normalize(a) * l2_normalize(b)).sum(axis=-1),
    "dot": lambda a, b: (a * b).sum(axis=-1),
    "euclidean": lambda a, b: -np.sqrt(((a - b) ** 2).sum(axis=-1)),
    "manhattan": lambda a, b: -np.abs(a - b).sum(axis=-1),
}


def _sparse_matrix(a: _Sparse, b: _Sparse, name: Similarity) -> NDArray[np.float32]:
    if name == "cosine":
        a, b = a.normalized(), b.normalized()
    alone_a, alone_b = _alone(a, name), _alone(b, name)
    return np.stack(
        [
            _joined(alone_a[row], alone_b, b.sums(_shared(a.dense(row)[b.columns], b.values, name)), name)
            for row in range(a.shape[0])
        ]
    )


def _sparse_pairs(a: _Sparse, b: _Sparse, name: Similarity) -> NDArray[np.float32]:
    if name == "cosine":
        a, b = a.normalized(), b.normalized()
    partners = np.concatenate([a.dense(row)[b.columns[b.starts[row] : b.starts[row + 1]]] for row in range(a.shape[0])])
    return _joined(_alone(a, name), _alone(b, name), b.sums(_shared(partners, b.values, name)), name)


def _alone(embeddings: _Sparse, name: Similarity) -> NDArray[np.float64]:
    """The part of a distance that an embedding has with zero: [N]; 0 for products."""
    if name == "euclidean":
        return embeddings.sums(embeddings.values.astype(np.float64) ** 2)
    return embeddings.sums(np.abs(embeddings.values)) if name == "manhattan" else np.zeros(embeddings.shape[0])


def _shared(x: _Array, y: _Array, name: Similarity) -> _Array:
    """What entries x and y of two embeddings at one place change in the sum of their parts; 0 if x is 0."""
    if name == "manhattan":
        return np.abs(x - y) - np.abs(x) - np.abs(y)
    return x.astype(np.float64) * y * (-2 if name == "euclidean" else 1)


def _joined(a: Any, b: _Array, shared: _Array, name: Similarity) -> NDArray[np.float32]:
    total = a + b + shared
    if name == "euclidean":
        total = np.sqrt(np.maximum(total, 0))
    return (total if name in ("cosine", "dot") else -total).astype(np.float32)

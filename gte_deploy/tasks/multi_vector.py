"""Late interaction: an embedding of each token, and the MaxSim score of a query with a document (ColBERT).

Shapes: N queries, M documents, T tokens of a text that count, H hidden size, D embedding size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.tasks.pooling import l2_normalize


@dataclass(frozen=True)
class TokenVectors:
    """Makes the embeddings of a text's tokens from its hidden states.

    Args:
        projection: [D, H], the weight of a linear layer without bias, as torch stores it; None to keep the states.
        skipped: ids of tokens without an embedding, such as punctuation.
        normalize: whether each embedding is scaled to length 1, after the projection.
    """

    projection: NDArray[np.float32] | None = None
    skipped: Collection[int] = ()
    normalize: bool = True

    @classmethod
    def of(cls, projection: Any, skipped: Collection[int], *, normalize: bool, width: int) -> "TokenVectors":
        """Read the arguments of `encode_multi_vector` for a model with hidden states of `width`.

        Raises:
            InputError: the projection is not a matrix [D, width] of finite numbers.
        """
        if projection is None:
            return cls(None, skipped, normalize)
        given = projection.detach().cpu() if hasattr(projection, "detach") else projection  # a torch tensor
        weight = np.asarray(given, dtype=np.float32)
        if weight.ndim != 2 or weight.shape[1] != width or not np.isfinite(weight).all():
            raise InputError(
                f"projection must be a matrix [D, {width}] of finite numbers, not one of shape {list(weight.shape)}"
            )
        return cls(weight, skipped, normalize)

    def of_text(self, answer: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return [T, D] from `input_ids` [S] and `token_embeddings` [S, H] of a text, in the order of its tokens."""
        states = answer["token_embeddings"][~np.isin(answer["input_ids"], list(self.skipped))]
        vectors = states if self.projection is None else states @ self.projection.T
        return l2_normalize(vectors) if self.normalize else vectors


def maxsim(queries: Sequence[NDArray[np.float32]], documents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the MaxSim score [N, M] of each query with each document.

    For each token of the query the largest dot product with a token of the document counts; the score is their sum
    (Khattab and Zaharia 2020, ColBERT, equation 3). A document without a token scores 0.

    Args:
        queries: [T, D] of each query, from `encode_multi_vector`.
        documents: likewise, of each document.

    Raises:
        InputError: an item is not a matrix, or the widths differ.
    """
    items = [*queries, *documents]
    if not all(isinstance(item, np.ndarray) and item.ndim == 2 for item in items):
        raise InputError("maxsim takes two lists of arrays [T, D], as encode_multi_vector gives for lists of texts")
    if len(widths := {item.shape[1] for item in items}) > 1:
        raise InputError(f"the embeddings have the widths {', '.join(map(str, sorted(widths)))}; they must be equal")
    scores = np.zeros((len(queries), len(documents)), np.float32)
    for column, document in enumerate(documents):
        if len(document):
            scores[:, column] = [(query @ document.T).max(axis=1).sum() for query in queries]
    return scores

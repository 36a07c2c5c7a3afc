"""From hidden states to embeddings, in numpy.

Shapes: B rows, S tokens, H hidden size, D embedding size.
"""

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import EmbeddingPrecision, Pooling

# torch.nn.functional.normalize's default: a zero vector stays zero.
NORM_EPSILON = 1e-12


def pool(hidden: NDArray[np.float32], attention_mask: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    """[B, S, H] and [B, S] to [B, H]: the first token's state, or the mean over the tokens that are not padding."""
    if pooling == "cls":
        return hidden[:, 0].astype(np.float32)
    # Along the token axis numpy adds one by one: 8,192 float32 sums in float64 keep their digits.
    if attention_mask.all():  # adding all is faster than choosing
        return (np.add.reduce(hidden, axis=1, dtype=np.float64) / hidden.shape[1]).astype(np.float32)
    total = np.add.reduce(hidden, axis=1, dtype=np.float64, where=attention_mask[:, :, None] == 1)
    return (total / attention_mask.sum(axis=1, keepdims=True)).astype(np.float32)


def l2_normalize(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each [..., D] vector to length 1."""
    norm = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.maximum(norm, NORM_EPSILON)


def quantize(
    embeddings: NDArray[np.float32],
    precision: EmbeddingPrecision,
    ranges: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> NDArray[np.generic]:
    """Convert [B, D] float32 to a smaller type, as sentence_transformers.quantize_embeddings does.

    "binary" and "ubinary" pack the signs, eight to a byte: [B, ceil(D / 8)] int8 or uint8. "int8" and "uint8" spread
    each dimension's range over 256 steps: that of `ranges`, the least and the largest values [D], or the range *in
    these embeddings*, so that they compare only within one call.

    Raises:
        InputError: int8 or uint8 of fewer than two embeddings, which have no range.
    """
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        packed = np.packbits(embeddings > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if ranges is None and len(embeddings) < 2:
        count = "only one" if len(embeddings) else "none"
        raise InputError(f"precision {precision!r} takes each dimension's range from the inputs, and there is {count}")
    low, high = (embeddings.min(axis=0), embeddings.max(axis=0)) if ranges is None else ranges
    steps = (high - low) / 255
    levels = np.clip(np.floor((embeddings - low) / np.where(steps == 0, 1, steps)), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)

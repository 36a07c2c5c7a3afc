"""From vocabulary logits to the answers of transformers' fill-mask pipeline, without torch.

Shapes: V vocabulary, K answers.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from gte_deploy.activations import softmax
from gte_deploy.errors import InputError
from gte_deploy.tokenization import TextTokenizer


class MaskAnswer(TypedDict):
    """One candidate for one mask, with the pipeline's keys in its order."""

    score: float
    token: int
    token_str: str
    sequence: str


def top_tokens(
    logits: NDArray[np.float32], candidates: NDArray[np.int64], top_k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best `top_k` of the `candidates` for one mask's logits [V]: scores [K] and token ids [K], best first.

    The softmax runs over all of V, rows that no token owns included, so that a score is the pipeline's; candidates
    are what may be answered. Equal scores go to the lower id.
    """
    scores = softmax(logits)[candidates]
    kept = min(top_k, len(candidates))
    threshold = np.partition(scores, -kept)[-kept]
    best = np.flatnonzero(scores >= threshold)
    best = best[np.lexsort((candidates[best], -scores[best]))][:kept]
    return scores[best], candidates[best]


def answers(
    row: Sequence[int],
    position: int,
    scores: NDArray[np.float32],
    tokens: NDArray[np.int64],
    tokenizer: TextTokenizer,
    *,
    pad_token_id: int,
) -> list[MaskAnswer]:
    """The answers for the mask at `position` of the token ids `row`.

    As in the pipeline, `sequence` leaves special tokens out only where the text has a single mask: otherwise the
    other masks would vanish from it.
    """
    single = row.count(row[position]) == 1
    filled = list(row)
    result: list[MaskAnswer] = []
    for score, token in zip(scores.tolist(), tokens.tolist(), strict=True):
        filled[position] = token
        sequence = tokenizer.decode([i for i in filled if i != pad_token_id], skip_special_tokens=single)
        result.append({"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence})
    return result


def check_mask(index: int, text: str, row: Sequence[int], tokenizer: TextTokenizer) -> None:
    """Refuse a text whose token ids `row` hold no mask; `index` is the caller's number of it.

    Raises:
        InputError: it has none, or lost it by truncation.
    """
    mask = tokenizer.mask_token
    if tokenizer.mask_token_id in row:
        return
    if mask is not None and mask in text:
        raise InputError(
            f"input {index} lost its {mask} by truncation to {len(row):,} tokens. Move the mask to the front "
            "or shorten the text."
        )
    raise InputError(f"input {index} has no mask; write {mask} where a word is to be predicted")

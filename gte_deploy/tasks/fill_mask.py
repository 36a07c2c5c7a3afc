"""Words for masks: from vocabulary logits to the answers of transformers' fill-mask pipeline.

Shapes: B rows, S tokens, M masks, V vocabulary, K answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.activations import softmax
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tasks.base import HIDDEN, Ensemble, Outputs, Task, Tensors

if TYPE_CHECKING:
    from gte_deploy.text.tokenization import TextTokenizer

MAX_LOGITS = 1 << 26
"""Vocabulary logits held at once: 256 MB. A batch with more masks is run again for the rest of them."""

MAX_ANSWERS = 1 << 18
"""The most answers for one text, and for one request to a server: masks times `top_k`."""

MAX_ANSWER_TOKENS = 1 << 24
"""The most tokens of the answers for one text, and for one request to a server: each answer repeats its text."""

SERVED = Ensemble("gte_fill_mask", ("MASKS", "TOKEN", "TOKEN_ID", "SCORE", "SEQUENCE"), ("TOP_K", "TARGETS"))


# Columns of scores in the search for the best of them; 512 was the fastest for 30,522 words.
_COLUMNS = 512


class MaskAnswer(TypedDict):
    """One candidate for one mask, with the pipeline's keys in its order."""

    score: float
    token: int
    token_str: str
    sequence: str


@dataclass(frozen=True)
class MaskRequest:
    """The arguments of one call that say what to answer.

    Args:
        spec: facts of the model.
        tokenizer: tokenizer of the model.
        candidates: token ids to choose from, int64.
        top_k: answers for each mask.
    """

    spec: ModelSpec
    tokenizer: "TextTokenizer"
    candidates: NDArray[np.int64]
    top_k: int = 5

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`."""
        return ("logits",)

    def answer(self, batch: Batch, outputs: Outputs) -> list[list[list[MaskAnswer]]]:
        """See `Request`: the answers for each mask position of the row, in the order of the positions."""
        found: list[list[list[MaskAnswer]]] = [[] for _ in batch.input_ids]
        lengths = batch.attention_mask.sum(axis=1).tolist()
        assert batch.mask_positions is not None  # the batch of this task names the masks
        logits = logits_of_masks(self.spec, batch.mask_positions, outputs["logits"])
        for (row, token), values in zip(batch.mask_positions.tolist(), logits, strict=True):
            scores, tokens = top_tokens(values, self.candidates, self.top_k)
            ids = batch.input_ids[row, : lengths[row]].tolist()
            pad = self.spec.pad_token_id
            found[row].append(answers(ids, token, scores, tokens, self.tokenizer, pad_token_id=pad))
        return found


def logits_of_masks(
    spec: ModelSpec, mask_positions: NDArray[np.int64], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return logits [M, V] at the (row, token) of `mask_positions`, if the graph gives [M, V] or [B, S, V]."""
    return logits[mask_positions[:, 0], mask_positions[:, 1]] if spec.logits == "all" else logits


def split_by_masks(batch: Batch, vocab_size: int) -> Iterator[Batch]:
    """Split a batch by its mask positions, so that a part has at most `MAX_LOGITS` logits."""
    assert batch.mask_positions is not None  # the batch of this task names the masks
    at_once = max(1, MAX_LOGITS // vocab_size)
    for start in range(0, len(batch.mask_positions), at_once):
        yield replace(batch, mask_positions=batch.mask_positions[start : start + at_once])


def top_tokens(
    logits: NDArray[np.float32], candidates: NDArray[np.int64], top_k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the best `top_k` of the `candidates` for one mask's logits [V]: scores [K], token ids [K], best first.

    The softmax runs over all of V, including rows without a token, so that a score equals the pipeline's. Only
    candidates are returned. Between equal scores the lower id comes first.
    """
    scores = softmax(logits)[candidates]
    kept = min(top_k, len(candidates))
    # The best of each column are fast to find. Of `kept` columns or more they bound the scores to look at from below.
    width = min(len(scores), max(_COLUMNS, kept))
    columns = scores[: len(scores) // width * width].reshape(-1, width).max(axis=0)
    best = np.flatnonzero(scores >= np.partition(columns, -kept)[-kept])
    best = best[np.lexsort((candidates[best], -scores[best]))][:kept]
    return scores[best], candidates[best]


def answers(
    row: Sequence[int],
    position: int,
    scores: NDArray[np.float32],
    tokens: NDArray[np.int64],
    tokenizer: "TextTokenizer",
    *,
    pad_token_id: int,
) -> list[MaskAnswer]:
    """The answers for the mask at `position` of the token ids `row`.

    The time is that of decoding the row once, and of one token for each answer. As in the pipeline, `sequence` leaves
    special tokens out only if the text has a single mask: otherwise the other masks would vanish from it.
    """
    single = row.count(row[position]) == 1
    before, after = ([i for i in part if i != pad_token_id] for part in (row[:position], row[position + 1 :]))
    found = tokens.tolist()
    sequences = tokenizer.decode_filled(before, found, after, skip_special_tokens=single)
    if pad_token_id in found:
        sequences[found.index(pad_token_id)] = tokenizer.decode([*before, *after], skip_special_tokens=single)
    words = tokenizer.decode_filled([], found, [], skip_special_tokens=False)
    return [
        {"score": score, "token": token, "token_str": word, "sequence": sequence}
        for score, token, word, sequence in zip(scores.tolist(), found, words, sequences, strict=True)
    ]


def check_mask(index: int, text: str, row: Sequence[int], tokenizer: "TextTokenizer") -> None:
    """Refuse a text whose token ids `row` hold no mask; `index` is the caller's number of the text.

    Raises:
        InputError: the text has no mask, or lost it by truncation.
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


def check_size(what: str, masks: Sequence[int], lengths: Sequence[int], top_k: int) -> None:
    """Refuse answers that would take too long and too much memory, before anything is computed.

    Args:
        what: the name of the texts in the error, such as "input 3".
        masks: the number of masks of each text.
        lengths: the number of tokens of each text.
        top_k: answers for each mask.

    Raises:
        InputError: the texts together have more than `MAX_ANSWERS` answers, or `MAX_ANSWER_TOKENS` tokens in them.
    """
    answers = sum(masks) * top_k
    tokens = sum(count * length for count, length in zip(masks, lengths, strict=True)) * top_k
    if answers > MAX_ANSWERS or tokens > MAX_ANSWER_TOKENS:
        raise InputError(
            f"{what} with {sum(masks):,} masks and top_k {top_k:,} would get {answers:,} answers with {tokens:,} "
            f"tokens; the limits are {MAX_ANSWERS:,} answers and {MAX_ANSWER_TOKENS:,} tokens. Lower top_k, or give "
            "shorter texts with fewer masks."
        )


def to_tensors(found: Sequence[Sequence[Sequence[MaskAnswer]]], width: int) -> dict[str, NDArray[Any]]:
    """Convert the answers for each mask of each row to the tensors of `SERVED`; `width` is K.

    `MASKS` [B, 1] counts the masks of a row; `TOKEN`, `TOKEN_ID`, `SCORE` and `SEQUENCE` are [B, M, K]. M is the
    largest number of masks in a row.
    """
    shape = (len(found), max(map(len, found)), width)
    tensors = {
        "MASKS": np.array([[len(masks)] for masks in found], dtype=np.int32),
        "TOKEN": np.full(shape, b"", dtype=np.object_),
        "TOKEN_ID": np.full(shape, -1, dtype=np.int64),
        "SCORE": np.zeros(shape, dtype=np.float32),
        "SEQUENCE": np.full(shape, b"", dtype=np.object_),
    }
    for row, masks in enumerate(found):
        for mask, best in enumerate(masks):
            tensors["TOKEN"][row, mask] = [answer["token_str"].encode() for answer in best]
            tensors["TOKEN_ID"][row, mask] = [answer["token"] for answer in best]
            tensors["SCORE"][row, mask] = [answer["score"] for answer in best]
            tensors["SEQUENCE"][row, mask] = [answer["sequence"].encode() for answer in best]
    return tensors


def from_tensors(tensors: Tensors) -> list[list[list[MaskAnswer]]]:
    """The answers that `to_tensors` was given."""
    counts = tensors["MASKS"][:, 0].tolist()
    return [[_answers_of(tensors, row, mask) for mask in range(count)] for row, count in enumerate(counts)]


def _answers_of(tensors: Tensors, row: int, mask: int) -> list[MaskAnswer]:
    columns = zip(
        tensors["SCORE"][row, mask].tolist(),
        tensors["TOKEN_ID"][row, mask].tolist(),
        tensors["TOKEN"][row, mask],
        tensors["SEQUENCE"][row, mask],
        strict=True,
    )
    return [
        {"score": score, "token": token, "token_str": text.decode(), "sequence": sequence.decode()}
        for score, token, text, sequence in columns
    ]


FILL_MASK = Task(
    name="fill-mask",
    outputs=("logits", HIDDEN),
    request=MaskRequest,
    method="fill_mask",
    architecture="ForMaskedLM",
    ensembles=(SERVED,),
    similarity="cosine",
)

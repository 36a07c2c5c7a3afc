"""The metrics of XTREME-R, in percent: F1 of tagged chunks, F1 and exact match of answers, mean average precision.

They are the metrics of the published table, which was made with seqeval, the rule of SQuAD 1.1 and trec_eval.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# --- tags -------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """A run of words with one type: words [start, stop) of sentences that are joined by one outside word each."""

    type: str
    start: int
    stop: int


def chunks(sentences: Sequence[Sequence[str]]) -> set[Chunk]:
    """Return the chunks of tagged sentences, as seqeval and conlleval find them.

    A tag is a letter and a type, as in B-LOC: B and S begin a chunk, E and S end it, a change of the type does both,
    and O is outside. XTREME scores tags of parts of speech in the same way, so that NOUN is read as the letter N and
    the type OUN, and neighbours of one type are one chunk. The tag X, of one letter, has the type of O: it ends no
    chunk and begins none, which is kept because the published scores were made so.
    """
    found, start = set(), 0
    words = [(tag[0], tag[1:].split("-", 1)[-1] or "_") for sentence in sentences for tag in (*sentence, "O")]
    for place, ((before, type_before), (letter, type_)) in enumerate(pairwise([("O", ""), *words])):
        changed = type_before != type_
        if before in "ES" or (before in "BI" and letter in "BSO") or (before not in "O." and changed):
            found.add(Chunk(type_before, start, place))
        if letter in "BS" or (before in "ESO" and letter in "EI") or (letter not in "O." and changed):
            start = place
    return found


def chunk_f1(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Return the F1 of the chunks of all sentences together, in percent; 0 if none is right."""
    found, expected = chunks(predictions), chunks(labels)
    return 100 * 2 * len(found & expected) / max(1, len(found) + len(expected))


# --- answers ----------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_words(text: str) -> list[str]:
    """Return the words of an answer that SQuAD 1.1 compares: lower-case, without English articles and punctuation."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """Return the F1 of the words against the best of the references, in percent."""
    return 100 * max(_words_f1(answer_words(answer), answer_words(reference)) for reference in references)


def answer_match(answer: str, references: Sequence[str]) -> float:
    """Return 100 if the words are those of one of the references, else 0."""
    return 100.0 * any(answer_words(answer) == answer_words(reference) for reference in references)


def _words_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    same = (Counter(ours) & Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


# --- retrieval --------------------------------------------------------------------------------------------------------


def mean_average_precision(
    ranked: Sequence[Sequence[int]] | NDArray, relevant: Sequence[Collection[int]], *, top: int
) -> float:
    """Return the mean average precision of rankings that are cut at `top`, in percent, as trec_eval's map_cut.

    Args:
        ranked: for each query the documents, the best first.
        relevant: for each query its relevant documents, at least one. The sum of precisions is divided by their number,
            even if it is above `top`.
        top: number of documents that count.
    """
    values = []
    for documents, wanted in zip(ranked, relevant, strict=True):
        hits = np.array([document in wanted for document in documents[:top]], dtype=np.float64)
        precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        values.append(float(np.sum(hits * precisions)) / len(wanted))
    return 100 * float(np.mean(values))

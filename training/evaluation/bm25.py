"""BM25, the baseline of retrieval: documents ranked by their words, without a model."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")


class BM25:
    """An index of documents by their words.

    score(q, d) = sum over the words w of q of idf(w) * f / (f + k1 * (1 - b + b * |d| / mean|d|)), where f counts w in
    d and idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5)) with n of N documents that have w (Robertson and Zaragoza 2009,
    with Lucene's idf). Words are lower-cased runs of letters and digits, without stemming and stop words.

    Args:
        documents: the texts.
        k1: how soon repetitions of a word stop counting.
        b: how much the length of a document counts, from 0 to 1.
    """

    def __init__(self, documents: Sequence[str], *, k1: float = 0.9, b: float = 0.4) -> None:
        self._count = len(documents)
        # Arrays of C integers: a long text has a thousand different words, and lists would take eight times the memory.
        places: dict[str, array[int]] = {}
        times: dict[str, array[int]] = {}
        lengths = np.zeros(self._count)
        for number, text in enumerate(documents):
            words = words_of(text)
            lengths[number] = len(words)
            for word, frequency in Counter(words).items():
                if word not in places:
                    places[word], times[word] = array("i"), array("i")
                places[word].append(number)
                times[word].append(frequency)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean() if self._count else 1.0, 1e-9))
        self._weights: dict[str, tuple[NDArray[np.int32], NDArray[np.float64]]] = {}
        for word, numbers in places.items():
            having, f = np.array(numbers, np.int32), np.array(times[word], float)
            idf = math.log(1 + (self._count - len(having) + 0.5) / (len(having) + 0.5))
            self._weights[word] = having, idf * f / (f + norm[having])

    def scores(self, query: str) -> NDArray[np.float64]:
        """Return the score of each document, [N]; 0 where it shares no word with the query."""
        total = np.zeros(self._count)
        for word in words_of(query):
            if word in self._weights:
                numbers, weights = self._weights[word]
                total[numbers] += weights
        return total

    def search(self, query: str, top_k: int) -> list[tuple[int, float]]:
        """Return the numbers and scores of the best documents that share a word with the query, best first."""
        total = self.scores(query)
        order = np.argsort(-total, kind="stable")[:top_k]
        return [(int(i), float(total[i])) for i in order if total[i] > 0]


def words_of(text: str) -> list[str]:
    """Return the words of a text as BM25 counts them."""
    return _WORD.findall(text.lower())

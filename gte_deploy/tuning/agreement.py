"""How far two bundles agree on texts: measures for the answers of each task, and a line of each answer for people.

Shapes: N texts, D dimensions, L labels, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import TaskName
from gte_deploy.tasks.multi_vector import maxsim
from gte_deploy.tasks.similarity import similarity_matrix, similarity_of_pairs

_NAMED = 3  # the entries of an answer that a line for people names


@dataclass(frozen=True)
class Agreement:
    """The agreement of two bundles on texts.

    Args:
        measures: name of a measure -> its value; cosines, correlations and shares are 1 if both agree.
        texts: the agreement on each text; 1 if both give the same answer.
        answers: for each text, the answers of both bundles in a line for people.
    """

    measures: Mapping[str, float]
    texts: Sequence[float]
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Ground:
    """What two bundles are compared by.

    Args:
        task: the task whose answers both give.
        same_model: whether both come from the same weights, so that their numbers mean the same.
        notes: one sentence for each thing that cannot be compared.
    """

    task: TaskName
    same_model: bool
    notes: tuple[str, ...] = ()


def common_ground(a: Manifest, b: Manifest, *, same_tokenizer: bool) -> Ground:
    """Return what two bundles can be compared by.

    Raises:
        InputError: they have no answers in common; the message names the tasks, labels or tokenizers.
    """
    tasks = (a.spec.task, b.spec.task)
    task: TaskName
    if tasks[0] == tasks[1]:
        task = tasks[0]
    elif set(tasks) in ({"embed", "hybrid"}, {"sparse", "hybrid"}):
        task = next(name for name in tasks if name != "hybrid")
    else:
        raise InputError(
            f"A is for {tasks[0]} and B for {tasks[1]}, whose answers cannot be compared. Give two bundles for one "
            "task; hybrid can be compared with embed and with sparse, too."
        )
    needs_tokens = task in ("fill-mask", "token-classify", "sparse", "hybrid", "multi-vector")
    if needs_tokens and not same_tokenizer:
        raise InputError(f"A and B have different tokenizers, so their answers for {task} are about different tokens")
    if task in ("classify", "token-classify") and dict(a.spec.id2label) != dict(b.spec.id2label):
        labels = " and ".join(", ".join(found.spec.id2label.values()) or "none" for found in (a, b))
        raise InputError(f"A and B have different labels, so their answers cannot be compared: {labels}")
    same = a.source.get("sha256") == b.source.get("sha256") and "sha256" in a.source
    same = same and a.spec.embedding_width == b.spec.embedding_width
    notes = []
    if task == "embed" and tasks[0] != tasks[1]:
        notes.append("One bundle is hybrid: its dense embeddings are compared.")
    if task == "sparse" and tasks[0] != tasks[1]:
        notes.append("One bundle is hybrid: its sparse embeddings are compared.")
    if not same and task in ("embed", "hybrid", "multi-vector"):
        notes.append(
            "A and B come from different weights, so the cosine between their vectors says nothing: only the order of "
            "the texts by similarity is compared."
        )
    return Ground(task, same, tuple(notes))


def agreement(ground: Ground, a: Any, b: Any) -> Agreement:
    """Compare the answers of two bundles, as `answers_of` returns them."""
    return _COMPARED[ground.task](a, b, ground)


def answers_of(model: Any, task: TaskName, texts: Sequence[Any]) -> Any:
    """Return the answers of a loaded model, with the checkpoint's own prompts; too long texts are cut.

    For classify, a text may be a pair.
    """
    cut = {"truncation": True}
    if task == "fill-mask":
        found = model.fill_mask(texts, **cut)
        found = found if len(texts) > 1 else [found]
        return [each if isinstance(each[0], list) else [each] for each in found]
    if task == "classify":
        pairs = [[text] if isinstance(text, str) else list(text) for text in texts]
        return np.asarray(model.predict(pairs, **cut), np.float64).reshape(len(texts), -1), pairs
    if task == "token-classify":
        return model.classify_tokens(list(texts), ignore_labels=(), **cut)
    if task == "sparse":
        return [dict(pairs) for pairs in model.encode_sparse(list(texts), as_dict=True, **cut)]
    if task == "hybrid":
        both = model.encode_hybrid(list(texts), as_dict=True, **cut)
        return np.asarray(both.dense, np.float64), [dict(pairs) for pairs in both.sparse]
    if task == "multi-vector":
        return [np.asarray(each, np.float64) for each in model.encode_document(list(texts), **cut)]
    return np.asarray(model.encode(list(texts), **cut), np.float64)


def _embeddings(a: NDArray[np.float64], b: NDArray[np.float64], ground: Ground) -> Agreement:
    near = [similarity_matrix(side, side, "cosine") for side in (a, b)]
    cosines = similarity_of_pairs(a, b, "cosine") if ground.same_model else None
    return Agreement({**_vector_measures(cosines), **_order(*near)}, _per_text(cosines, near), _neighbours(*near))


def _multi_vectors(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]], ground: Ground) -> Agreement:
    # A token's share of the score, because long queries have larger sums.
    near = [maxsim(side, side) / np.array([[max(1, len(query))] for query in side], np.float64) for side in (a, b)]
    per_text = None
    if ground.same_model:
        per_text = np.array(
            [
                similarity_of_pairs(x, y, "cosine").min() if len(x) == len(y) and len(x) else 0.0
                for x, y in zip(a, b, strict=True)
            ]
        )
    return Agreement({**_vector_measures(per_text), **_order(*near)}, _per_text(per_text, near), _neighbours(*near))


def _sparse(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]], ground: Ground) -> Agreement:
    cosines = np.array([_sparse_cosine(x, y) for x, y in zip(a, b, strict=True)])
    shared = [_overlap(_heaviest(x, 10), _heaviest(y, 10)) for x, y in zip(a, b, strict=True)]
    lines = [(_weights(x), _weights(y)) for x, y in zip(a, b, strict=True)]
    return Agreement({**_vector_measures(cosines), "top10_overlap": float(np.mean(shared))}, cosines.tolist(), lines)


def _hybrids(a: Any, b: Any, ground: Ground) -> Agreement:
    dense, sparse = _embeddings(a[0], b[0], ground), _sparse(a[1], b[1], ground)
    measures = {f"dense_{name}": value for name, value in dense.measures.items()}
    measures |= {f"sparse_{name}": value for name, value in sparse.measures.items()}
    return Agreement(measures, np.minimum(dense.texts, sparse.texts).tolist(), sparse.answers)


def _masks(a: Sequence[Any], b: Sequence[Any], ground: Ground) -> Agreement:
    def words(masks: Any) -> list[list[int]]:
        return [[found["token"] for found in candidates] for candidates in masks]

    best, five, texts, lines = [], [], [], []
    for x, y in zip(a, b, strict=True):
        pairs = list(zip(words(x), words(y), strict=True))
        best += [p[0] == q[0] for p, q in pairs]
        five += [_overlap(p, q) for p, q in pairs]
        texts.append(float(np.mean([_overlap(p, q) if p[0] == q[0] else _overlap(p, q) - 1 for p, q in pairs])))
        lines.append((_candidates(x), _candidates(y)))
    return Agreement({"same_best_word": float(np.mean(best)), "top5_overlap": float(np.mean(five))}, texts, lines)


def _scores(a: Any, b: Any, ground: Ground) -> Agreement:
    (x, pairs), (y, _) = a, b
    difference = np.abs(x - y).max(axis=1)
    measures = {"score_difference_max": float(difference.max()), "score_difference_mean": float(difference.mean())}
    if x.shape[1] > 1:
        measures["same_label"] = float(np.mean(x.argmax(axis=1) == y.argmax(axis=1)))
        lines = [
            (f"label {p.argmax()} {p.max():.4f}", f"label {q.argmax()} {q.max():.4f}")
            for p, q in zip(x, y, strict=True)
        ]
        return Agreement(measures, (1 - difference).tolist(), lines)
    queries: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        queries.setdefault(pair[0] if len(pair) > 1 else "", []).append(number)
    ranked = [rows for rows in queries.values() if len(rows) > 1]
    if ranked:
        measures["same_best_document"] = float(np.mean([x[rows, 0].argmax() == y[rows, 0].argmax() for rows in ranked]))
        measures["rank_correlation"] = float(np.mean([rank_correlation(x[rows, 0], y[rows, 0]) for rows in ranked]))
    lines = [(f"{p:.4f}", f"{q:.4f}") for p, q in zip(x[:, 0], y[:, 0], strict=True)]
    return Agreement(measures, (1 - difference).tolist(), lines)


def _labels(a: Sequence[Any], b: Sequence[Any], ground: Ground) -> Agreement:
    same, texts, lines = [], [], []
    for x, y in zip(a, b, strict=True):
        equal = [p["entity"] == q["entity"] for p, q in zip(x, y, strict=True)]
        same += equal
        texts.append(float(np.mean(equal)) if equal else 1.0)
        lines.append((_entities(x), _entities(y)))
    return Agreement({"same_label": float(np.mean(same))}, texts, lines)


_COMPARED: Mapping[TaskName, Callable[[Any, Any, Ground], Agreement]] = {
    "fill-mask": _masks,
    "embed": _embeddings,
    "classify": _scores,
    "token-classify": _labels,
    "sparse": _sparse,
    "hybrid": _hybrids,
    "multi-vector": _multi_vectors,
}


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Spearman's correlation of two lists of at least two numbers; equal numbers share their mean rank.

    It is 1 if both lists are constant, and 0 if one of them is.
    """
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    norms = [float(np.linalg.norm(each)) for each in ranks]
    if min(norms) == 0:
        return 1.0 if max(norms) == 0 else 0.0
    return float(ranks[0] @ ranks[1] / (norms[0] * norms[1]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[places], np.float64)


def _vector_measures(cosines: NDArray[np.float64] | None) -> dict[str, float]:
    return {} if cosines is None else {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}


def _order(a: NDArray[np.float64], b: NDArray[np.float64]) -> dict[str, float]:
    """Return how far two matrices of similarities [N, N] order the texts alike."""
    if len(a) < 3:
        return {}
    above = np.triu_indices(len(a), 1)
    nearest = [_without_itself(side).argmax(axis=1) for side in (a, b)]
    return {
        "rank_correlation": rank_correlation(a[above], b[above]),
        "same_nearest_text": float(np.mean(nearest[0] == nearest[1])),
    }


def _per_text(cosines: NDArray[np.float64] | None, near: Sequence[NDArray[np.float64]]) -> list[float]:
    if cosines is not None:
        return cosines.tolist()
    if len(near[0]) < 3:
        return [1.0] * len(near[0])
    others = [[np.delete(side[row], row) for row in range(len(side))] for side in near]
    return [rank_correlation(x, y) for x, y in zip(*others, strict=True)]


def _without_itself(similar: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.eye(len(similar), dtype=bool), -np.inf, similar)


def _neighbours(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[tuple[str, str]]:
    if len(a) < 2:
        return [("", "")] * len(a)
    lines = []
    for x, y in zip(_without_itself(a), _without_itself(b), strict=True):
        p, q = (f"nearest: text {row.argmax() + 1} ({row.max():.4f})" for row in (x, y))
        lines.append((p, q))
    return lines


def _sparse_cosine(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    if not a and not b:
        return 1.0
    norms = np.linalg.norm(list(a.values())) * np.linalg.norm(list(b.values())) if a and b else 0.0
    return float(sum(weight * b.get(word, 0.0) for word, weight in a.items()) / norms) if norms else 0.0


def _heaviest(weights: Mapping[str, float], number: int) -> list[str]:
    return sorted(weights, key=lambda word: -weights[word])[:number]


def _overlap(a: Sequence[Any], b: Sequence[Any]) -> float:
    return len(set(a) & set(b)) / max(len(set(a)), len(set(b)), 1) if a or b else 1.0


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{word} {weights[word]:.2f}" for word in _heaviest(weights, _NAMED)) or "no weights"


def _candidates(masks: Any) -> str:
    return "; ".join(
        ", ".join(f"{found['token_str']} {found['score']:.2f}" for found in candidates[:_NAMED]) for candidates in masks
    )


def _entities(tokens: Sequence[Mapping[str, Any]]) -> str:
    named = [f"{token['word']} {token['entity']}" for token in tokens if token["entity"] != "O"]
    return ", ".join(named[: 2 * _NAMED]) or "no labels"

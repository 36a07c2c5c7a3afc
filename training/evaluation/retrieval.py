"""Retrieval of documents: nDCG, recall and MRR of embedding models, sparse models and rerankers, against BM25.

The figures are means over the queries, with bootstrap intervals, and each model's difference to the first row.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import NonFiniteError
from gte_deploy.training.evaluation.bm25 import BM25
from gte_deploy.training.evaluation.retrieval_sets import RetrievalSet
from gte_deploy.training.finetune.options import FineTuneKind, RetrievalOptions
from gte_deploy.training.options import RankingModelOptions

if TYPE_CHECKING:
    import torch

Ranking = dict[str, list[tuple[str, float]]]
"""Query id -> ids and scores of its documents, best first."""

OpenModel = Callable[[str, RankingModelOptions], AbstractContextManager[tuple[FineTuneKind, Any]]]
"""Opens a model for ranking: its kind, and the model with the methods that `rank_by_model` calls."""

_BASELINE = "bm25"
_CHUNK = 20_000  # documents whose embeddings are held at once
_QUERIES = 256  # queries that are compared with them at once
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """The mean of a metric over the queries, with the bounds of its interval at 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RetrievalRow:
    """The figures of one model.

    Args:
        name: the model, or "bm25".
        kind: "embed", "sparse", "rerank" or "bm25".
        figures: metric, such as "ndcg@10" -> its mean.
        differences: metric -> the mean of the paired difference to the first row; empty for the first row.
    """

    name: str
    kind: str
    figures: Mapping[str, Figure]
    differences: Mapping[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        shown = {key: {name: vars(f) for name, f in getattr(self, key).items()} for key in ("figures", "differences")}
        return {"model": self.name, "kind": self.kind, **shown}


def evaluate_retrieval(
    models: Sequence[str],
    data: RetrievalSet,
    *,
    options: RetrievalOptions | None = None,
    progress: bool = False,
    open_model: OpenModel | None = None,
) -> list[RetrievalRow]:
    """Evaluate BM25 and models on a retrieval set.

    Args:
        models: folders or hub ids of checkpoints, or whatever `open_model` opens.
        data: the retrieval set.
        options: metrics, depths and device.
        progress: whether lines on stderr tell what is computed.
        open_model: opens a model by its name; None is `open_to_rank`.

    Returns:
        a row for BM25, and one for each model.

    Raises:
        CheckpointError: a model cannot be loaded.
        ConfigError: a model is for another task.
    """
    options = options or RetrievalOptions()
    if options.max_queries is not None:
        data = data.drawn(options.max_queries, seed=options.seed)
    first = rank_by_words(data, max(options.rerank_depth, *options.recall_at, options.top_k))
    values: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    values[_BASELINE, _BASELINE] = query_metrics(first, data, options)
    for name in dict.fromkeys(models):
        if progress:
            print(f"{name}: {len(data.judged):,} queries, {len(data.corpus):,} documents", file=sys.stderr, flush=True)
        with (open_model or open_to_rank)(name, options) as (kind, model):
            values[name, kind] = query_metrics(rank_by_model(kind, model, data, options, first=first), data, options)
    (_, baseline), *_ = values.items()
    rows = []
    for number, ((name, of), metrics) in enumerate(values.items()):
        figures = {metric: _figure(per_query, options) for metric, per_query in metrics.items()}
        paired = {m: _figure(v - baseline[m], options) for m, v in metrics.items()} if number else {}
        rows.append(RetrievalRow(name, of, figures, paired))
    return rows


def rank_by_words(data: RetrievalSet, depth: int) -> Ranking:
    """Rank the documents of each judged query by BM25, down to `depth`."""
    ids, index = list(data.corpus), BM25(list(data.corpus.values()))
    return {
        query: [(ids[i], score) for i, score in index.search(data.queries[query], depth + 1) if ids[i] != query][:depth]
        for query in data.judged
    }


def rank_by_model(
    kind: FineTuneKind, model: Any, data: RetrievalSet, options: RetrievalOptions, *, first: Ranking | None = None
) -> Ranking:
    """Rank the documents of each judged query by a model of sentence-transformers.

    Args:
        kind: the kind of the model.
        model: a SentenceTransformer, SparseEncoder or CrossEncoder, or a model of gte_deploy, which has their methods.
        data: the retrieval set.
        options: depth and batch size.
        first: the ranking whose best documents a reranker orders; None takes BM25's.
    """
    if kind == "rerank":
        return _rank_pairs(model, data, options, first or rank_by_words(data, options.rerank_depth))
    return _rank_embeddings(model, data, options)


def query_metrics(ranking: Ranking, data: RetrievalSet, options: RetrievalOptions) -> dict[str, NDArray[np.float64]]:
    """Compute the metrics of each judged query, in the order of `data.judged`.

    nDCG@k = DCG / ideal DCG with DCG = sum of relevance / log2(rank + 1), as in trec_eval; MRR@k is 1 / rank of the
    first relevant document; recall@k is the share of the relevant documents.
    """
    k, names = options.top_k, data.judged
    found: dict[str, list[float]] = {f"ndcg@{k}": [], f"mrr@{k}": [], **{f"recall@{r}": [] for r in options.recall_at}}
    for query in names:
        relevance = {i: value for i, value in data.qrels[query].items() if value > 0}
        gains = [relevance.get(document, 0.0) for document, _ in ranking.get(query, [])]
        ideal = _discounted(sorted(relevance.values(), reverse=True)[:k])
        found[f"ndcg@{k}"].append(_discounted(gains[:k]) / ideal)
        found[f"mrr@{k}"].append(next((1 / rank for rank, gain in enumerate(gains[:k], 1) if gain > 0), 0.0))
        for r in options.recall_at:
            found[f"recall@{r}"].append(sum(gain > 0 for gain in gains[:r]) / len(relevance))
    return {name: np.array(values) for name, values in found.items()}


def table(rows: Sequence[RetrievalRow], data: RetrievalSet) -> str:
    """Format the rows for people: means, the intervals of the first metric, and its difference to the first row."""
    metrics = list(rows[0].figures)
    main = metrics[0]
    width = max(len(row.name) for row in rows)
    lines = [f"{len(data.judged):,} queries, {len(data.corpus):,} documents; intervals at 95 %, bootstrap over queries"]
    head = "".join(f"{name:>11}" for name in metrics)
    lines.append(
        f"{'model':{width}}  {'kind':6}{head}  {f'{main}, interval':>18}  {f'difference to {rows[0].name}':>26}"
    )
    for row in rows:
        means = "".join(f"{row.figures[name].mean:11.4f}" for name in metrics)
        figure = row.figures[main]
        interval = f"[{figure.low:.4f}, {figure.high:.4f}]"
        difference = ""
        if row.differences:
            paired = row.differences[main]
            difference = f"{paired.mean:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]"
        lines.append(f"{row.name:{width}}  {row.kind:6}{means}  {interval:>18}  {difference:>26}".rstrip())
    return "\n".join(lines)


@contextlib.contextmanager
def open_to_rank(name: str, options: RankingModelOptions) -> Iterator[tuple[FineTuneKind, Any]]:
    """Open a checkpoint with sentence-transformers; see `open_trained`. Texts that are too long are cut."""
    from gte_deploy.training.finetune.opening import open_trained

    yield open_trained(name, max_length=options.max_length, device=options.device)


def _rank_pairs(model: Any, data: RetrievalSet, options: RetrievalOptions, first: Ranking) -> Ranking:
    depth = options.rerank_depth
    pairs = [
        (query, document, (data.queries[query], data.corpus[document]))
        for query in data.judged
        for document, _ in first[query][:depth]
    ]
    texts = [texts for _, _, texts in pairs]
    scores = model.predict(texts, batch_size=options.batch_size, show_progress_bar=False) if texts else []
    ranking: Ranking = {query: [] for query in data.judged}
    for (query, document, _), score in zip(pairs, scores, strict=True):
        ranking[query].append((document, float(score)))
    return {query: sorted(found, key=lambda item: -item[1]) for query, found in ranking.items()}


def _rank_embeddings(model: Any, data: RetrievalSet, options: RetrievalOptions) -> Ranking:
    import torch

    depth = max(options.top_k, *options.recall_at)
    rest: dict[str, Any] = {"batch_size": options.batch_size, "show_progress_bar": False, "convert_to_tensor": True}
    ids, names = list(data.corpus), data.judged
    queries = model.encode_query([data.queries[name] for name in names], **rest)
    best: Ranking = {name: [] for name in names}
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        documents = model.encode_document([data.corpus[i] for i in chunk], **rest)
        for row, values in enumerate(_similarities(model, queries, documents)):
            top = torch.topk(values, min(depth + 1, len(chunk)))
            found = [(chunk[i], score) for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
            merged = best[names[row]] + [item for item in found if item[0] != names[row]]
            best[names[row]] = sorted(merged, key=lambda item: -item[1])[:depth]
    return best


def _similarities(model: Any, queries: torch.Tensor, documents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the similarities of each query with all documents, [N] float32."""
    import torch

    numbers = torch.arange(queries.shape[0], device=queries.device)
    for part in numbers.split(_QUERIES):
        scores = model.similarity(queries.index_select(0, part), documents)
        scores = (scores.to_dense() if scores.is_sparse else scores).float().cpu()
        if not scores.isfinite().all():
            raise NonFiniteError("the model computes NaN or Inf; its training has diverged, or its weights are damaged")
        yield from scores


def _figure(values: NDArray[np.float64], options: RetrievalOptions) -> Figure:
    """The mean of values of queries, and its percentile bootstrap interval."""
    generator = np.random.default_rng(options.seed)
    # One sample at a time: thousands of queries times thousands of samples need not lie in memory at once.
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(options.resamples)]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Figure(float(values.mean()), float(low), float(high))


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))

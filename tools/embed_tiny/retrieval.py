"""Measure embedding models and BM25 on the retrieval tests that `pairs.py` wrote.

    python tools/embed_tiny/retrieval.py data bm25 models/builtin/gte_en_mlm_tiny runs/embed/model bundle

A model is `bm25`, a folder of sentence-transformers, a folder of an encoder alone (pooled by the mean), or a bundle of
`gte-export`, which gte_deploy runs. The script prints one JSON object: for each model and test nDCG@10, recall@10 and
accuracy@1. Rankings are exact, by cosine. sentence-transformers computes the figures of all models from the rankings.
"""

import argparse
import csv
import json
import logging
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.feature_extraction.text import CountVectorizer

import gte_deploy

logger = logging.getLogger(__name__)

DEPTH = 10
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class RetrievalTest:
    """A test in BEIR's layout: queries and documents by their ids, and the relevant documents of each query."""

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, set[str]]


def read_test(folder: Path, *, sample: int | None = None) -> RetrievalTest:
    """Read a test; or of a large one the first `sample` queries, their documents, and as many others."""
    queries, documents = (_read_texts(folder / name) for name in ("queries.jsonl", "corpus.jsonl"))
    asked = dict(list(queries.items())[:sample])
    relevant: dict[str, set[str]] = defaultdict(set)
    with open(folder / "qrels" / "test.tsv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["query-id"] in asked and int(row["score"]) > 0:
                relevant[row["query-id"]].add(row["corpus-id"])
    kept = set(documents if sample is None else list(documents)[-sample:]).union(*relevant.values())
    return RetrievalTest(asked, {key: text for key, text in documents.items() if key in kept}, dict(relevant))


def _read_texts(file: Path) -> dict[str, str]:
    with open(file, encoding="utf-8") as lines:
        return {record["_id"]: record["text"] for record in map(json.loads, lines)}


def bm25_scores(
    queries: list[str], documents: list[str], *, k1: float = 1.2, b: float = 0.75
) -> scipy.sparse.csr_array:
    """Score documents by BM25 as Lucene does: [queries, documents].

    A term t of a query adds idf(t) * f / (f + k1 * (1 - b + b * length / mean length)), where f is its frequency in the
    document and idf = log(1 + (N - n + 0.5) / (n + 0.5)) for n of N documents (Kamphuis et al. 2020, "Lucene
    (accurate)", which leaves out the constant factor k1 + 1). Words are sequences of letters and digits in lower case;
    English stop words are left out.
    """
    vectorizer = CountVectorizer(stop_words="english", token_pattern=r"(?u)\b\w+\b")
    counts = scipy.sparse.csr_array(vectorizer.fit_transform(documents), dtype=np.float64)
    lengths = counts.sum(axis=1)
    norms = k1 * (1 - b + b * lengths / lengths.mean())
    containing = np.diff(counts.tocsc().indptr)
    idf = np.log1p((len(documents) - containing + 0.5) / (containing + 0.5))
    rows = np.repeat(np.arange(len(documents)), np.diff(counts.indptr))
    counts.data = idf[counts.indices] * counts.data / (counts.data + norms[rows])
    asked = scipy.sparse.csr_array(vectorizer.transform(queries), dtype=np.float64)
    return scipy.sparse.csr_array(asked @ counts.T)


def rank(scores: np.ndarray, ids: list[str]) -> list[list[dict[str, Any]]]:
    """Return the best documents of each row of scores [queries, documents], in the form that the evaluator takes."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return [
        [{"corpus_id": ids[column], "score": float(row[column])} for column in columns if row[column] > -np.inf]
        for row, columns in zip(scores, best, strict=True)
    ]


def rank_all(model: str, test: RetrievalTest) -> list[list[dict[str, Any]]]:
    """Rank the documents of a test for each of its queries."""
    queries, documents, ids = list(test.queries.values()), list(test.documents.values()), list(test.documents)
    hits = []
    if model == "bm25":
        sparse = bm25_scores(queries, documents)
        for begin in range(0, len(queries), _QUERIES_AT_ONCE):
            scores = sparse[begin : begin + _QUERIES_AT_ONCE].toarray()
            hits += rank(np.where(scores > 0, scores, -np.inf), ids)  # a document without a word of the query is no hit
        return hits
    vectors = embed([*queries, *documents], model)
    for begin in range(0, len(queries), _QUERIES_AT_ONCE):
        asked = vectors[begin : min(begin + _QUERIES_AT_ONCE, len(queries))]
        hits += rank(asked @ vectors[len(queries) :].T, ids)
    return hits


def embed(texts: list[str], model: str) -> np.ndarray:
    """Embed texts with a bundle or a folder of sentence-transformers: [texts, dimensions] float32 of length 1."""
    if (Path(model) / "manifest.json").exists():
        with gte_deploy.load(model) as loaded:
            return np.asarray(loaded.encode(texts, normalize_embeddings=True))
    encoder = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": torch.float32})
    return encoder.encode(texts, batch_size=32, normalize_embeddings=True, convert_to_numpy=True)


def measure(model: str, test: RetrievalTest) -> dict[str, float]:
    """Return nDCG@10, recall@10 and accuracy@1 of a model on a test, and the seconds that it took."""
    began = time.perf_counter()
    evaluator = InformationRetrievalEvaluator(
        dict[str, Any](test.queries),
        dict[str, Any](test.documents),
        test.relevant,
        mrr_at_k=[DEPTH],
        ndcg_at_k=[DEPTH],
        accuracy_at_k=[1],
        precision_recall_at_k=[DEPTH],
        map_at_k=[DEPTH],
        write_csv=False,
    )
    by_query = dict(zip(test.queries, rank_all(model, test), strict=True))
    found = evaluator.compute_metrics([by_query[query] for query in evaluator.queries_ids])
    return {
        "ndcg@10": float(found["ndcg@k"][DEPTH]),
        "recall@10": float(found["recall@k"][DEPTH]),
        "accuracy@1": float(found["accuracy@k"][1]),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Measure each model on each test."""
    parser = argparse.ArgumentParser(description="Measure embedding models and BM25 on the retrieval tests.")
    parser.add_argument("data", type=Path, help="folder that pairs.py wrote")
    parser.add_argument("models", nargs="+", help="bm25, folders of sentence-transformers, or bundles")
    parser.add_argument("--sample", type=int, help="number of queries of each test, with few documents (default: all)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parser.parse_args()
    result: dict[str, Any] = defaultdict(dict)
    for folder in sorted((arguments.data / "tests").iterdir()):
        test = read_test(folder, sample=arguments.sample)
        for model in arguments.models:
            result[model][folder.name] = found = measure(model, test)
            logger.info("%s %s: %s", model, folder.name, " ".join(f"{k} {v:.3f}" for k, v in found.items()))
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

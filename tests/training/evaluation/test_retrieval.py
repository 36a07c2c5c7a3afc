"""Retrieval: BM25 by its formula, metrics by scikit-learn and sentence-transformers, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from factories import SPELLING, make_checkpoint
from gte_deploy.core.errors import InputError
from gte_deploy.core.exit_codes import OK, USAGE
from gte_deploy.exporters.export import export
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation.bm25 import BM25
from gte_deploy.training.evaluation.retrieval import (
    evaluate_retrieval,
    query_metrics,
    rank_by_model,
    rank_by_words,
    table,
)
from gte_deploy.training.evaluation.retrieval_sets import RetrievalSet, read_retrieval_set
from gte_deploy.training.finetune.opening import open_trained
from gte_deploy.training.finetune.options import RetrievalOptions

DOCUMENTS = {
    "d1": "The old river is old, and the city is near.",
    "d2": "a city",
    "d3": "A man and his dog: the dog is old",
    "d4": "nothing of it",
    "d5": "the river in the city",
}
QUERIES = {"q1": "old river", "q2": "the dog", "q3": "unknown words", "q4": "city"}
QRELS = {"q1": {"d1": 2.0, "d5": 1.0}, "q2": {"d3": 1.0}, "q4": {"d2": 1.0, "d4": 0.0}}
DATA = RetrievalSet(DOCUMENTS, QUERIES, QRELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The set above in the layout of BEIR; d2 has its text in the title."""
    made = tmp_path_factory.mktemp("beir")
    documents = [{"_id": i, "text": text} for i, text in DOCUMENTS.items()]
    documents[1] = {"_id": "d2", "title": "a", "text": "city"}
    (made / "corpus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    queries = [{"_id": i, "text": text} for i, text in QUERIES.items()]
    (made / "queries.jsonl").write_text("".join(json.dumps(each) + "\n" for each in queries))
    (made / "qrels").mkdir()
    lines = [f"{q}\t{d}\t{score:g}" for q, found in QRELS.items() for d, score in found.items()]
    (made / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return made


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("embedder"),
        task="embed",
        layout="native",
        vocab=SPELLING,
        pooling="cls",
        normalize=True,
    )


def test_bm25_is_its_formula():
    texts = list(DOCUMENTS.values())
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, words)) / len(words)
    for query in ("old river", "the dog dog", "nothing here"):
        expected = []
        for document in words:
            score = 0.0
            for word in query.split():
                f, n = document.count(word), sum(word in other for other in words)
                idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
                score += idf * f / (f + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean)) if f else 0.0
            expected.append(score)
        index = BM25(texts, k1=1.2, b=0.75)
        np.testing.assert_allclose(index.scores(query), expected, rtol=1e-12)
        found = index.search(query, 3)
        assert [score for _, score in found] == sorted((s for s in expected if s > 0), reverse=True)[:3]


def test_a_set_is_read_as_it_is_written(folder):
    found = read_retrieval_set(folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv")
    assert found == DATA and found.judged == ["q1", "q2", "q4"]


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    ids = [f"d{i}" for i in range(30)]
    qrels = {f"q{i}": {str(d): float(rng.integers(0, 4)) for d in rng.choice(ids, 8, replace=False)} for i in range(20)}
    data = RetrievalSet({i: i for i in ids}, {q: q for q in qrels}, qrels)
    scores = {q: rng.permutation(len(ids)).astype(float) for q in qrels}
    ranking = {q: [(ids[i], s[i]) for i in np.argsort(-s)] for q, s in scores.items()}
    found = query_metrics(ranking, data, RetrievalOptions(top_k=10, recall_at=(3,)))
    for row, query in enumerate(data.judged):
        relevance = np.array([qrels[query].get(i, 0.0) for i in ids])
        assert found["ndcg@10"][row] == pytest.approx(ndcg_score([relevance], [scores[query]], k=10), rel=1e-9)
        order = relevance[np.argsort(-scores[query])]
        assert found["recall@3"][row] == pytest.approx((order[:3] > 0).sum() / (relevance > 0).sum())
        first = int(np.argmax(order > 0))
        assert found["mrr@10"][row] == pytest.approx(1 / (first + 1) if first < 10 else 0.0)


def test_embeddings_rank_as_sentence_transformers_does(embedder):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    kind, model = open_trained(str(embedder), device="cpu")
    options = RetrievalOptions(top_k=3, recall_at=(1, 3))
    relevant = {q: {d for d, score in found.items() if score > 0} for q, found in QRELS.items()}
    binary = RetrievalSet(DOCUMENTS, QUERIES, {q: dict.fromkeys(found, 1.0) for q, found in relevant.items()})
    ours = {
        name: v.mean()
        for name, v in query_metrics(rank_by_model(kind, model, binary, options), binary, options).items()
    }
    evaluator = InformationRetrievalEvaluator(
        {q: QUERIES[q] for q in relevant},
        DOCUMENTS,
        relevant,
        mrr_at_k=[3],
        ndcg_at_k=[3],
        accuracy_at_k=[3],
        precision_recall_at_k=[1, 3],
        map_at_k=[3],
    )
    theirs = evaluator(model)
    for name in ("ndcg@3", "mrr@3", "recall@1", "recall@3"):
        assert ours[name] == pytest.approx(theirs[f"cosine_{name}"], abs=1e-9)


def test_chunks_of_documents_change_nothing(embedder, monkeypatch):
    from gte_deploy.training.evaluation import retrieval

    kind, model = open_trained(str(embedder), device="cpu")
    whole = rank_by_model(kind, model, DATA, RetrievalOptions(batch_size=1))
    monkeypatch.setattr(retrieval, "_CHUNK", 2)
    monkeypatch.setattr(retrieval, "_QUERIES", 1)
    parts = rank_by_model(kind, model, DATA, RetrievalOptions(batch_size=1))
    for query, found in whole.items():
        assert [document for document, _ in found] == [document for document, _ in parts[query]]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in parts[query]], atol=1e-6)


def test_a_bundle_ranks_as_its_checkpoint(embedder, folder, tmp_path, capsys):
    bundle = export(embedder, tmp_path / "bundle", max_length=32).path
    assert main(["retrieval", str(embedder), str(bundle), "--data", str(folder), "--json"]) == OK
    _, checkpoint, exported = json.loads(capsys.readouterr().out)
    assert (exported["model"], exported["kind"]) == (str(bundle), "embed")
    assert exported["figures"] == checkpoint["figures"]


def test_a_part_of_the_queries_is_drawn_by_the_seed():
    drawn = {seed: tuple(DATA.drawn(1, seed=seed).judged) for seed in range(20)}
    assert set(drawn.values()) == {("q1",), ("q2",), ("q4",)}
    assert DATA.drawn(1, seed=3).judged == list(drawn[3]) and DATA.drawn(1, seed=3).corpus == DOCUMENTS
    assert DATA.drawn(9, seed=0).judged == DATA.judged


def test_a_reranker_orders_the_best_of_bm25(tmp_path):
    folder = make_checkpoint(tmp_path / "reranker", task="classify", layout="original", vocab=SPELLING, num_labels=1)
    kind, model = open_trained(str(folder), device="cpu")
    first = rank_by_words(DATA, 2)
    found = rank_by_model(kind, model, DATA, RetrievalOptions(rerank_depth=2), first=first)
    assert kind == "rerank"
    for query, documents in found.items():
        assert {document for document, _ in documents} == {document for document, _ in first[query]}
        expected = model.predict([(QUERIES[query], DOCUMENTS[document]) for document, _ in documents])
        np.testing.assert_allclose([score for _, score in documents], expected, atol=1e-6)
        assert list(expected) == sorted(expected, reverse=True)


def test_rows_have_paired_differences_to_bm25(embedder):
    rows = evaluate_retrieval([str(embedder)], DATA, options=RetrievalOptions(device="cpu", resamples=200))
    baseline, model = rows
    assert (baseline.name, baseline.differences) == ("bm25", {})
    for metric, paired in model.differences.items():
        assert paired.mean == pytest.approx(model.figures[metric].mean - baseline.figures[metric].mean)
        assert paired.low <= paired.mean <= paired.high
    assert "difference to bm25" in table(rows, DATA)


def test_an_interval_covers_its_mean_as_often_as_it_says():
    """Of 300 samples of 200 coin tosses, 95 % of the intervals cover the coin's 0.3."""
    from gte_deploy.training.evaluation.retrieval import _figure

    rng = np.random.default_rng(1)
    options = RetrievalOptions(resamples=200)
    found = [_figure((rng.random(200) < 0.3).astype(float), options) for _ in range(300)]
    assert 0.91 <= np.mean([figure.low <= 0.3 <= figure.high for figure in found]) <= 0.98


def test_the_command_prints_a_table_or_json(folder, embedder, tmp_path, capsys):
    command = ["retrieval", str(embedder), "--data", str(folder), "--device", "cpu", "--resamples", "50"]
    assert main([*command, "-o", str(tmp_path / "result.json")]) == OK
    said = capsys.readouterr().out
    assert said.startswith("3 queries, 5 documents") and str(embedder) in said
    assert main([*command, "--json"]) == OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert [row["kind"] for row in printed] == ["bm25", "embed"]


def test_what_cannot_be_read_is_refused(folder, tmp_path, capsys):
    assert main(["retrieval", "--queries", str(folder / "queries.jsonl")]) == USAGE
    assert "--corpus, --qrels too" in capsys.readouterr().err
    (tmp_path / "no_id.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "no_header.tsv").write_text("q1\td1\t1\n")
    (tmp_path / "no_score.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\thigh\n")
    (tmp_path / "others.tsv").write_text("query-id\tcorpus-id\tscore\nq9\td1\t1\n")
    good = folder / "corpus.jsonl", folder / "queries.jsonl"
    for arguments, message in (
        ((tmp_path / "no_id.jsonl", good[1], folder / "qrels" / "test.tsv"), "no_id.jsonl:1: expected the field _id"),
        ((tmp_path / "nowhere.jsonl", good[1], folder / "qrels" / "test.tsv"), "nowhere.jsonl cannot be read"),
        ((*good, tmp_path / "no_header.tsv"), "the first line has no query-id"),
        ((*good, tmp_path / "no_score.tsv"), "no_score.tsv:2: the score is 'high'"),
        ((*good, tmp_path / "others.tsv"), "no query has a relevant document"),
    ):
        with pytest.raises(InputError) as refused:
            read_retrieval_set(*arguments)
        assert message in str(refused.value)

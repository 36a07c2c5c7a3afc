"""The adapters of MTEB: the scores of small tasks equal those that MTEB gives sentence-transformers' own models.

MTEB's data sets lie on the hub, so its mock tasks have texts of ours: they are its classes of tasks with its metrics.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("mteb", reason="needs mteb: make test-consumers")

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.mocks.mock_tasks import MockPairClassificationTask, MockRerankingTask, MockRetrievalTask, MockSTSTask

import gte_deploy
from factories import make_checkpoint
from gte_deploy.integrations.mteb import GteCrossEncoder, GteEncoder
from gte_deploy.models import builtin_path

TOLERANCE = {"abs": 1e-4, "nan_ok": True}
QUERIES = ("the capital of france", "old man", "water and light", "the queen of the world")


def split(texts, queries=QUERIES):
    """A query is answered by the document of its number, and by the one after it a little."""
    documents = [{"id": f"d{i}", "text": text, "title": ""} for i, text in enumerate(texts)]
    relevant = {f"q{i}": {f"d{i}": 2, f"d{(i + 1) % len(texts)}": 1} for i in range(len(queries))}
    return RetrievalSplitData(
        queries=Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(queries)]),
        corpus=Dataset.from_list(documents),
        relevant_docs=relevant,
        top_ranked={query: [doc["id"] for doc in documents] for query in relevant},
    )


def task_of(kind, texts, queries=QUERIES):
    """MTEB's own task of a kind, with our texts."""

    class Task(kind):
        def load_data(self, num_proc=None, **kwargs):
            data = split(texts, queries)
            if kind is MockRetrievalTask:
                data["top_ranked"] = None
            self.dataset = {"default": {name: data for name in self.metadata.eval_splits}}
            if kind is MockPairClassificationTask:
                columns = {"sentence1": texts[:-1], "sentence2": texts[1:], "labels": [1, 0, 0, 1, 1, 0]}
                self.dataset = {"test": Dataset.from_dict(columns)}
            if kind is MockSTSTask:
                columns = {"sentence1": texts[:-1], "sentence2": texts[1:], "score": [0.9, 0.1, 0.2, 0.8, 0.6, 0.3]}
                self.dataset = {"test": Dataset.from_dict(columns)}
            self.data_loaded = True

    return Task()


def scores(model, task):
    """Every score of the result; some are not defined for so few queries."""
    result = mteb.evaluate(model, task, cache=None, overwrite_strategy="always", raise_error=True)
    found = result.task_results[0].scores
    return {
        (name, key): value
        for name, split_scores in found.items()
        for key, value in split_scores[0].items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize("kind", [MockRetrievalTask, MockRerankingTask, MockPairClassificationTask, MockSTSTask])
def test_an_encoder_scores_as_the_librarys(kind, embedder, texts):
    expected = scores(embedder.theirs, task_of(kind, texts))
    found = scores(GteEncoder(embedder.ours, name="test/ours"), task_of(kind, texts))
    assert found == pytest.approx(expected, **TOLERANCE)
    assert any(0 < value < 1 for value in expected.values())


def test_prompts_follow_the_rules_of_mteb(embedder, texts):
    prompts = {"Retrieval-query": "the king: ", "query": "a queen: ", "document": "of "}
    wrapped = mteb.models.SentenceTransformerEncoderWrapper(embedder.theirs, model_prompts=prompts)
    try:
        expected = scores(wrapped, task_of(MockRetrievalTask, texts))
    finally:
        embedder.theirs.prompts = embedder.ours.prompts  # the wrapper has overwritten them
    found = scores(GteEncoder(embedder.ours, prompts), task_of(MockRetrievalTask, texts))
    assert found == pytest.approx(expected, **TOLERANCE)
    assert found != pytest.approx(scores(GteEncoder(embedder.ours), task_of(MockRetrievalTask, texts)), **TOLERANCE)


def test_the_built_in_model_scores_as_in_the_library(texts):
    import sentence_transformers as library

    modules = library.sentence_transformer.modules
    transformer = modules.Transformer(str(builtin_path()), model_kwargs={"dtype": "float32"})
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    theirs = library.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    with gte_deploy.load(builtin_path(), backend="torch") as ours:
        found = scores(GteEncoder(ours, pooling="mean"), task_of(MockRetrievalTask, texts))
    assert found == pytest.approx(scores(theirs, task_of(MockRetrievalTask, texts)), **TOLERANCE)


def questions(count, seed):
    """Three of the words w10 … w39 are answered by the words 30 further, in another order."""
    rng = random.Random(seed)
    asked = [rng.sample(range(10, 40), 3) for _ in range(count)]
    answers = [rng.sample([word + 30 for word in words], 3) for words in asked]
    return [[" ".join(f"w{word}" for word in words) for words in side] for side in (asked, answers)]


def train(model, steps=200, batch=32):
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for step in range(steps):
        queries, documents = (
            model(model.preprocess(side))["sentence_embedding"] for side in questions(batch, seed=step + 1)
        )
        loss = torch.nn.functional.cross_entropy(20 * queries @ documents.T, torch.arange(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def test_a_trained_model_answers_what_it_was_not_trained_on(tmp_path):
    """The score shows the training, in MTEB's own numbers for both libraries."""
    import sentence_transformers as library

    options = {"task": "embed", "layout": "native", "pooling": "mean", "normalize": True, "max_positions": 64}
    before = make_checkpoint(tmp_path / "before", **options)
    theirs = library.SentenceTransformer(str(before), device="cpu")
    train(theirs)
    theirs.save(str(tmp_path / "after"))
    asked, answers = questions(50, seed=0)
    found = {}
    for name in ("before", "after"):
        with gte_deploy.load(tmp_path / name, backend="torch") as ours:
            found[name] = scores(GteEncoder(ours), task_of(MockRetrievalTask, answers, asked))
    assert found["after"] == pytest.approx(scores(theirs, task_of(MockRetrievalTask, answers, asked)), **TOLERANCE)
    ndcg = {name: each["test", "ndcg_at_10"] for name, each in found.items()}
    assert ndcg["before"] < 0.3 and ndcg["after"] > 0.6


def test_a_sparse_encoder_scores_as_the_librarys(sparse_encoder, texts):
    expected = scores(sparse_encoder.theirs, task_of(MockRetrievalTask, texts))
    assert scores(GteEncoder(sparse_encoder.ours), task_of(MockRetrievalTask, texts)) == pytest.approx(
        expected, **TOLERANCE
    )


def test_a_cross_encoder_scores_as_the_librarys(reranker, texts):
    expected = scores(reranker.theirs, task_of(MockRerankingTask, texts))
    found = scores(GteCrossEncoder(reranker.ours), task_of(MockRerankingTask, texts))
    assert found == pytest.approx(expected, **TOLERANCE)
    assert any(0 < value < 1 for value in expected.values())


def test_results_name_the_model(embedder):
    assert GteEncoder(embedder.ours).mteb_model_meta.name == f"gte-deploy/{embedder.path.name}"
    assert GteEncoder(embedder.ours, name="me/mine").mteb_model_meta.name == "me/mine"

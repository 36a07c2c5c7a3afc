"""The adapters of MTEB: the scores of small tasks equal those that MTEB gives sentence-transformers' own models."""

from __future__ import annotations

import pytest

pytest.importorskip("mteb", reason="needs mteb: make test-consumers")

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.mocks.mock_tasks import MockPairClassificationTask, MockRerankingTask, MockRetrievalTask

import gte_deploy
from gte_deploy.integrations.mteb import GteCrossEncoder, GteEncoder
from gte_deploy.models import builtin_path

TOLERANCE = {"abs": 1e-4, "nan_ok": True}
QUERIES = ["the capital of france", "old man", "water and light", "the queen of the world"]


def split(texts):
    """A query is answered by the document of its number, and by the one after it a little."""
    documents = [{"id": f"d{i}", "text": text, "title": ""} for i, text in enumerate(texts)]
    relevant = {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 1} for i in range(len(QUERIES))}
    return RetrievalSplitData(
        queries=Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)]),
        corpus=Dataset.from_list(documents),
        relevant_docs=relevant,
        top_ranked={query: [doc["id"] for doc in documents] for query in relevant},
    )


def task_of(kind, texts):
    """MTEB's own task of a kind, with our texts."""

    class Task(kind):
        def load_data(self, num_proc=None, **kwargs):
            data = split(texts)
            if kind is MockRetrievalTask:
                data["top_ranked"] = None
            self.dataset = {"default": {name: data for name in self.metadata.eval_splits}}
            if kind is MockPairClassificationTask:
                columns = {"sentence1": texts[:-1], "sentence2": texts[1:], "labels": [1, 0, 0, 1, 1, 0]}
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


@pytest.mark.parametrize("kind", [MockRetrievalTask, MockRerankingTask, MockPairClassificationTask])
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
    library = pytest.importorskip("sentence_transformers")
    modules = library.sentence_transformer.modules
    transformer = modules.Transformer(str(builtin_path()), model_kwargs={"dtype": "float32"})
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    theirs = library.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    with gte_deploy.load(builtin_path(), backend="torch") as ours:
        found = scores(GteEncoder(ours, pooling="mean"), task_of(MockRetrievalTask, texts))
    assert found == pytest.approx(scores(theirs, task_of(MockRetrievalTask, texts)), **TOLERANCE)


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

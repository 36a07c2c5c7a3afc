"""The components of Haystack, in its own pipelines, against sentence-transformers; pipelines are written and read."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from gte_deploy.core.errors import InputError

pytest.importorskip("haystack", reason="needs haystack-ai: make test-consumers")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.core.errors import DeserializationError
from haystack.document_stores.in_memory import InMemoryDocumentStore

from gte_deploy.integrations.haystack import (
    GteDocumentEmbedder,
    GteRanker,
    GteSparseDocumentEmbedder,
    GteSparseTextEmbedder,
    GteTextEmbedder,
)

TOLERANCE = {"rtol": 0, "atol": 1e-5}
QUERY = "the capital of france"


def documents_of(texts):
    return [Document(content=text, meta={"title": f"the {i}"}) for i, text in enumerate(texts)]


def test_embeddings_are_those_of_the_library(embedder, texts):
    documents, query = embedder.theirs.encode_document(texts), embedder.theirs.encode_query(QUERY)
    for model in (embedder.ours, str(embedder.path)):
        given = documents_of(texts)
        adapter = GteDocumentEmbedder(model, {} if model is embedder.ours else {"backend": "torch"})
        for found in (adapter.run(given), asyncio.run(adapter.run_async(given))):
            np.testing.assert_allclose([doc.embedding for doc in found["documents"]], documents, **TOLERANCE)
        assert given[0].embedding is None and found["documents"][0].meta == given[0].meta
        adapter = GteTextEmbedder(model)
        for found in (adapter.run(QUERY), asyncio.run(adapter.run_async(QUERY))):
            np.testing.assert_allclose(found["embedding"], query, **TOLERANCE)
    assert GteDocumentEmbedder(embedder.ours).run([]) == {"documents": []}
    with pytest.raises(InputError, match="tokens"):
        GteDocumentEmbedder(embedder.ours, options={"truncation": False}).run(documents_of(texts))


def test_metadata_come_before_the_content(embedder):
    given = [Document(content="a man", meta={"title": "the old river", "empty": None})]
    adapter = GteDocumentEmbedder(
        embedder.ours, meta_fields_to_embed=["title", "empty", "absent"], embedding_separator=" "
    )
    expected = embedder.theirs.encode_document("the old river a man")
    np.testing.assert_allclose(adapter.run(given)["documents"][0].embedding, expected, **TOLERANCE)


def test_sparse_embeddings_are_those_of_the_library(sparse_encoder, texts):
    def dense(found, size):
        row = np.zeros(size, np.float32)
        row[found.indices] = found.values
        return row

    expected = sparse_encoder.theirs.encode_document(texts).to_dense().numpy()
    adapter = GteSparseDocumentEmbedder(sparse_encoder.ours)
    for found in (adapter.run(documents_of(texts)), asyncio.run(adapter.run_async(documents_of(texts)))):
        rows = [dense(doc.sparse_embedding, expected.shape[1]) for doc in found["documents"]]
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-5)
    assert adapter.run([]) == {"documents": []}
    query = sparse_encoder.theirs.encode_query(QUERY).to_dense().numpy()
    adapter = GteSparseTextEmbedder(sparse_encoder.ours)
    for found in (adapter.run(QUERY), asyncio.run(adapter.run_async(QUERY))):
        np.testing.assert_allclose(dense(found["sparse_embedding"], len(query)), query, rtol=0, atol=2e-5)


def test_the_ranker_sorts_as_the_library_does(reranker, texts):
    documents = documents_of(texts)
    expected = reranker.theirs.rank(QUERY, texts)
    adapter = GteRanker(reranker.ours, top_k=4)
    for found, count in (
        (adapter.run(QUERY, documents), 4),
        (adapter.run(QUERY, documents, top_k=2), 2),
        (asyncio.run(adapter.run_async(QUERY, documents)), 4),
    ):
        assert [doc.content for doc in found["documents"]] == [texts[hit["corpus_id"]] for hit in expected[:count]]
        scores = [hit["score"] for hit in expected[:count]]
        np.testing.assert_allclose([doc.score for doc in found["documents"]], scores, **TOLERANCE)
    assert adapter.run(QUERY, []) == {"documents": []} and documents[0].score is None


def test_a_pipeline_is_written_and_read(embedder, reranker, texts):
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing = Pipeline()
    indexing.add_component(
        "embedder", GteDocumentEmbedder(embedder.ours, {"backend": "torch"}, meta_fields_to_embed=["title"])
    )
    with pytest.raises(DeserializationError, match="allowlist"):
        Pipeline.loads(indexing.dumps())
    read = Pipeline.loads(indexing.dumps(), allowed_modules=["gte_deploy.integrations.haystack"])
    store.write_documents(read.run({"embedder": {"documents": documents_of(texts)}})["embedder"]["documents"])
    querying = Pipeline()
    querying.add_component("text", GteTextEmbedder(str(embedder.path), {"backend": "torch"}, {"batch_size": 4}))
    querying.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=3))
    querying.add_component("ranker", GteRanker(reranker.ours, top_k=2))
    querying.connect("text.embedding", "retriever.query_embedding")
    querying.connect("retriever.documents", "ranker.documents")
    given = {"text": {"text": QUERY}, "ranker": {"query": QUERY}}
    found = querying.run(given)["ranker"]["documents"]
    titled = [f"the {i}\n{text}" for i, text in enumerate(texts)]
    scores = embedder.theirs.similarity(
        embedder.theirs.encode_query(QUERY), embedder.theirs.encode_document(titled)
    ).numpy()[0]
    best = [texts[i] for i in np.argsort(-scores)[:3]]
    expected = [best[hit["corpus_id"]] for hit in reranker.theirs.rank(QUERY, best)[:2]]
    assert [doc.content for doc in found] == expected
    described = querying.to_dict()["components"]
    assert described["text"]["init_parameters"] == {
        "model": str(embedder.path),
        "load_options": {"backend": "torch"},
        "options": {"batch_size": 4},
    }
    assert described["ranker"]["init_parameters"]["top_k"] == 2

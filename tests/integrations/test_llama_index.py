"""The adapters of LlamaIndex, in its own index, against sentence-transformers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("llama_index.core", reason="needs llama-index-core: make test-consumers")

from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import NodeWithScore, TextNode

from gte_deploy.integrations.llama_index import GteEmbedding, GteRerank, GteSparseEmbedding, sparse_functions

TOLERANCE = {"rtol": 0, "atol": 1e-5}
QUERY = "the capital of france"


def test_embeddings_are_those_of_the_library(embedder, texts):
    documents, query = embedder.theirs.encode_document(texts), embedder.theirs.encode_query(QUERY)
    for adapter in (GteEmbedding(embedder.ours), GteEmbedding(str(embedder.path), embed_batch_size=2)):
        assert adapter.model_name == str(embedder.path)
        np.testing.assert_allclose(adapter.get_text_embedding_batch(texts), documents, **TOLERANCE)
        np.testing.assert_allclose(adapter.get_text_embedding(texts[0]), documents[0], **TOLERANCE)
        np.testing.assert_allclose(adapter.get_query_embedding(QUERY), query, **TOLERANCE)
        np.testing.assert_allclose(asyncio.run(adapter.aget_text_embedding_batch(texts)), documents, **TOLERANCE)
        np.testing.assert_allclose(asyncio.run(adapter.aget_text_embedding(texts[0])), documents[0], **TOLERANCE)
        np.testing.assert_allclose(asyncio.run(adapter.aget_query_embedding(QUERY)), query, **TOLERANCE)


def test_an_index_finds_what_the_library_finds(embedder, texts):
    nodes = [TextNode(text=text) for text in texts]
    index = VectorStoreIndex(nodes, embed_model=GteEmbedding(embedder.ours))
    found = index.as_retriever(similarity_top_k=3).retrieve(QUERY)
    scores = embedder.theirs.similarity(
        embedder.theirs.encode_query(QUERY), embedder.theirs.encode_document(texts)
    ).numpy()[0]
    best = np.argsort(-scores)[:3]
    assert [hit.node.text for hit in found] == [texts[i] for i in best]
    np.testing.assert_allclose([hit.score for hit in found], scores[best], **TOLERANCE)


def test_the_reranker_sorts_as_the_library_does(reranker, texts):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
    expected = reranker.theirs.rank(QUERY, texts)
    for adapter in (GteRerank(reranker.ours), GteRerank(str(reranker.path), top_n=2)):
        found = adapter.postprocess_nodes(nodes, query_str=QUERY)
        wanted = expected[: adapter.top_n]
        assert [hit.node.text for hit in found] == [texts[hit["corpus_id"]] for hit in wanted]
        np.testing.assert_allclose([hit.score for hit in found], [hit["score"] for hit in wanted], **TOLERANCE)
        again = asyncio.run(adapter.apostprocess_nodes(nodes, query_str=QUERY))
        assert [hit.score for hit in again] == [hit.score for hit in found]
    assert len(found) == 2 and nodes[0].score == 0.5
    assert adapter.postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(ValueError, match="needs the query"):
        adapter.postprocess_nodes(nodes)


def test_sparse_embeddings_are_those_of_the_library(sparse_encoder, texts):
    expected = sparse_encoder.theirs.encode_document(texts).to_dense().numpy()
    query = sparse_encoder.theirs.encode_query(QUERY).to_dense().numpy()

    def dense(vector):
        found = np.zeros(expected.shape[1], np.float32)
        found[list(vector)] = list(vector.values())
        return found

    adapter = GteSparseEmbedding(sparse_encoder.ours)
    for found in (adapter.get_text_embedding_batch(texts), asyncio.run(adapter.aget_text_embedding_batch(texts))):
        np.testing.assert_allclose([dense(vector) for vector in found], expected, rtol=0, atol=2e-5)
    for vector in (adapter.get_query_embedding(QUERY), asyncio.run(adapter.aget_query_embedding(QUERY))):
        np.testing.assert_allclose(dense(vector), query, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dense(adapter.get_text_embedding(texts[1])), expected[1], rtol=0, atol=2e-5)
    document_function, query_function = sparse_functions(sparse_encoder.ours)
    indices, values = document_function(texts)
    rows = [dict(zip(*pair, strict=True)) for pair in zip(indices, values, strict=True)]
    np.testing.assert_allclose([dense(row) for row in rows], expected, rtol=0, atol=2e-5)
    indices, values = query_function([QUERY])
    np.testing.assert_allclose(dense(dict(zip(indices[0], values[0], strict=True))), query, rtol=0, atol=2e-5)


def test_the_store_of_qdrant_takes_the_sparse_functions(embedder, sparse_encoder, texts):
    """Its sparse search finds what the library finds."""
    reason = "needs llama-index-vector-stores-qdrant: make test-consumers"
    store = pytest.importorskip("llama_index.vector_stores.qdrant", reason=reason)
    import qdrant_client as qdrant

    document_function, query_function = sparse_functions(sparse_encoder.ours)
    vectors = store.QdrantVectorStore(
        "texts",
        client=qdrant.QdrantClient(":memory:"),
        enable_hybrid=True,
        sparse_doc_fn=document_function,
        sparse_query_fn=query_function,
    )
    index = VectorStoreIndex(
        [TextNode(text=text) for text in texts],
        storage_context=StorageContext.from_defaults(vector_store=vectors),
        embed_model=GteEmbedding(embedder.ours),
    )
    found = index.as_retriever(vector_store_query_mode="sparse", similarity_top_k=3, sparse_top_k=3).retrieve(QUERY)
    theirs = sparse_encoder.theirs
    scores = theirs.similarity(theirs.encode_query(QUERY), theirs.encode_document(texts)).numpy()[0]
    assert [hit.node.text for hit in found] == [texts[i] for i in np.argsort(-scores)[:3]]
    np.testing.assert_allclose([hit.score for hit in found], np.sort(scores)[::-1][:3], rtol=1e-4, atol=1e-4)

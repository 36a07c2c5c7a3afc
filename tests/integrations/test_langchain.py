"""The adapters of LangChain, in its own vector store, against sentence-transformers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from gte_deploy.core.errors import InputError

pytest.importorskip("langchain_core", reason="needs langchain-core: make test-consumers")

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from gte_deploy.integrations.langchain import GteEmbeddings, GteReranker

TOLERANCE = {"rtol": 0, "atol": 1e-5}
QUERY = "the capital of france"


def test_embeddings_are_those_of_the_library(embedder, texts):
    for adapter in (GteEmbeddings(embedder.ours), GteEmbeddings(str(embedder.path), batch_size=2)):
        documents, query = adapter.embed_documents(texts), adapter.embed_query(QUERY)
        np.testing.assert_allclose(documents, embedder.theirs.encode_document(texts), **TOLERANCE)
        np.testing.assert_allclose(query, embedder.theirs.encode_query(QUERY), **TOLERANCE)
        assert isinstance(documents[0][0], float) and isinstance(query[0], float)
        assert asyncio.run(adapter.aembed_query(QUERY)) == query
        np.testing.assert_allclose(asyncio.run(adapter.aembed_documents(texts[:2])), documents[:2], **TOLERANCE)
    assert adapter.embed_documents([]) == []
    with pytest.raises(InputError, match="tokens"):
        GteEmbeddings(embedder.ours, truncation=False).embed_documents(texts)


def test_a_vector_store_finds_what_the_library_finds(embedder, texts):
    store = InMemoryVectorStore.from_texts(texts, GteEmbeddings(embedder.ours))
    found = store.similarity_search_with_score(QUERY, k=3)
    scores = embedder.theirs.similarity(
        embedder.theirs.encode_query(QUERY), embedder.theirs.encode_document(texts)
    ).numpy()[0]
    best = np.argsort(-scores)[:3]
    assert [document.page_content for document, _ in found] == [texts[i] for i in best]
    np.testing.assert_allclose([score for _, score in found], scores[best], **TOLERANCE)


def test_the_reranker_sorts_as_the_library_does(reranker, texts):
    documents = [Document(text, metadata={"number": i}) for i, text in enumerate(texts)]
    expected = reranker.theirs.rank(QUERY, texts)
    for adapter in (GteReranker(model=reranker.ours), GteReranker(model=str(reranker.path), top_n=2)):
        found = adapter.compress_documents(documents, QUERY)
        wanted = expected[: adapter.top_n]
        assert [document.metadata["number"] for document in found] == [hit["corpus_id"] for hit in wanted]
        scores = [document.metadata["relevance_score"] for document in found]
        np.testing.assert_allclose(scores, [hit["score"] for hit in wanted], **TOLERANCE)
        again = asyncio.run(adapter.acompress_documents(documents, QUERY))
        assert [document.metadata for document in again] == [document.metadata for document in found]
    assert len(found) == 2 and "relevance_score" not in documents[0].metadata
    assert list(adapter.compress_documents([], QUERY)) == []
    with pytest.raises(InputError, match="tokens"):
        GteReranker(model=reranker.ours, options={"truncation": False}).compress_documents(documents, QUERY)

"""Vector stores in memory: Chroma's embedding function, and the points of Qdrant, against sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest

QUERY = "the capital of france"


def test_chroma_finds_what_the_library_finds(embedder, texts, tmp_path):
    chromadb = pytest.importorskip("chromadb", reason="needs chromadb: make test-consumers")
    from gte_deploy.integrations.chroma import GteEmbeddingFunction

    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(tmp_path / "store"), settings=settings)
    made = client.create_collection("texts", embedding_function=GteEmbeddingFunction(str(embedder.path), batch_size=3))
    made.add(ids=[str(i) for i in range(len(texts))], documents=texts)
    scores = embedder.theirs.similarity(
        embedder.theirs.encode_query(QUERY), embedder.theirs.encode_document(texts)
    ).numpy()[0]
    best = np.argsort(-scores)[:3]
    # Chroma opens the model that the collection names.
    for collection in (made, client.get_collection("texts")):
        found = collection.query(query_texts=[QUERY], n_results=3)
        assert found["ids"][0] == [str(i) for i in best]
        np.testing.assert_allclose(found["distances"][0], 1 - scores[best], rtol=0, atol=1e-5)


def test_qdrant_finds_what_the_library_finds(embedder, sparse_encoder, texts):
    qdrant = pytest.importorskip("qdrant_client", reason="needs qdrant-client: make test-consumers")
    models = qdrant.models
    dense, sparse = embedder.ours, sparse_encoder.ours
    client = qdrant.QdrantClient(":memory:")
    client.create_collection(
        "texts",
        vectors_config={
            "dense": models.VectorParams(size=dense.get_embedding_dimension(), distance=models.Distance.COSINE)
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )

    def entries(vector):
        return models.SparseVector(indices=vector.indices.tolist(), values=vector.values.tolist())

    vectors = dense.encode_document(texts, truncation=True).tolist()
    weights = [entries(each) for each in sparse.encode_document(texts, truncation=True)]
    both = [{"dense": vector, "sparse": weight} for vector, weight in zip(vectors, weights, strict=True)]
    client.upsert("texts", [models.PointStruct(id=number, vector=vector) for number, vector in enumerate(both)])
    for name, query, theirs in (
        ("dense", dense.encode_query(QUERY).tolist(), embedder.theirs),
        ("sparse", entries(sparse.encode_query(QUERY)), sparse_encoder.theirs),
    ):
        found = client.query_points("texts", query, using=name, limit=3).points
        scores = theirs.similarity(theirs.encode_query(QUERY), theirs.encode_document(texts)).numpy()[0]
        assert [point.id for point in found] == np.argsort(-scores)[:3].tolist()
        np.testing.assert_allclose([point.score for point in found], np.sort(scores)[::-1][:3], rtol=1e-4, atol=1e-4)

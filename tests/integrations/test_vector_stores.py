"""Vector stores and indexes: Chroma's embedding function, and vectors as they are, against sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest

QUERY = "the capital of france"


def nearest(embedder, texts, count=3):
    """Numbers and cosines of the nearest texts, by sentence-transformers alone."""
    scores = embedder.theirs.similarity(
        embedder.theirs.encode_query(QUERY), embedder.theirs.encode_document(texts)
    ).numpy()[0]
    best = np.argsort(-scores)[:count]
    return best.tolist(), scores[best]


def test_chroma_finds_what_the_library_finds(embedder, texts, tmp_path):
    chromadb = pytest.importorskip("chromadb", reason="needs chromadb: make test-consumers")
    from gte_deploy.integrations.chroma import GteEmbeddingFunction

    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(tmp_path / "store"), settings=settings)
    made = client.create_collection("texts", embedding_function=GteEmbeddingFunction(str(embedder.path), batch_size=3))
    made.add(ids=[str(i) for i in range(len(texts))], documents=texts)
    best, scores = nearest(embedder, texts)
    # Chroma opens the model that the collection names.
    for collection in (made, client.get_collection("texts")):
        found = collection.query(query_texts=[QUERY], n_results=3)
        assert found["ids"][0] == [str(i) for i in best]
        np.testing.assert_allclose(found["distances"][0], 1 - scores, rtol=0, atol=1e-5)


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


def vectors_of(embedder, texts, **options):
    """[texts, D] and [1, D], as `encode` returns them."""
    model = embedder.ours
    return model.encode_document(texts, truncation=True, **options), model.encode_query([QUERY], **options)


def test_faiss_finds_what_the_library_finds(embedder, texts):
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu: make test-consumers")
    best, scores = nearest(embedder, texts)
    documents, query = vectors_of(embedder, texts, normalize_embeddings=True)
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    found, numbers = index.search(query, 3)
    assert numbers[0].tolist() == best
    np.testing.assert_allclose(found[0], scores, rtol=0, atol=1e-5)


def test_usearch_finds_what_the_library_finds(embedder, texts, tmp_path):
    usearch = pytest.importorskip("usearch.index", reason="needs usearch: make test-consumers")
    best, scores = nearest(embedder, texts)
    documents, query = vectors_of(embedder, texts)
    index = usearch.Index(ndim=documents.shape[1], metric="cos", dtype="f32")
    index.add(np.arange(len(texts)), documents)
    index.save(tmp_path / "index.usearch")
    found = usearch.Index.restore(tmp_path / "index.usearch").search(query[0], 3)
    assert found.keys.tolist() == best
    np.testing.assert_allclose(1 - found.distances, scores, rtol=0, atol=1e-5)


def test_lancedb_finds_what_the_library_finds(embedder, texts, tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="needs lancedb: make test-consumers")
    best, scores = nearest(embedder, texts)
    documents, query = vectors_of(embedder, texts)
    rows = [{"number": number, "vector": vector} for number, vector in enumerate(documents)]
    lancedb.connect(tmp_path).create_table("texts", rows)
    table = lancedb.connect(tmp_path).open_table("texts")
    found = table.search(query[0]).distance_type("cosine").limit(3).to_list()
    assert [row["number"] for row in found] == best
    np.testing.assert_allclose([1 - row["_distance"] for row in found], scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("package", ["faiss", "usearch"])
def test_bits_find_what_the_searches_of_the_library_find(package, embedder, texts):
    """The library searches its own bits by the same package."""
    pytest.importorskip(package, reason=f"needs {package}: make test-consumers")
    from sentence_transformers.util import quantization

    search = getattr(quantization, f"semantic_search_{package}")
    theirs = embedder.theirs
    hits, _seconds = search(
        theirs.encode_query([QUERY]),
        corpus_embeddings=quantization.quantize_embeddings(theirs.encode_document(texts), "ubinary"),
        corpus_precision="ubinary",
        top_k=len(texts),
        rescore=False,
        exact=True,
    )
    documents, query = vectors_of(embedder, texts, precision="ubinary")
    bits = 8 * documents.shape[1]
    if package == "faiss":
        import faiss

        index = faiss.IndexBinaryFlat(bits)
        index.add(documents)
        distances, numbers = (found[0].tolist() for found in index.search(query, len(texts)))
    else:
        from usearch.index import Index

        index = Index(ndim=bits, metric="hamming", dtype="b1")
        index.add(np.arange(len(texts)), documents)
        found = index.search(query[0], len(texts), exact=True)
        distances, numbers = found.distances.tolist(), found.keys.tolist()
    assert distances == sorted(distances) and len(set(distances)) > 2
    # Equal distances have no order.
    assert dict(zip(numbers, distances, strict=True)) == {hit["corpus_id"]: hit["score"] for hit in hits[0]}

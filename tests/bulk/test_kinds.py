"""Sparse embeddings and embeddings of tokens in files, as the model's own methods give them."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_tokens
from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.core.errors import InputError
from gte_deploy.text.chunking import SentenceChunks, TokenChunks
from runtime_models import make_texts, make_word_checkpoint

SCHEMA = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.large_string())])
TEXTS = [*make_texts(20, most_words=8), "", "a", "the " * 200]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def test_sparse(source, tmp_path):
    from sentence_transformers import sparse_encoder as encoder
    from sentence_transformers.base.modules import Transformer

    masked_lm = make_word_checkpoint(tmp_path / "mlm", seed=7)
    modules = [Transformer(str(masked_lm), transformer_task="fill-mask"), encoder.modules.SpladePooling("max")]
    judge = encoder.SparseEncoder(modules=modules, device="cpu")
    judge.save_pretrained(str(tmp_path / "model"))
    with gte_deploy.load(tmp_path / "model", backend="torch") as model:
        options, output = BulkOptions(shard_rows=8), tmp_path / "out.parquet"
        summary = encode_files(source, output, model=model, options=options)
        encode_files(source, tmp_path / "out.jsonl", model=model, options=options)
        with pytest.raises(InputError, match=r"sparse.*\.npy"):
            encode_files(source, tmp_path / "out.npy", model=model)
        with pytest.raises(InputError, match="precision is not an option for files"):
            encode_files(source, tmp_path / "out2.jsonl", model=model, encode_options={"precision": "int8"})
    assert (summary.rows, summary.failures, summary.form) == (22, 1, "22 sparse vectors")
    expected = judge.encode(TEXTS[:-1], convert_to_sparse_tensor=False).numpy()
    table = pyarrow.parquet.read_table(output).to_pydict()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for rows in (
        zip(table["embedding_indices"], table["embedding_values"], strict=True),
        ((line["embedding_indices"], line["embedding_values"]) for line in lines),
    ):
        found = np.zeros_like(expected)
        for row, (indices, values) in zip(found, rows, strict=True):
            row[indices] = values
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tokens(precision, source, tmp_path, word_checkpoints):
    from sentence_transformers import MultiVectorEncoder

    folder = make_word_checkpoint(tmp_path / "colbert", task="embed", seed=4)
    add_tokens(folder, ["[Q] ", "[D] "])
    prompts = {"query": "the query: ", "document": "the "}
    add_multi_vector_modules(folder, library="sentence-transformers", mask={}, config={"prompts": prompts})
    judge = MultiVectorEncoder(str(folder), device="cpu")
    with gte_deploy.load(folder, backend="torch") as model:
        output = tmp_path / "out.parquet"
        options = {"truncation": True, "precision": precision}
        summary = encode_files(source, output, model=model, options=BulkOptions(shard_rows=8), encode_options=options)
        with pytest.raises(InputError, match=r"tokens.*\.npy"):
            encode_files(source, tmp_path / "out.npy", model=model)
    assert summary.rows == len(TEXTS) and "lists of" in summary.form
    found = pyarrow.parquet.read_table(output).column("embedding").to_pylist()
    for own, theirs in zip(found, judge.encode_document(TEXTS), strict=True):
        np.testing.assert_allclose(np.array(own), np.asarray(theirs), atol=2e-5 if precision == "float32" else 1e-3)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_chunks(kind, precision, embedder, tmp_path):
    """A row for each chunk, with its text and its place; the other columns are those of the document."""
    from sentence_transformers.util import quantize_embeddings

    texts = [*make_texts(30), "", "the king. the queen! " * 60]
    table = pyarrow.table({"id": range(len(texts)), "text": texts}, schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    rule, output = SentenceChunks(9), tmp_path / f"out.{kind}"
    options = {"chunks": rule, "precision": precision, "normalize_embeddings": True}
    summary = encode_files(
        tmp_path / "in.parquet", output, model=embedder, options=BulkOptions(shard_rows=7), encode_options=options
    )
    expected = embedder.encode(texts, chunks=rule, normalize_embeddings=True)
    vectors = np.concatenate([each.embeddings for each in expected])
    assert summary.rows == len(vectors) > 100 and summary.failures == 0 and summary.form.endswith("of chunks")
    if kind == "parquet":
        found = pyarrow.parquet.read_table(output).to_pydict()
        assert pyarrow.parquet.read_schema(output).field("text").type == pyarrow.large_string()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        found = {name: [row[name] for row in rows] for name in rows[0]}
    assert found["id"] == [number for number, each in enumerate(expected) for _ in range(len(each))]
    assert found["text"] == [text for each in expected for text in each.texts]
    places = np.stack([found["chunk_start"], found["chunk_end"]], axis=1)
    np.testing.assert_array_equal(places, np.concatenate([each.offsets for each in expected]))
    if precision == "int8":
        steps = np.abs(np.array(found["embedding"]) - quantize_embeddings(vectors, "int8"))
        assert steps.max() <= 1 and (steps > 0).mean() < 0.01  # sums in batches of other shapes
    else:
        np.testing.assert_allclose(np.array(found["embedding"]), vectors, atol=2e-5 if precision == "float32" else 1e-3)


def test_chunks_that_no_file_holds(embedder, source, tmp_path):
    for output, chunks, message in (
        ("out.npy", TokenChunks(4), r"chunks.*\.npy"),
        ("out.jsonl", [[(0, 1)]], "and not places in each text"),
    ):
        with pytest.raises(InputError, match=message):
            encode_files(source, tmp_path / output, model=embedder, encode_options={"chunks": chunks})

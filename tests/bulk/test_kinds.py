"""Sparse embeddings, hybrid ones and embeddings of tokens in files, against the models of other libraries."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_tokens
from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.bulk.parts import PartsFolder
from gte_deploy.core.errors import InputError
from gte_deploy.text.chunking import SentenceChunks, TokenChunks
from hybrid_reference import hybrid_reference, make_hybrid_checkpoint
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
    expected = judge.encode(TEXTS[:-1], convert_to_sparse_tensor=False)
    known = len(judge.tokenizer)  # the rows above only fill the vocabulary up, and have no name
    tokens = [{token: weight for token, weight in pairs if token is not None} for pairs in judge.decode(expected)]
    table = pyarrow.parquet.read_table(output)
    entry = pyarrow.struct([("index", pyarrow.int32()), ("token", pyarrow.string()), ("weight", pyarrow.float32())])
    assert table.schema.field("embedding").type == pyarrow.large_list(entry)
    lines = [json.loads(line)["embedding"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for found in (table.column("embedding").to_pylist(), lines):
        np.testing.assert_allclose(weights_of(found, expected.shape[1]), expected.numpy(), atol=2e-5)
        named = [{each["token"]: each["weight"] for each in row if each["index"] < known} for row in found]
        assert named == [pytest.approx(row, abs=2e-5) for row in tokens]


def weights_of(rows, size):
    """Weights [N, V] of the entries in a file, which come with the heaviest first."""
    found = np.zeros((len(rows), size))
    for row, entries in zip(found, rows, strict=True):
        weights = [entry["weight"] for entry in entries]
        assert weights == sorted(weights, reverse=True)
        row[[entry["index"] for entry in entries]] = weights
    return found


@pytest.fixture(scope="module")
def hybrid_checkpoint(tmp_path_factory):
    return make_hybrid_checkpoint(tmp_path_factory.mktemp("hybrid") / "checkpoint")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "ubinary"])
def test_hybrid(precision, hybrid_checkpoint, source, tmp_path):
    """Both vectors of each row, in the order of the input, against transformers' classes in float64."""
    from sentence_transformers.util import quantize_embeddings
    from transformers import AutoTokenizer

    with gte_deploy.load(hybrid_checkpoint, backend="torch", task="hybrid") as model:
        given = {"options": BulkOptions(shard_rows=8), "encode_options": {"precision": precision}}
        summary = encode_files(source, tmp_path / "out.parquet", model=model, method="encode_hybrid", **given)
        encode_files(source, tmp_path / "out.jsonl", model=model, method="encode_hybrid", **given)
        with pytest.raises(InputError, match=r"hybrid vectors make no single array for an \.npy file"):
            encode_files(source, tmp_path / "out.npy", model=model, method="encode_hybrid")
        encode_files(source, tmp_path / "dense.npy", model=model, **given)
        sparse = encode_files(source, tmp_path / "sparse.jsonl", model=model, method="encode_sparse")
    expected = [hybrid_reference(hybrid_checkpoint, text) for text in TEXTS[:-1]]
    dense, weights = (np.stack(half) for half in zip(*expected, strict=True))
    assert (summary.rows, summary.failures) == (22, 1) and summary.form.endswith(" and sparse vectors")
    if precision == "ubinary":
        dense = np.packbits(dense > 0, axis=1)
    elif precision == "int8":
        dense = quantize_embeddings(dense.astype(np.float32), "int8")
    tolerance = {"float32": 2e-5, "float16": 1e-3, "int8": 1, "ubinary": 0}[precision]
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column("text").to_pylist() == TEXTS[:-1]
    tokenizer = AutoTokenizer.from_pretrained(hybrid_checkpoint)
    for rows in (table.to_pylist(), lines_of(tmp_path / "out.jsonl")):
        np.testing.assert_allclose([row["embedding"] for row in rows], dense.astype(float), atol=tolerance)
        found = [row["embedding_sparse"] for row in rows]
        np.testing.assert_allclose(weights_of(found, weights.shape[1]), weights, atol=2e-5)
        entries = [entry for row in found for entry in row]
        assert len(entries) > 50
        assert all(entry["token"] == tokenizer.decode([entry["index"]]) for entry in entries)
    np.testing.assert_allclose(np.load(tmp_path / "dense.npy").astype(float), dense.astype(float), atol=tolerance)
    assert sparse.form == "22 sparse vectors"
    alone = [row["embedding"] for row in lines_of(tmp_path / "sparse.jsonl")]
    assert [[entry["token"] for entry in row] for row in alone] == [[entry["token"] for entry in row] for row in found]
    # Other batches, so that a CPU may add up in another order.
    np.testing.assert_allclose(weights_of(alone, weights.shape[1]), weights_of(found, weights.shape[1]), atol=2e-6)


def test_rows_of_a_hybrid_model_that_fail(hybrid_checkpoint, source, tmp_path, monkeypatch):
    """A dense vector that float16 cannot hold takes its sparse one along; the others keep theirs."""
    options = BulkOptions(shard_rows=8)
    with gte_deploy.load(hybrid_checkpoint, backend="torch", task="hybrid") as model:
        encode_files(source, tmp_path / "whole.jsonl", model=model, method="encode_hybrid", options=options)
        encode = type(model).encode_hybrid

        def broken(self, asked, **given):
            found = encode(self, asked, **given)
            found.dense[[text == TEXTS[3] for text in asked]] *= 1e6
            return found

        monkeypatch.setattr(type(model), "encode_hybrid", broken)
        given = {"options": options, "encode_options": {"precision": "float16"}}
        output = tmp_path / "out.jsonl"
        summary = encode_files(source, output, model=model, method="encode_hybrid", **given)
    assert (summary.rows, summary.failures) == (21, 2)
    expected = [row for row in lines_of(tmp_path / "whole.jsonl") if row["text"] != TEXTS[3]]
    for found, whole in zip(lines_of(output), expected, strict=True):
        assert (found["text"], found["embedding_sparse"]) == (whole["text"], whole["embedding_sparse"])


def test_a_hybrid_run_that_is_interrupted_goes_on(hybrid_checkpoint, source, tmp_path, monkeypatch):
    given = {"method": "encode_hybrid", "options": BulkOptions(shard_rows=4)}
    with gte_deploy.load(hybrid_checkpoint, backend="torch", task="hybrid") as model:
        encode_files(source, tmp_path / "whole.parquet", model=model, **given)
        write, count = PartsFolder.write, iter(range(3))

        def some(self, *arguments):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return write(self, *arguments)

        monkeypatch.setattr(PartsFolder, "write", some)
        output = tmp_path / "out.parquet"
        with pytest.raises(KeyboardInterrupt):
            encode_files(source, output, model=model, **given)
        monkeypatch.undo()
        with pytest.raises(InputError, match=r'another method \(there "encode_hybrid", here "encode"\)'):
            encode_files(source, output, model=model, options=given["options"])
        summary = encode_files(source, output, model=model, **given)
    assert summary.resumed_rows == 12 and summary.rows == 22
    left, right = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "out"))
    assert left.equals(right), "the same rows and bytes of vectors"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("encode_hybrid", "this needs a hybrid model"),
        ("encode_sparse", "this needs a sparse model"),
        ("encode_multi_vector", "this needs a multi-vector model"),
        ("predict", "method is 'predict'"),
    ],
)
def test_a_method_that_the_model_has_not(method, message, embedder, source, tmp_path):
    with pytest.raises(InputError, match=message):
        encode_files(source, tmp_path / "out.jsonl", model=embedder, method=method)
    assert not list(tmp_path.glob("out*"))


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


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

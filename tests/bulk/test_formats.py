"""Every format in and out: the vectors are those of sentence-transformers, and other libraries read the files."""

import csv
import datetime
import gzip
import json

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.bulk.shards import Cursor, find_files, read_shards
from gte_deploy.core.errors import InputError, MissingDependencyError

SMALL = BulkOptions(shard_rows=32)
TOLERANCE = {"atol": 2e-5, "rtol": 0}  # float32 sums in batches of other shapes


def write_input(folder, kind, texts):
    """A file, or a folder, of the texts with numbers beside them."""
    file = folder / f"docs.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, file, row_group_size=50)
    elif kind.startswith("jsonl"):
        data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
        if kind.endswith("zst"):
            with pyarrow.output_stream(file, compression="zstd") as stream:
                stream.write(data)
        else:
            file.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    elif kind in ("csv", "tsv"):
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("id", "text"), *enumerate(texts)])
    elif kind == "txt":
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    else:
        file = folder / "documents"
        for i, text in enumerate(texts):
            document = file / f"{i // 10:02}" / f"{i % 10}.{'md' if i % 3 else 'txt'}"
            document.parent.mkdir(parents=True, exist_ok=True)
            document.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "tsv", "txt", "documents"])
def test_every_input_gives_the_vectors_of_sentence_transformers(kind, embedder, judge, texts, tmp_path):
    source = write_input(tmp_path, kind, texts)
    summary = encode_files(source, tmp_path / "out.parquet", model=embedder, options=SMALL)
    assert (summary.rows, summary.failures, summary.form) == (len(texts), 0, f"({len(texts)}, 32) float32")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column("text").to_pylist() == texts
    if "id" in table.column_names:
        assert [int(number) for number in table.column("id").to_pylist()] == list(range(len(texts)))
    vectors = np.array(table.column("embedding").to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, judge.encode(texts), **TOLERANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, "out.parquet"])


@pytest.mark.parametrize("kind", ["npy", "jsonl", "parquet"])
def test_every_output_holds_the_same(kind, embedder, judge, texts, tmp_path):
    output = tmp_path / f"out.{kind}"
    encode_files(write_input(tmp_path, "csv", texts), output, model=embedder, options=SMALL)
    if kind == "npy":
        vectors = np.load(output, mmap_mode="r", allow_pickle=False)
        assert vectors.dtype == np.float32
    else:
        frame = pandas.read_parquet(output) if kind == "parquet" else pandas.read_json(output, lines=True)
        assert frame["text"].tolist() == texts and frame["id"].astype(int).tolist() == list(range(len(texts)))
        vectors = np.stack(frame["embedding"].tolist())
    np.testing.assert_allclose(vectors, judge.encode(texts), **TOLERANCE)


def test_columns_keep_their_types(embedder, tmp_path):
    day = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)
    table = pyarrow.table(
        {
            "id": pyarrow.array([3, None, 5], pyarrow.int16()),
            "text": pyarrow.array(["a", "the king", "a"]).dictionary_encode(),
            "when": pyarrow.array([day, day, None], pyarrow.timestamp("us", "UTC")),
            "tags": [["x"], [], None],
            "more": [{"n": 1, "deep": [{"s": "é"}]}, None, {"n": 2, "deep": None}],
            "blob": [b"\0\xff", b"", None],
        },
    ).replace_schema_metadata({"owner": "somebody"})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    encode_files(tmp_path / "in.parquet", tmp_path / "out.parquet", model=embedder, options=BulkOptions(shard_rows=2))
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.drop(["embedding"]).equals(table)
    assert found.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 32)
    assert found.schema.metadata[b"owner"] == b"somebody"
    about = json.loads(found.schema.metadata[b"gte_deploy"])
    assert about["task"] == "embed" and about["precision"] == "float32" and about["engine"] == ["torch fp32 cpu"]
    encode_files(tmp_path / "in.parquet", tmp_path / "out.jsonl", model=embedder)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["when"] == "2026-11-30T12:00:00+00:00" and first["blob"] == "AP8=" and first["more"]["n"] == 1


def test_json_values_of_several_types_become_texts(embedder, tmp_path):
    rows = [
        {"text": "a", "n": 1, "x": 1, "big": 1},
        {"text": "a", "n": 2.5, "x": "one", "new": {"k": 1}},
        {"text": "a", "n": None, "x": [1], "big": 1 << 70},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for shard_rows in (1, 3):
        options = BulkOptions(shard_rows=shard_rows)
        encode_files(tmp_path / "in.jsonl", tmp_path / "out.parquet", model=embedder, options=options)
        found = pyarrow.parquet.read_table(tmp_path / "out.parquet").drop(["embedding"]).to_pydict()
        assert found["n"] == [1.0, 2.5, None] and found["new"] == [None, {"k": 1}, None]
        assert found["x"] == ["1", "one", "[1]"] and found["big"] == ["1", None, str(1 << 70)]


def test_quoted_csv_and_byte_order_marks(embedder, tmp_path):
    file = tmp_path / "in.csv"
    file.write_bytes('\ufefftext,note\r\n"the ""old"" king,\nand 中国",x\r\n\r\na,\r\n'.encode())
    encode_files(file, tmp_path / "out.jsonl", model=embedder)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["text"], row["note"]) for row in rows] == [('the "old" king,\nand 中国', "x"), ("a", "")]


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("kind", ["parquet", "npy", "jsonl"])
def test_precisions_are_those_of_sentence_transformers(kind, precision, embedder, texts, tmp_path):
    """The steps of int8 are those of all vectors, whatever the shards."""
    from sentence_transformers.util import quantize_embeddings

    source = write_input(tmp_path, "jsonl", texts)
    encode_files(source, tmp_path / "full.npy", model=embedder, options=SMALL)
    full = np.load(tmp_path / "full.npy")
    output = tmp_path / f"out.{kind}"
    encode_files(source, output, model=embedder, options=SMALL, encode_options={"precision": precision})
    expected = full.astype(np.float16) if precision == "float16" else quantize_embeddings(full, precision)
    if kind == "npy":
        found = np.load(output)
    elif kind == "parquet":
        column = pyarrow.parquet.read_table(output).column("embedding").combine_chunks()
        found = column.flatten().to_numpy().reshape(len(texts), -1)
    else:
        found = np.array([json.loads(line)["embedding"] for line in output.read_text().splitlines()])
        expected = expected.astype(found.dtype)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    if precision == "int8" and kind == "parquet":
        about = json.loads(pyarrow.parquet.read_schema(output).metadata[b"gte_deploy"])
        np.testing.assert_array_equal(np.array(about["ranges"], np.float32), [full.min(axis=0), full.max(axis=0)])


def test_options_of_encode(embedder, judge, texts, tmp_path):
    source = write_input(tmp_path, "txt", texts)
    options = {"prompt_name": "query", "normalize_embeddings": True, "truncate_dim": 8}
    encode_files(source, tmp_path / "out.npy", model=embedder, encode_options=options)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), judge.encode(texts, **options), **TOLERANCE)


def test_a_folder_of_files_is_read_in_the_order_of_names(embedder, tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c"], "n": [1.5]}), folder / "b" / "0.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "n": [1, 2], "only": ["x", "y"]}), folder / "a.parquet"
    )
    (folder / "_SUCCESS").touch()
    (folder / ".hidden").touch()
    encode_files(folder, tmp_path / "out.parquet", model=embedder, options=BulkOptions(shard_rows=2))
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").drop(["embedding"]).to_pydict()
    assert found == {"text": ["a", "b", "c"], "n": [1.0, 2.0, 1.5], "only": ["x", "y", None]}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_missing_column_names_those_that_there_are(kind, embedder, texts, tmp_path):
    source = write_input(tmp_path, kind, texts)
    with pytest.raises(InputError, match="no column 'body'; it has id, text"):
        encode_files(source, tmp_path / "out.npy", model=embedder, options=BulkOptions(text_column="body"))
    assert list(tmp_path.iterdir()) == [source], "nothing was done, so nothing is left of it"


def test_a_column_of_numbers_has_no_texts(embedder, texts, tmp_path):
    source = write_input(tmp_path, "parquet", texts)
    with pytest.raises(InputError, match="'id' holds int64"):
        encode_files(source, tmp_path / "out.npy", model=embedder, options=BulkOptions(text_column="id"))


def test_the_column_of_vectors_replaces_none_of_the_input(embedder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a", "embedding": 1}\n')
    with pytest.raises(InputError, match="column embedding.*--embedding-column"):
        encode_files(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model=embedder)
    other = BulkOptions(embedding_column="vector")
    encode_files(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model=embedder, options=other)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["embedding"] == 1 and len(row["vector"]) == 32


@pytest.mark.parametrize(
    ("name", "output", "options", "message"),
    [
        ("none.txt", "out.npy", {}, "no such file"),
        ("in.xml", "out.npy", {}, "'.xml' names no format.*--input-format"),
        ("in.txt", "out.bin", {}, "'.bin' names no format.*--output-format"),
        ("in.txt", "none/out.npy", {}, "folder does not exist"),
        ("in.txt", "in.txt.parquet/x.npy", {}, "folder does not exist"),
        ("in.txt", "folder", {"output_format": "npy"}, "is a folder already"),
        ("in.txt", "out.npy", {"text_column": "body"}, "without columns"),
        ("empty", "out.npy", {}, "the folder has no files"),
        ("mixed", "out.npy", {}, r"several: csv \(a.csv\), jsonl \(b.jsonl\)"),
        ("mixed", "mixed/out.npy", {}, "inside --input"),
        ("in.txt", "out.parquet", {"input_format": "parquet"}, "cannot be read as parquet"),
        ("in.txt", "out.npy", {"input_format": "csv"}, "no column 'text'; it has a"),
        ("bad.jsonl.gz", "out.npy", {}, "cannot be read"),
        ("open.csv", "out.npy", {}, "line 3 is not CSV"),
        ("in.txt", "out.npy", {"shard_rows": 0}, "shard_rows must be an integer from 1"),
        ("in.txt", "out.npy", {"workers": 2}, "workers is for the engine ray"),
        ("in.txt", "out.npy", {"engine": "spark"}, "engine is 'spark'"),
    ],
)
def test_what_is_refused(name, output, options, message, embedder, tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "in.xml").write_text("a\n")
    (tmp_path / "open.csv").write_text('text\na\n"b')
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-20])
    for folder in ("empty", "mixed", "folder"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mixed" / "a.csv").touch()
    (tmp_path / "mixed" / "b.jsonl").touch()
    with pytest.raises(InputError, match=message):
        encode_files(tmp_path / name, tmp_path / output, model=embedder, options=BulkOptions(**options))


def test_lines_need_no_pyarrow_and_other_formats_name_the_extra(embedder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "in.txt").write_text("a\nthe king\n")
    assert encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=embedder).rows == 2
    assert encode_files(tmp_path / "in.txt", tmp_path / "out.jsonl", model=embedder).rows == 2
    with pytest.raises(MissingDependencyError, match=r"\[bulk\]"):
        encode_files(tmp_path / "in.txt", tmp_path / "out.parquet", model=embedder)
    (tmp_path / "in.parquet").touch()
    with pytest.raises(MissingDependencyError, match=r"\[bulk\]"):
        encode_files(tmp_path / "in.parquet", tmp_path / "out2.npy", model=embedder)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_input_without_rows(content, embedder, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    for kind, rows in (
        ("npy", lambda file: len(np.load(file))),
        ("parquet", lambda file: len(pandas.read_parquet(file))),
    ):
        assert encode_files(tmp_path / "in.jsonl", tmp_path / f"out.{kind}", model=embedder).rows == 0
        assert rows(tmp_path / f"out.{kind}") == 0


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "csv", "txt", "documents"])
def test_shards_are_the_same_from_wherever_reading_begins(kind, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("gte_deploy.bulk.shards.MAX_SHARD_BYTES", 1500)
    files = find_files(write_input(tmp_path, kind, texts), BulkOptions())

    def read(cursor):
        shards = read_shards(files, cursor, shard_rows=20, most_bytes=1 << 20)
        return [(shard.cursor, shard.after, shard.texts, shard.is_last) for shard in shards]

    whole = read(Cursor())
    assert len(whole) > 8 and [text for shard in whole for text in shard[2]] == texts
    assert len({len(shard[2]) for shard in whole}) > 2, "some shards end by their bytes"
    for number, (cursor, *_) in enumerate(whole):
        assert read(cursor) == whole[number:]

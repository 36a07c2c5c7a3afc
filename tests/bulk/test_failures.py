"""Rows that cannot be encoded: they are listed with file, row and reason, and all others get their vectors."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.text.inputs import MAX_TEXT_BYTES

LONG = "the " * 200  # the model takes 128 tokens


def failures(output):
    return [json.loads(line) for line in output.with_name(f"{output.name}.failures.jsonl").read_text().splitlines()]


def test_bad_lines_of_json(embedder, judge, tmp_path):
    lines = [
        b'{"text": "a"}',
        b'{"text": null}',
        b"",
        b'{"text": 7}',
        b"[1]",
        b'{"text": "the king"',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"body": "x"}',
        json.dumps({"text": LONG}).encode(),
        json.dumps({"text": "x" * (MAX_TEXT_BYTES + 1)}).encode(),
        b"[" * 100_000,
        b'{"text": "the king"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    output = tmp_path / "out.npy"
    for shard_rows in (1, 4, 100):
        summary = encode_files(
            tmp_path / "in.jsonl", output, model=embedder, options=BulkOptions(shard_rows=shard_rows)
        )
        assert (summary.rows, summary.failures) == (
            2,
            10,
        ) and summary.failures_file == tmp_path / "out.npy.failures.jsonl"
        np.testing.assert_allclose(np.load(output), judge.encode(["a", "the king"]), atol=2e-5)
        found = failures(output)
        assert [(each["row"], each["index"]) for each in found] == [
            (1, 1), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6), (8, 7), (9, 8), (10, 9), (11, 10),
        ]  # fmt: skip
        assert {each["file"] for each in found} == {"in.jsonl"}
        expected = (
            "null",
            "type int",
            "holds list",
            "not JSON",
            "not UTF-8: invalid start byte at byte 10",
            "lone surrogate",
            "no column 'text'; it has body",
            "202 tokens, special tokens included; the limit is 128",
            f"{MAX_TEXT_BYTES + 1:,} bytes",
            "not JSON",
        )
        for each, words in zip(found, expected, strict=True):
            assert words in each["reason"]


def test_bad_rows_of_parquet_and_csv(embedder, tmp_path):
    offsets = pyarrow.py_buffer(np.array([0, 1, 2, 2, 3], np.int32))
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 4, [pyarrow.py_buffer(b"\x0b"), offsets, pyarrow.py_buffer(b"a\xffb")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [0, 1, 2, 3]}), tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    encode_files(tmp_path / "in.parquet", output, model=embedder)
    assert pyarrow.parquet.read_table(output, columns=["text", "n"]).to_pydict() == {"text": ["a", "b"], "n": [0, 3]}
    assert [(each["row"], each["reason"].split(":")[0]) for each in failures(output)] == [
        (1, "the text is not UTF-8"),
        (2, "the text is null"),
    ]
    (tmp_path / "in.csv").write_bytes(b"text,n\na,1\nb\nc,\xff\nd,4,5\nthe king,6\n")
    output = tmp_path / "csv.jsonl"
    encode_files(tmp_path / "in.csv", output, model=embedder)
    assert [json.loads(line)["n"] for line in output.read_text().splitlines()] == ["1", "6"]
    assert [(each["row"], each["reason"]) for each in failures(output)] == [
        (1, "the record has 1 values, and the header 2"),
        (2, "the record is not UTF-8"),
        (3, "the record has 3 values, and the header 2"),
    ]


def test_lines_and_documents_that_are_not_utf8(embedder, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"a\n\xff\nthe king\n")
    summary = encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=embedder)
    assert (summary.rows, summary.failures) == (2, 1) and failures(tmp_path / "out.npy")[0]["row"] == 1
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff")
    (folder / "b.md").write_text("the king")
    (folder / "c.txt").write_bytes(b"x" * (MAX_TEXT_BYTES + 1))
    summary = encode_files(folder, tmp_path / "out.jsonl", model=embedder)
    assert json.loads((tmp_path / "out.jsonl").read_text())["path"] == "b.md"
    assert [each["file"] for each in failures(tmp_path / "out.jsonl")] == ["a.txt", "c.txt"]


def test_a_line_without_end_is_not_kept_in_memory(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr("gte_deploy.bulk.rows.MAX_LINE_BYTES", 1000)
    (tmp_path / "in.txt").write_bytes(b"a\n" + b"x" * 5000 + b"\nthe king\n" + b"y" * 1000)
    summary = encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=embedder)
    assert (summary.rows, summary.failures) == (2, 2)
    assert [each["reason"] for each in failures(tmp_path / "out.npy")] == ["the line has more than 1,000 bytes"] * 2


def test_long_texts_are_cut_on_request(embedder, judge, tmp_path):
    (tmp_path / "in.txt").write_text(f"a\n{LONG}\n")
    options = {"truncation": True}
    summary = encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=embedder, encode_options=options)
    assert summary.failures == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), judge.encode(["a", LONG]), atol=2e-5)


def test_vectors_that_are_not_finite_are_failures(embedder, tmp_path, monkeypatch):
    """One text gives NaN, one a number that float16 cannot hold; the others keep their places."""
    texts = ["a", "the king", "old water", "new house", "day"]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    encode_files(tmp_path / "in.txt", tmp_path / "good.npy", model=embedder)
    encode = type(embedder).encode

    def broken(self, asked, **options):
        if "the king" in asked:
            raise __import__("gte_deploy").NonFiniteError("NaN for input 1")
        found = encode(self, asked, **options)
        return np.stack([row * 1e6 if text == "new house" else row for text, row in zip(asked, found, strict=True)])

    monkeypatch.setattr(type(embedder), "encode", broken)
    output = tmp_path / "out.npy"
    summary = encode_files(tmp_path / "in.txt", output, model=embedder, encode_options={"precision": "float16"})
    assert (summary.rows, summary.failures) == (3, 2)
    assert [(each["row"], each["reason"][:10]) for each in failures(output)] == [(1, "NaN for in"), (3, "the vector")]
    np.testing.assert_allclose(np.load(output), np.load(tmp_path / "good.npy")[[0, 2, 4]], atol=2e-3)


def test_all_rows_may_fail_and_old_failures_go_away(embedder, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"text": null}\n{"text": 1}\n')
    assert encode_files(source, output, model=embedder).rows == 0
    assert len(failures(output)) == 2 and len(pyarrow.parquet.read_table(output)) == 0
    source.write_text('{"text": "a"}\n')
    assert encode_files(source, output, model=embedder).failures_file is None
    assert not output.with_name("out.parquet.failures.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncate_dim": 0}, "truncate_dim"),
        ({"prompt_name": "nothing"}, "prompt_name 'nothing'"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"max_length": 1}, "max_length"),
        ({"output_value": None}, "output_value is not an option for files"),
    ],
)
def test_wrong_arguments_are_an_error_and_no_failure_of_rows(arguments, message, embedder, tmp_path):
    from gte_deploy.core.errors import InputError

    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(InputError, match=message):
        encode_files(tmp_path / "in.txt", tmp_path / "out.npy", model=embedder, encode_options=arguments)

"""`gte-deploy encode` with files: what it prints, its exit codes, and what it refuses."""

import json

import numpy as np
import pytest

import gte_deploy
from gte_deploy import cli
from gte_deploy.core import exit_codes


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"body": "a"}\n{"body": null}\n{"body": "the king"}\n')
    return file


def test_failures_decide_the_exit_code(run, word_checkpoints, source, tmp_path):
    output = tmp_path / "out.npy"
    arguments = ("encode", "-m", word_checkpoints["embed"], "-i", source, "-o", output, "--text-column", "body")
    code, out, err = run(*arguments)
    assert (code, out) == (exit_codes.FAILURE, "") and len(np.load(output)) == 2
    assert "wrote" in err and "(2, 32) float32, 1 failed" in err
    assert "1 rows have no vector, and --max-failures is 0; " in err and "out.npy.failures.jsonl says why" in err
    assert run(*arguments, "--max-failures", 1)[0] == exit_codes.OK
    code, out, err = run(*arguments, "--max-failures", 1, "--json", "--quiet")
    found = json.loads(out)
    assert (code, err) == (exit_codes.OK, "")
    assert found.pop("seconds") > 0 and found.pop("tokens") == 3 + 4
    assert found == {
        "output": str(output),
        "rows": 2,
        "form": "(2, 32) float32",
        "failures": 1,
        "failures_file": f"{output}.failures.jsonl",
        "resumed_rows": 0,
    }


def test_chunks_are_rows(run, word_checkpoints, source, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ("-i", source, "-o", output, "--text-column", "body", "--chunks", "tokens:1", "--max-failures", 1)
    assert run("encode", "-m", word_checkpoints["embed"], *arguments)[0] == exit_codes.OK
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["body"], row["chunk_start"], row["chunk_end"]) for row in rows] == [
        ("a", 0, 1), ("the", 0, 3), ("king", 4, 8),
    ]  # fmt: skip


def test_the_commands_of_other_vectors(run, source, tmp_path):
    """Each writes what its Python method gives, from checkpoints, whose task it sets."""
    from hybrid_reference import make_hybrid_checkpoint

    checkpoint, output = make_hybrid_checkpoint(tmp_path / "checkpoint"), tmp_path / "out.jsonl"
    files = ("-i", source, "-o", output, "--text-column", "body", "--max-failures", 1)
    with gte_deploy.load(checkpoint, backend="torch", task="hybrid") as model:
        expected = model.encode_hybrid(["a", "the king"], prompt_name="query", as_dict=True)
    more = ("-m", checkpoint, "--backend", "torch", "--prompt-name", "query")
    for command, names in (("encode-hybrid", ("embedding", "embedding_sparse")), ("encode-sparse", ("v",))):
        column = ("--embedding-column", "v") if names == ("v",) else ()
        code, _, err = run(command, *more, *files, *column)
        assert code == exit_codes.OK, err
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row.keys() for row in rows] == [{"body", *names}] * 2
        found = [{each["token"]: each["weight"] for each in row[names[-1]]} for row in rows]
        assert found == [pytest.approx(each, abs=2e-5) for each in expected.sparse]
        if len(names) == 2:
            np.testing.assert_allclose([row["embedding"] for row in rows], expected.dense, atol=2e-5)
    code, _, err = run("encode-multi-vector", *more, *files)
    assert code == exit_codes.USAGE and "this needs a multi-vector model" in err
    for command in ("encode-hybrid", "encode-sparse", "encode-multi-vector"):
        code, _, err = run(command, "-m", checkpoint, "a", "-o", output)
        assert code == exit_codes.USAGE and "is for files: give --input FILE, too" in err
        code, _, err = run(command, "-m", checkpoint, "a", "--restart")
        assert code == exit_codes.USAGE and "--restart is for files" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--shard-rows", 5), "--shard-rows is for files: give --input FILE and --output FILE"),
        (("a", "--max-failures", 5), "--max-failures is for files"),
        (("a", "--engine", "ray"), "--engine is for files"),
        (("a", "--precision", "float16"), "precision is 'float16'"),
        (("a", "-o", "{folder}/out.parquet"), "a list of texts is written as .npy"),
        (
            ("-i", "{folder}/in.jsonl", "-o", "{folder}/out.npy"),
            "it has body. Name the column of the texts, as in --text-column body.",
        ),
        (("-i", "{folder}/in.jsonl", "-o", "{folder}/out.npy", "--text-column", "body", "--prompt-name", "x"), "'x'"),
    ],
)
def test_what_is_refused(arguments, message, run, word_checkpoints, source, tmp_path):
    arguments = [str(argument).replace("{folder}", str(tmp_path)) for argument in arguments]
    code, _, err = run("encode", "-m", word_checkpoints["embed"], *arguments)
    assert code == exit_codes.USAGE and message in err

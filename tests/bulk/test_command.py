"""`gte-deploy encode` with files: what it prints, its exit codes, and what it refuses."""

import json

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--shard-rows", 5), "--shard-rows is for files: give --input FILE and --output FILE"),
        (("a", "--max-failures", 5), "--max-failures is for files"),
        (("a", "--engine", "ray"), "--engine is for files"),
        (("a", "--precision", "float16"), "precision is 'float16'"),
        (("a", "-o", "{folder}/out.parquet"), "a list of texts is written as .npy"),
        (("-i", "{folder}/in.jsonl", "-o", "{folder}/out.npy"), "no column 'text'; it has body"),
        (("-i", "{folder}/in.jsonl", "-o", "{folder}/out.npy", "--text-column", "body", "--prompt-name", "x"), "'x'"),
    ],
)
def test_what_is_refused(arguments, message, run, word_checkpoints, source, tmp_path):
    arguments = [str(argument).replace("{folder}", str(tmp_path)) for argument in arguments]
    code, _, err = run("encode", "-m", word_checkpoints["embed"], *arguments)
    assert code == exit_codes.USAGE and message in err

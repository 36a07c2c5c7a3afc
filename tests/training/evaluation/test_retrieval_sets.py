"""The layouts of retrieval sets, as BEIR, MLDR and LongEmbed publish them, in a folder and in the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from gte_deploy.core.errors import InputError
from gte_deploy.core.exit_codes import OK, USAGE
from gte_deploy.training.cli import main
from gte_deploy.training.evaluation.retrieval_sets import (
    RetrievalSet,
    open_retrieval_set,
    read_long_embed,
    retrieval_folder,
)
from retrieval_layouts import LENGTHS, MLDR_TEST, write_lines, write_long_embed, write_mldr

MLDR = RetrievalSet(
    {f"doc-en-{i}": f"text {i}" for i in range(3)},
    {f"q-en-{i}": f"question {i}" for i in range(2)},
    {f"q-en-{i}": {f"doc-en-{i}": 1.0} for i in range(2)},
)


def cache(folder: Path, name: str, revision: str) -> Path:
    """The folder of a dataset's snapshot in the hub's cache, which `main` points to."""
    repository = folder / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return repository / "snapshots" / revision


def test_mldr_is_read_as_it_is_published(tmp_path: Path):
    folder = str(write_mldr(tmp_path) / "mldr-v1.0-en")
    assert open_retrieval_set(folder) == MLDR
    assert open_retrieval_set(folder, split="dev").judged == ["q-en-0"]


def test_long_embed_is_read_as_it_is_published(tmp_path: Path):
    write_long_embed(tmp_path)
    found = open_retrieval_set(str(tmp_path / "qmsum"))
    assert found.corpus["d2"] == "meeting 2" and found.qrels == {"q0": {"d0": 1.0}, "q1": {"d1": 1.0}}
    lengths = read_long_embed(tmp_path / "passkey")
    assert list(lengths) == list(LENGTHS)
    for length in LENGTHS:  # the documents of the other length have the same ids
        assert set(lengths[length].corpus.values()) == {f"the pass key of n{i} is {length}" for i in range(4)}
        assert lengths[length].judged == ["q0", "q1"]
    with pytest.raises(InputError, match="gte-train needles --longembed"):
        open_retrieval_set(str(tmp_path / "passkey"))


def test_the_hubs_datasets_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tests are offline, so the hub's own client finds the files in its cache, at the revision that is asked for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    write_mldr(cache(tmp_path, "Shitao/MLDR", "a" * 40))
    write_long_embed(cache(tmp_path, "dwzhu/LongEmbed", "b" * 40))
    assert open_retrieval_set("hf:Shitao/MLDR:en") == MLDR
    assert open_retrieval_set(f"hf:Shitao/MLDR@{'a' * 40}:en") == MLDR
    assert retrieval_folder("hf:dwzhu/LongEmbed:qmsum").name == "qmsum"
    assert list(read_long_embed(retrieval_folder("hf:dwzhu/LongEmbed:passkey"))) == list(LENGTHS)
    with pytest.raises(InputError, match=r"has no fr/corpus\.jsonl or mldr-v1\.0-fr/corpus\.jsonl"):
        open_retrieval_set("hf:Shitao/MLDR:fr")
    for missing in ("hf:Shitao/Other:en", f"hf:Shitao/MLDR@{'c' * 40}:en"):
        with pytest.raises(InputError, match="the hub did not give the dataset .*HF_HUB_OFFLINE"):
            open_retrieval_set(missing)


def test_the_command_takes_every_layout(tmp_path: Path, capsys):
    write_mldr(tmp_path)
    assert main(["retrieval", "--data", str(tmp_path / "mldr-v1.0-en"), "--json"]) == OK
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "bm25" and row["figures"]["ndcg@10"]["mean"] == 1.0
    assert main(["retrieval", "--data", str(tmp_path / "nowhere")]) == USAGE
    assert "is no folder; expected one, or hf:NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("corpus.jsonl.gz", [{"id": "a", "text": "b"}], "expected the field docid; it has id, text"),
        ("test.jsonl.gz", [{"query_id": "a", "query": "b", "positive_passages": "c"}], "expected positive_passages"),
        ("test.jsonl.gz", [{**MLDR_TEST[0], "positive_passages": []}], "no query has a relevant document"),
        ("test.jsonl.gz", [{**MLDR_TEST[0], "query": None}], "expected the field query"),
    ],
)
def test_other_records_are_refused(tmp_path: Path, file, rows, message):
    folder = write_mldr(tmp_path) / "mldr-v1.0-en"
    write_lines(folder / file, rows)
    with pytest.raises(InputError, match=message):
        open_retrieval_set(str(folder))


def test_damaged_and_missing_files_are_refused(tmp_path: Path):
    folder = write_mldr(tmp_path) / "mldr-v1.0-en"
    whole = (folder / "corpus.jsonl.gz").read_bytes()
    (folder / "corpus.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(InputError, match="cannot be read as JSON lines"):
        open_retrieval_set(str(folder))
    with pytest.raises(InputError, match=r"has no corpus\.jsonl\. Expected the layout of BEIR, or a folder of MLDR"):
        open_retrieval_set(str(tmp_path))
    write_long_embed(tmp_path)
    (tmp_path / "qmsum/qrels.jsonl").write_text('{"qid": "q0", "doc_id": "d0", "context_length": 256}\n')
    with pytest.raises(InputError, match="not of the same context_lengths"):
        read_long_embed(tmp_path / "qmsum")
    (tmp_path / "qmsum/qrels.jsonl").write_text('{"qid": "q0", "doc_id": "d0", "context_length": "long"}\n')
    with pytest.raises(InputError, match="context_length is 'long'"):
        read_long_embed(tmp_path / "qmsum")
    (tmp_path / "qmsum/queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"queries\.jsonl cannot be read"):
        read_long_embed(tmp_path / "qmsum")

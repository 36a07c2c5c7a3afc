"""Pairs: every file form gives the same rows, negatives are split and mined, and bad data is refused by its place."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.training.finetune.data import mine_negatives, read_pairs, relevance_of, rows_fingerprint, training_rows
from gte_deploy.training.finetune.recipe import HardNegatives

ROWS = [{"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(3)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    found = [write_jsonl(tmp_path / "rows.jsonl", ROWS)]
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        found.append(str(tmp_path / name))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return [*found, str(tmp_path / "rows.parquet")]


def test_every_form_of_file_gives_the_same_rows(files, make_finetune):
    for file in files:
        assert list(read_pairs([file], make_finetune())) == ROWS
    assert len(read_pairs(files, make_finetune())) == 4 * len(ROWS)


def test_columns_have_their_usual_names_or_the_recipes(tmp_path, make_finetune):
    rows = [{"id": "1", "question": "a", "answer": "b", "title": "c"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_pairs([file], make_finetune())) == [{"query": "a", "positive": "b"}]
    named = make_finetune(columns={"positive": "title"})
    assert list(read_pairs([file], named)) == [{"query": "a", "positive": "c"}]
    with pytest.raises(InputError, match="positive is missing"):
        read_pairs([file], make_finetune(columns={"positive": "nothing"}))


def test_lists_of_negatives_become_columns(tmp_path, make_finetune):
    rows = [
        {"query": "a", "positive": "b", "negatives": ["c", "d", "e"]},
        {"query": "f", "positive": "g", "negatives": ["h", "i"]},
    ]
    found = read_pairs([write_jsonl(tmp_path / "rows.jsonl", rows)], make_finetune())
    assert list(found) == [
        {"query": "a", "positive": "b", "negative_1": "c", "negative_2": "d"},
        {"query": "f", "positive": "g", "negative_1": "h", "negative_2": "i"},
    ]


def test_pairs_with_scores(tmp_path, make_finetune):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0.5}]
    found = read_pairs([write_jsonl(tmp_path / "rows.jsonl", rows)], make_finetune(loss={"name": "cosent"}))
    assert list(found) == [{"query": "a", "document": "b", "score": 1.0}, {"query": "c", "document": "d", "score": 0.5}]
    with pytest.raises(InputError, match="Take the loss cosent"):
        training_rows(found, make_finetune())
    assert training_rows(found, make_finetune("rerank")) is found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "a", "positive": " "}], "column positive is empty in 1 rows, the first being 1"),
        ([{"query": "a", "positive": None}, {"query": "a", "positive": "b"}], "column positive is empty in 1 rows"),
        ([{"query": 3, "positive": "b"}], "column query holds int64; expected texts"),
        ([{"query": "a"}], "positive is missing"),
        ([{"query": "a", "positive": "b", "negatives": []}], "empty list"),
        ([{"query": "a", "document": "b", "score": "high"}], "column score is no number"),
    ],
)
def test_bad_rows_are_refused(tmp_path, make_finetune, rows, message):
    with pytest.raises(InputError) as refused:
        read_pairs([write_jsonl(tmp_path / "rows.jsonl", rows)], make_finetune())
    assert message in str(refused.value) and "rows.jsonl" in str(refused.value)


def test_bad_files_are_refused(tmp_path, make_finetune):
    (tmp_path / "broken.jsonl").write_text('{"query": "a", \n')
    (tmp_path / "notes.txt").write_text("a")
    for name in ("broken.jsonl", "notes.txt", "nowhere.jsonl"):
        with pytest.raises(InputError, match=name):
            read_pairs([str(tmp_path / name)], make_finetune())


def test_files_must_have_the_same_columns(tmp_path, files, make_finetune):
    other = write_jsonl(tmp_path / "other.jsonl", [{"query": "a", "positive": "b"}])
    with pytest.raises(InputError, match="other.jsonl has query, positive, and"):
        read_pairs([files[0], other], make_finetune())


def test_bm25_mines_documents_that_share_words_and_are_no_answer():
    rows = datasets.Dataset.from_list(
        [
            {"query": "red old house", "positive": "a red old house on the hill"},
            {"query": "red old house", "positive": "the old house is red"},
            {"query": "old car", "positive": "an old car"},
            {"query": "red car", "positive": "a red car that is fast"},
            {"query": "nothing alike", "positive": "something else"},
        ]
    )
    mined = mine_negatives(rows, HardNegatives(count=2, depth=10))
    answers = {"a red old house on the hill", "the old house is red"}
    assert [row["query"] for row in mined] == ["red old house", "red old house", "old car", "red car"]
    for row in mined:
        negatives = {row["negative_1"], row["negative_2"]}
        assert len(negatives) == 2 and row["positive"] not in negatives
        if row["query"] == "red old house":
            assert not negatives & answers
    with pytest.raises(InputError, match="no query has 5 negatives"):
        mine_negatives(rows, HardNegatives(count=5, depth=10))


def test_a_model_mines_what_it_finds_similar(half_checkpoint, pairs_file, make_finetune):
    rows = read_pairs([str(pairs_file)], make_finetune())
    options = HardNegatives(count=1, model=str(half_checkpoint), relative_margin=None)
    mined = mine_negatives(rows.select(range(8)), options)
    assert mined.column_names == ["query", "positive", "negative_1"]
    assert all(row["positive"] != row["negative_1"] for row in mined)


def test_a_reranker_learns_labels(files, pairs_file, make_finetune):
    recipe = make_finetune("rerank")
    rows = training_rows(read_pairs(files[:1], recipe), recipe)
    assert rows[0] == {"query": "q 0", "document": "p 0", "label": 1.0}
    assert rows[1] == {"query": "q 0", "document": "n 0", "label": 0.0} and len(rows) == 6
    with pytest.raises(InputError, match="no negatives"):
        training_rows(read_pairs([str(pairs_file)], recipe), recipe)


def test_rows_make_a_retrieval_set():
    rows = [("a", "x"), ("a", "y"), ("b", "x")]
    corpus, queries, qrels = relevance_of(datasets.Dataset.from_list([{"query": q, "positive": p} for q, p in rows]))
    assert sorted(corpus.values()) == ["x", "y"] and sorted(queries.values()) == ["a", "b"]
    named = {queries[q]: {corpus[d] for d in found} for q, found in qrels.items()}
    assert named == {"a": {"x", "y"}, "b": {"x"}}


def test_the_fingerprint_tells_rows_and_their_order(tmp_path, make_finetune):
    first = read_pairs([write_jsonl(tmp_path / "a.jsonl", ROWS)], make_finetune())
    same = read_pairs([write_jsonl(tmp_path / "b.jsonl", ROWS)], make_finetune())
    other = read_pairs([write_jsonl(tmp_path / "c.jsonl", ROWS[::-1])], make_finetune())
    assert rows_fingerprint(first) == rows_fingerprint(same) != rows_fingerprint(other)

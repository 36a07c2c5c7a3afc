"""The readers of XTREME-R's data: the files of the authors and of XTREME's script, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.training.evaluation import xtreme_data as data_sets
from xtreme_data import questions, squad, write, write_json_lines, write_toy_xtreme


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_xtreme(tmp_path_factory.mktemp("xtreme"), train=4, test=3)


# --- classification ---------------------------------------------------------------------------------------------------


def test_nli_is_read_from_glue_and_from_the_archive_of_xnli(toy: Path):
    assert len(data_sets.load_mnli(toy)) == 4
    english = data_sets.load_xnli(toy, "en")
    assert len(english) == 3 and english.texts == data_sets.load_xnli(toy, "zh").texts
    with pytest.raises(InputError, match="language sw holds no example"):
        data_sets.load_xnli(toy, "sw")


def test_nli_is_read_from_the_files_of_xtreme(tmp_path: Path):
    write(tmp_path / "xnli/train-en.tsv", 'a "quoted" one\tb\tneutral\r\n"tab\there"\tb\tcontradiction\r\n')
    write(tmp_path / "xnli/test-de.tsv", "a\tb\tentailment\n")
    examples = data_sets.load_mnli(tmp_path)
    assert examples.texts == [('a "quoted" one', "b"), ("tab\there", "b")] and examples.labels.tolist() == [1, 2]
    assert data_sets.load_xnli(tmp_path, "de").labels.tolist() == [0]
    write(tmp_path / "xnli/test-fr.tsv", "a\tb\n")
    with pytest.raises(InputError, match="example 1: expected two texts and one of entailment"):
        data_sets.load_xnli(tmp_path, "fr")


def test_choices_follow_a_question(toy: Path):
    copa = data_sets.load_xcopa(toy, "zh")
    assert copa.num_choices == 2 and len(copa.labels) == 3
    assert copa.texts[0][0] == copa.texts[1][0] == "w72 What was the cause?"
    assert copa.texts[copa.labels[0]][1].startswith("w10 ")
    siqa = data_sets.load_siqa(toy)
    assert siqa.num_choices == 3 and siqa.texts[0][0] == "w70 w71"
    assert siqa.texts[siqa.labels[0]][1].startswith("w10 ")


def test_siqa_is_read_with_its_list_of_labels(tmp_path: Path):
    row = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "d"}
    write_json_lines(tmp_path / "siqa/train.jsonl", [row, row])
    with pytest.raises(InputError, match=r"train-labels\.lst is missing"):
        data_sets.load_siqa(tmp_path)
    write(tmp_path / "siqa/train-labels.lst", "3\n1\n")
    assert data_sets.load_siqa(tmp_path).labels.tolist() == [2, 0]
    write(tmp_path / "siqa/train-labels.lst", "3\n4\n")
    with pytest.raises(InputError, match="none of the 3 choices"):
        data_sets.load_siqa(tmp_path)


# --- tags -------------------------------------------------------------------------------------------------------------

# From the format's own examples: a word of two parts, an empty node, comments, and a word with a space.
CONLLU = """# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t_\t_
4\tel\tel\tDET\t_\t_\t5\tdet\t_\t_
4.1\tgran\tgran\tADJ\t_\t_\t_\t_\t_\t_
5\tmar mar\tmar\tNOUN\t_\t_\t1\tobl\t_\t_

# sent_id = 2
1\tsí\tsí\tINTJ\t_\t_\t0\troot\t_\t_
"""


def test_words_of_treebanks_are_read_as_they_are_written(tmp_path: Path):
    for bank in ("A", "B"):
        write(tmp_path / f"ud-treebanks-v2.7/UD_Spanish-{bank}/es_{bank.lower()}-ud-test.conllu", CONLLU)
    sentences = data_sets.load_udpos(tmp_path, "es", "test")
    assert sentences.words == [["vámonos", "al", "marmar"], ["sí"]] * 2
    assert sentences.tags == [["VERB", "ADP", "NOUN"], ["INTJ"]] * 2
    with pytest.raises(InputError, match="neither udpos/train-es.tsv nor"):
        data_sets.load_udpos(tmp_path, "es", "train")


def test_tags_are_read_from_tables(tmp_path: Path):
    write(tmp_path / "udpos/test-af.tsv", "die\tDET\nsee\tNOUN\n\nja\tINTJ\n")
    assert data_sets.load_udpos(tmp_path, "af", "test").tags == [["DET", "NOUN"], ["INTJ"]]
    write(tmp_path / "wikiann/af/test", "af:Kaap\tB-LOC\naf:Stad\tI-LOC\n\naf:a:b\tO\n\n")
    sentences = data_sets.load_wikiann(tmp_path, "af", "test")
    assert sentences.words == [["Kaap", "Stad"], ["a:b"]] and sentences.tags == [["B-LOC", "I-LOC"], ["O"]]
    write(tmp_path / "panx/test-nl.tsv", "Kaap\n")
    with pytest.raises(InputError, match=r"unknown tags ''; expected O, B-PER"):
        data_sets.load_wikiann(tmp_path, "nl", "test")


# --- answers ----------------------------------------------------------------------------------------------------------


def test_questions_are_read_from_files_of_squad(toy: Path):
    for items in (data_sets.load_squad(toy), data_sets.load_xquad(toy, "zh"), data_sets.load_mlqa(toy, "en")):
        for item in items:
            assert item.context[item.start :].startswith(item.answers[0])


def test_only_english_questions_train_tydiqa(toy: Path):
    assert len(data_sets.load_tydiqa_train(toy)) == 4 and len(data_sets.load_tydiqa(toy, "en")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not in the form of SQuAD"),
        ('{"data": []}', "holds no question"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "q", "question": "?"}]}]}]}', "'q' has no answer"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text, message):
    write(tmp_path / "xquad/xquad.en.json", text)
    with pytest.raises(InputError, match=message):
        data_sets.load_xquad(tmp_path, "en")
    with pytest.raises(InputError, match=r"has no xquad/xquad\.de\.json"):
        data_sets.load_xquad(tmp_path, "de")


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_all_languages_search_the_texts_of_all(tmp_path: Path):
    rows = questions(3, 0)
    write(tmp_path / "lareqa/xquad-r/en.json", squad([*rows, rows[0]]))
    write(tmp_path / "lareqa/xquad-r/de.json", squad(questions(2, 1)))
    found = data_sets.load_lareqa(tmp_path, ["en", "de"])
    assert len(found.passages) == 5  # a text stands once
    assert found.relevant == {"en": [{0}, {1}, {2}, {0}], "de": [{3}, {4}]}
    assert found.passages[3] == questions(2, 1)[0][1]


def test_translations_that_stand_twice_are_one_passage(tmp_path: Path):
    write(tmp_path / "tatoeba/tatoeba.deu-eng.deu", "ja\njawohl\nnein\n")
    write(tmp_path / "tatoeba/tatoeba.deu-eng.eng", "yes\nyes\nno\n")
    found = data_sets.load_tatoeba(tmp_path, "de")
    assert found.passages == ["yes", "no"] and found.relevant["de"] == [{0}, {0}, {1}]
    write(tmp_path / "tatoeba/tatoeba.deu-eng.eng", "yes\n")
    with pytest.raises(InputError, match="3 sentences and 1 translations"):
        data_sets.load_tatoeba(tmp_path, "de")


def test_mentions_are_marked_in_their_sentence(toy: Path, tmp_path: Path):
    pairs = data_sets.load_mewslix_train(toy)
    assert pairs.queries[1] == "w61: w53 { w61 } w54." and pairs.passages[1] == "w61 w50."
    found = data_sets.load_mewslix(toy, ["zh"])
    assert found.queries == {"zh": [f"w{60 + i}: w53 {{ w{60 + i} }} w54." for i in range(3)]}
    assert found.relevant["zh"] == [{0}, {1}, {2}] and len(found.passages) == 60


def changed_mention(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    context = {"language": "en", "text": "a {b} c", "sentence_spans": [{"start": 0, "end": 7}]}
    row = {"context": context, "mention": {"mention_span": {"start": 6, "end": 7}, "entity_id": "Q1"}}
    change(row)
    return row


def test_braces_of_the_text_mark_no_mention(tmp_path: Path):
    entity = {"entity_id": "Q1", "description": "c\nis  a letter", "sentence_spans": []}
    write_json_lines(tmp_path / "mewslix/candidate_set_entities.jsonl", [entity])
    write_json_lines(tmp_path / "mewslix/wikinews_mentions-test.jsonl", [changed_mention(lambda row: None)])
    found = data_sets.load_mewslix(tmp_path, ["en"])
    assert found.queries["en"] == ["c: a (b) { c }"] and found.passages == ["c is a letter"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["mention"].update(entity_id="Q2"), "no candidate is the entity 'Q2'"),
        (lambda row: row["context"].update(sentence_spans=[]), "lies in no sentence"),
        (lambda row: row["mention"].pop("mention_span"), "not in the form of Mewsli-X"),
        (lambda row: row["context"].update(language="xx"), "no mention in the languages en"),
    ],
)
def test_wrong_mentions_are_refused(tmp_path: Path, change, message):
    write_json_lines(tmp_path / "mewslix/candidate_set_entities.jsonl", [{"entity_id": "Q1", "description": "c"}])
    write_json_lines(tmp_path / "mewslix/wikinews_mentions-test.jsonl", [changed_mention(change)])
    with pytest.raises(InputError, match=message):
        data_sets.load_mewslix(tmp_path, ["en"])


def test_lines_that_are_no_objects_are_refused(tmp_path: Path):
    for text, message in (("[1]\n", "line 1: expected an object"), ("{\n", "line 1: not JSON")):
        write(tmp_path / "COPA/train.jsonl", text)
        with pytest.raises(InputError, match=message):
            data_sets.load_copa(tmp_path)
    write(tmp_path / "COPA/train.jsonl", json.dumps({"label": 0, "choice1": "a", "choice2": "b"}) + "\n")
    with pytest.raises(InputError, match="no field 'premise'"):
        data_sets.load_copa(tmp_path)

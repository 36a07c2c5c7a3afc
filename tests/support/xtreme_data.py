"""An XTREME-R of a few learnable examples, in the files that its authors publish."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glue_data import toy_rows

NOISE = tuple(f"w{i}" for i in range(50, 256))
LANGUAGES = ("en", "zh")
_NLI = ("entailment", "neutral", "contradiction")
_CAUSES = ("cause", "effect")


def write_toy_xtreme(folder: Path, *, train: int = 96, test: int = 24) -> Path:
    """Write all ten tasks with `train` and `test` examples each; every language has the same words, so all transfer."""
    _write_nli(folder, train, test)
    _write_choices(folder, train, test)
    _write_tags(folder, train, test)
    _write_answers(folder, train, test)
    _write_retrieval(folder, train, test)
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_nli(folder: Path, train: int, test: int) -> None:
    rows = toy_rows(train, 0, classes=3)
    lines = [f"{i}\t{i}\t{text}\tw60\t{_NLI[label]}" for i, (text, label) in enumerate(rows)]
    write(folder / "MNLI/train.tsv", "\n".join(["index\tpromptID\tsentence1\tsentence2\tgold_label", *lines]) + "\n")
    header = "language\tgold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    lines = [f"{header}\tsentence1\tsentence2\tpromptID\tpairID\tgenre\tlabel1\tmatch"]
    for language in ("ar", *LANGUAGES):
        for text, label in toy_rows(test, 1, classes=3):
            lines.append(f"{language}\t{_NLI[label]}\t\t\t\t\t{text}\tw60\t1\t1\tg\t{_NLI[label]}\tTrue")
    write(folder / "XNLI-1.0/xnli.test.tsv", "\n".join(lines) + "\n")


def _write_choices(folder: Path, train: int, test: int) -> None:
    """The right choice is the one with the word w10."""

    def rows(count: int, seed: int, names: tuple[str, ...]) -> Iterable[tuple[dict[str, str], int]]:
        rng = random.Random(seed)
        for _ in range(count):
            label = rng.randrange(len(names))
            choices = [f"{'w10 ' if place == label else ''}{rng.choice(NOISE)}" for place in range(len(names))]
            yield dict(zip(names, choices, strict=True)), label

    answers = ("answerA", "answerB", "answerC")
    siqa = [
        {"context": "w70", "question": "w71", **texts, "correct": "ABC"[label]}
        for texts, label in rows(train, 2, answers)
    ]
    write_json_lines(folder / "siqa/socialIQa_v1.4_trn.jsonl", siqa)

    def copa(count: int, seed: int) -> list[dict[str, Any]]:
        found = rows(count, seed, ("choice1", "choice2"))
        return [
            {"premise": "w72", **texts, "question": _CAUSES[i % 2], "label": label, "idx": i}
            for i, (texts, label) in enumerate(found)
        ]

    write_json_lines(folder / "COPA/train.jsonl", copa(train, 3))
    for language in ("it", "zh"):
        write_json_lines(folder / f"xcopa/data/{language}/test.{language}.jsonl", copa(test, 4))


def _write_tags(folder: Path, train: int, test: int) -> None:
    """w5 to w9 are nouns and begin a place; all other words are verbs and outside."""
    for split, count in (("train", train), ("test", test)):
        for language in LANGUAGES:
            rng = random.Random(f"{split}")
            conllu, wikiann = [], []
            for _ in range(count):
                words = [f"w{rng.choice([5, 6, 7, 8, 9, *range(50, 60)])}" for _ in range(rng.randint(2, 7))]
                nouns = [int(word[1:]) < 10 for word in words]
                rows = (
                    f"{i}\t{word}\t_\t{'NOUN' if noun else 'VERB'}\t_\t_\t0\troot\t_\t_"
                    for i, (word, noun) in enumerate(zip(words, nouns, strict=True), start=1)
                )
                conllu.append("\n".join(["# text = ...", *rows]) + "\n\n")
                wikiann += [f"{language}:{w}\t{'B-LOC' if n else 'O'}" for w, n in zip(words, nouns, strict=True)] + [
                    ""
                ]
            name = f"ud-treebanks-v2.7/UD_X-{language}/{language}_x-ud-{split}.conllu"
            write(folder / name, "".join(conllu))
            write(folder / f"wikiann/{language}/{split}", "\n".join(wikiann) + "\n")


def squad(rows: Iterable[tuple[str, str, str, int]], *, id_prefix: str = "") -> str:
    """Questions as SQuAD writes them, from (question, context, answer, start)."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": f"{id_prefix}{i}",
                    "question": question,
                    "answers": [{"text": answer, "answer_start": start}],
                }
            ],
        }
        for i, (question, context, answer, start) in enumerate(rows)
    ]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


def questions(count: int, seed: int) -> list[tuple[str, str, str, int]]:
    """The answer is the word after w10; the question has another word of the text, too."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [rng.choice(NOISE) for _ in range(rng.randint(3, 8))]
        place = rng.randrange(len(words) - 1)
        words[place] = "w10"
        start = len(" ".join(words[: place + 1])) + 1
        rows.append((f"w10 {words[-1]} {words[0]}", " ".join(words), words[place + 1], start))
    return rows


def _write_answers(folder: Path, train: int, test: int) -> None:
    write(folder / "squad/train-v1.1.json", squad(questions(train, 5)))
    foreign = json.loads(squad(questions(4, 6), id_prefix="finnish-"))["data"]
    both = json.loads(squad(questions(train, 7), id_prefix="english-"))
    write(folder / "tydiqa/tydiqa-goldp-v1.1-train.json", json.dumps({**both, "data": foreign + both["data"]}))
    for language in LANGUAGES:
        write(folder / f"xquad/xquad.{language}.json", squad(questions(test, 8)))
        write(
            folder / f"MLQA_V1/test/test-context-{language}-question-{language}.json",
            squad(questions(test, 9)),
        )
    write(folder / "tydiqa/tydiqa-goldp-v1.1-dev/tydiqa-goldp-dev-english.json", squad(questions(test, 10)))


def _write_retrieval(folder: Path, train: int, test: int) -> None:
    """A query has one word of its passage."""
    for language in LANGUAGES:
        write(folder / f"lareqa/xquad-r/{language}.json", squad(questions(test, 11 + len(language))))
    chinese = [f"w{60 + i} w{61 + i}" for i in range(test)]
    write(folder / "tatoeba/tatoeba.cmn-eng.cmn", "\n".join(chinese) + "\n")
    write(folder / "tatoeba/tatoeba.cmn-eng.eng", "\n".join(f"{text} w50" for text in chinese) + "\n")

    def entity(number: int) -> dict[str, Any]:
        description = f"w{60 + number} w50. w51"
        spans = [{"start": 0, "end": description.index(".") + 1}]
        return {
            "entity_id": f"Q{number}",
            "title": "t",
            "description": description,
            "description_language": "en",
            "description_url": "u",
            "sentence_spans": spans,
        }

    def mention(number: int, language: str) -> tuple[dict[str, Any], dict[str, Any]]:
        text = f"w52. w53 w{60 + number} w54. w55"
        start = text.index(f"w{60 + number}")
        spans = [{"start": 0, "end": 4}, {"start": 5, "end": text.index("w54") + 4}]
        context = {
            "document_title": "t",
            "document_url": "u",
            "document_id": "d",
            "language": language,
            "text": text,
            "sentence_spans": spans,
        }
        span = {"start": start, "end": start + len(f"w{60 + number}"), "text": f"w{60 + number}"}
        return context, {"example_id": f"{language}{number}", "mention_span": span, "entity_id": f"Q{number}"}

    pairs = []
    for number in range(train):
        context, marked = mention(number % 60, "en")
        pairs.append({"contextual_mention": {"context": context, "mention": marked}, "entity": entity(number % 60)})
    write_json_lines(folder / "mewslix/wikipedia_pairs-train.jsonl", pairs)
    write_json_lines(folder / "mewslix/candidate_set_entities.jsonl", [entity(number) for number in range(60)])
    tests = []
    for language in LANGUAGES:
        for number in range(test):
            context, marked = mention(number, language)
            tests.append({"context": context, "mentions": [marked]})
    write_json_lines(folder / "mewslix/wikinews_mentions-test.jsonl", tests)

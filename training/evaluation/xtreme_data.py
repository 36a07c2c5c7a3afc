"""The data of XTREME-R as their authors publish them, and as XTREME's own download script leaves them.

`data` is one folder with a folder for each data set; `DATA_FILES` names the files. XTREME's script takes the labels out
of its test sets; the files of the authors have them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import InputError
from gte_deploy.training.evaluation.glue_tasks import GLUE_TASKS, Examples, load_split, read_json_lines

DATA_FILES = """\
MNLI/train.tsv                                               as in GLUE, or xnli/train-en.tsv of XTREME
XNLI-1.0/xnli.test.tsv                                       or xnli/test-LANG.tsv with labels
siqa/socialIQa_v1.4_trn.jsonl                                or siqa/train.jsonl and train-labels.lst
COPA/train.jsonl                                             of SuperGLUE, or xcopa/train.en.jsonl
xcopa/test.LANG.jsonl                                        or xcopa/data/LANG/test.LANG.jsonl
ud-treebanks-v2.7/UD_*/LANG_*-ud-SPLIT.conllu                or udpos/SPLIT-LANG.tsv with labels
wikiann/LANG/SPLIT                                           or panx/SPLIT-LANG.tsv with labels
squad/train-v1.1.json
xquad/xquad.LANG.json
MLQA_V1/test/test-context-LANG-question-LANG.json            below mlqa/ or not
tydiqa/tydiqa-goldp-v1.1-train.json
tydiqa/tydiqa-goldp-v1.1-dev/tydiqa-goldp-dev-LANGUAGE.json  or tydiqa.LANG.dev.json
mewslix/wikipedia_pairs-train.jsonl, candidate_set_entities.jsonl, wikinews_mentions-test.jsonl
lareqa/xquad-r/LANG.json
tatoeba/tatoeba.LAN-eng.LAN, tatoeba/tatoeba.LAN-eng.eng     as in LASER, LAN in ISO 639-3"""

NLI_CLASSES = GLUE_TASKS["mnli"].classes
WIKIANN_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
UPOS_TAGS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())

TYDIQA_NAMES = {
    "en": "english",
    "ar": "arabic",
    "bn": "bengali",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}
ISO_639_3 = {
    pair[:2]: pair[3:]
    for pair in (
        "af:afr ar:ara az:aze bg:bul bn:ben de:deu el:ell es:spa et:est eu:eus fa:pes fi:fin fr:fra he:heb hi:hin "
        "hu:hun id:ind it:ita ja:jpn jv:jav ka:kat kk:kaz ko:kor lt:lit ml:mal mr:mar nl:nld pl:pol pt:por ro:ron "
        "ru:rus sw:swh ta:tam te:tel th:tha tl:tgl tr:tur uk:ukr ur:urd vi:vie zh:cmn"
    ).split()
}


# --- what the readers return ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceExamples:
    """N questions with C choices each: `texts` [N * C], the premise with each choice in turn; `labels` [N] int64."""

    texts: list[tuple[str, str]]
    labels: NDArray[np.int64]

    @property
    def num_choices(self) -> int:
        """C."""
        return len(self.texts) // len(self.labels)


@dataclass(frozen=True)
class TaggedSentences:
    """N sentences: the words of each, and a tag for each word."""

    words: list[list[str]]
    tags: list[list[str]]


@dataclass(frozen=True)
class ContextQuestion:
    """A question on a text. `start` is the place of the first answer in the text, in characters."""

    question: str
    context: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class TextPairs:
    """N queries, each with the passage that answers it."""

    queries: list[str]
    passages: list[str]


@dataclass(frozen=True)
class RetrievalData:
    """Queries in several languages, passages that all of them search, and for each query its relevant passages."""

    queries: dict[str, list[str]]
    passages: list[str]
    relevant: dict[str, list[set[int]]]


@dataclass(frozen=True, kw_only=True)
class XtremeReaders:
    """Where the data come from: a function for each data set, which may take a language, languages or a split.

    `readers_of_files` reads the authors' files, `readers_of_hub` the hub's datasets.
    """

    mnli: Callable[[], Examples]
    xnli: Callable[[str], Examples]
    siqa: Callable[[], ChoiceExamples]
    copa: Callable[[], ChoiceExamples]
    xcopa: Callable[[str], ChoiceExamples]
    udpos: Callable[[str, str], TaggedSentences]
    wikiann: Callable[[str, str], TaggedSentences]
    squad: Callable[[], list[ContextQuestion]]
    xquad: Callable[[str], list[ContextQuestion]]
    mlqa: Callable[[str], list[ContextQuestion]]
    tydiqa_train: Callable[[], list[ContextQuestion]]
    tydiqa: Callable[[str], list[ContextQuestion]]
    squad_pairs: Callable[[], TextPairs]
    lareqa: Callable[[Sequence[str]], RetrievalData]
    tatoeba: Callable[[str], RetrievalData]
    mewslix_train: Callable[[], TextPairs]
    mewslix: Callable[[Sequence[str]], RetrievalData]


def readers_of_files(data: Path) -> XtremeReaders:
    """Return readers of the files of DATA_FILES in a folder."""
    return XtremeReaders(
        mnli=partial(load_mnli, data),
        xnli=partial(load_xnli, data),
        siqa=partial(load_siqa, data),
        copa=partial(load_copa, data),
        xcopa=partial(load_xcopa, data),
        udpos=partial(load_udpos, data),
        wikiann=partial(load_wikiann, data),
        squad=partial(load_squad, data),
        xquad=partial(load_xquad, data),
        mlqa=partial(load_mlqa, data),
        tydiqa_train=partial(load_tydiqa_train, data),
        tydiqa=partial(load_tydiqa, data),
        squad_pairs=partial(load_squad_pairs, data),
        lareqa=partial(load_lareqa, data),
        tatoeba=partial(load_tatoeba, data),
        mewslix_train=partial(load_mewslix_train, data),
        mewslix=partial(load_mewslix, data),
    )


# --- classification ---------------------------------------------------------------------------------------------------


def load_mnli(data: Path) -> Examples:
    """Read the English training set of XNLI, which is that of MNLI; labels as in NLI_CLASSES."""
    if (data / "xnli" / "train-en.tsv").is_file() and not any((data / name).is_dir() for name in ("MNLI", "mnli")):
        return _labelled_pairs(data / "xnli" / "train-en.tsv")
    return load_split(GLUE_TASKS["mnli"], "train", data=data)


def load_xnli(data: Path, language: str) -> Examples:
    """Read the test set of XNLI in a language; labels as in NLI_CLASSES."""
    file = _find(data, f"xnli/test-{language}.tsv", "XNLI-1.0/xnli.test.tsv", "xnli/XNLI-1.0/xnli.test.tsv")
    if file.name != "xnli.test.tsv":
        return _labelled_pairs(file)
    with file.open(encoding="utf-8", newline="\n") as lines:
        rows = (line.rstrip("\r\n").split("\t") for line in lines)
        columns = _columns(next(rows, []), ("language", "sentence1", "sentence2", "gold_label"), file)
        found = [[row[column] for column in columns] for row in rows if len(row) > max(columns)]
    return _nli([row[1:] for row in found if row[0] == language], f"{file}, language {language}")


def load_siqa(data: Path) -> ChoiceExamples:
    """Read the training set of Social IQa."""
    file = _find(data, "siqa/socialIQa_v1.4_trn.jsonl", "siqa/train.jsonl", "siqa/socialiqa-train-dev/train.jsonl")
    rows = list(read_json_lines(file))
    names = ("answerA", "answerB", "answerC")
    if rows and "correct" in rows[0]:
        labels = ["ABC".find(str(row["correct"])) for row in rows]
    else:
        listed = file.with_name("train-labels.lst")
        if not listed.is_file():
            raise InputError(f"{file} has no labels, and {listed} is missing")
        labels = [int(line) - 1 for line in listed.read_text("utf-8").split()]
    return choice_examples(rows, labels, names, "{context} {question}", file)


def load_copa(data: Path) -> ChoiceExamples:
    """Read the English training set of COPA."""
    return _load_copa(_find(data, "COPA/train.jsonl", "xcopa/train.en.jsonl", "xcopa/train-en.jsonl"))


def load_xcopa(data: Path, language: str) -> ChoiceExamples:
    """Read the test set of XCOPA in a language."""
    name = f"test.{language}.jsonl"
    return _load_copa(_find(data, f"xcopa/{name}", f"xcopa/data/{language}/{name}", f"xcopa/test-{language}.jsonl"))


def _load_copa(file: Path) -> ChoiceExamples:
    rows = list(read_json_lines(file))
    labels = [int(_field(row, "label", file)) for row in rows]
    return choice_examples(rows, labels, ("choice1", "choice2"), "{premise} What was the {question}?", file)


def choice_examples(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[int], names: Sequence[str], template: str, where: Path | str
) -> ChoiceExamples:
    """Put the premise of each row before each of its choices.

    Args:
        rows: the examples.
        labels: the number of the right choice of each.
        names: the columns of the choices.
        template: the premise, with the columns that it is made of in braces.
        where: the file of the rows, for messages.

    Raises:
        InputError: there is no example, a column is missing, or a label is none of the choices.
    """
    if len(rows) != len(labels) or not rows:
        raise InputError(f"{where} holds {len(rows)} examples and {len(labels)} labels; expected at least one of each")
    if not all(0 <= label < len(names) for label in labels):
        raise InputError(f"{where}: a label is none of the {len(names)} choices")
    texts = []
    for row in rows:
        try:
            premise = template.format(**row)
        except KeyError as error:
            raise InputError(f"{where}: an example has no field {error}") from error
        texts += [(premise, str(_field(row, name, where))) for name in names]
    return ChoiceExamples(texts, np.array(labels, dtype=np.int64))


def _labelled_pairs(file: Path) -> Examples:
    # XTREME's script writes these with Python's csv module.
    with file.open(encoding="utf-8", newline="") as lines:
        return _nli(list(csv.reader(lines, delimiter="\t")), str(file))


def _nli(rows: Sequence[Sequence[str]], where: str) -> Examples:
    if not rows:
        raise InputError(f"{where} holds no example")
    for number, row in enumerate(rows, start=1):
        if len(row) != 3 or row[2].strip() not in NLI_CLASSES:
            raise InputError(f"{where}, example {number}: expected two texts and one of {', '.join(NLI_CLASSES)}")
    labels = [NLI_CLASSES.index(row[2].strip()) for row in rows]
    return Examples([(row[0], row[1]) for row in rows], np.array(labels, dtype=np.int64))


# --- tags -------------------------------------------------------------------------------------------------------------

# Which part's tag a word of several parts gets, as in the conversion that XTREME's script runs.
_FUSED_DEFAULT = "VERB NOUN PROPN PRON ADJ NUM ADV INTJ AUX ADP DET PART CCONJ SCONJ X PUNCT".split()
_FUSED = {
    "es": "VERB AUX PRON ADP DET".split(),
    "fr": "VERB AUX PRON NOUN ADJ ADV ADP DET PART SCONJ CONJ".split(),
    "it": "VERB AUX ADV PRON ADP DET INTJ".split(),
}


def load_udpos(data: Path, language: str, split: str) -> TaggedSentences:
    """Read the words and parts of speech of all treebanks of a language in one split: "train" or "test"."""
    table = data / "udpos" / f"{split}-{language}.tsv"
    if table.is_file():
        return tagged_sentences(_table_sentences(table), UPOS_TAGS, table)
    pattern = f"**/UD_*/{language}_*-ud-{split}.conllu"
    files = sorted(data.glob(pattern))
    if not files:
        raise InputError(f"{data} has neither {table.relative_to(data)} nor {pattern}")
    sentences = (sentence for file in files for sentence in _conllu_sentences(file, language))
    return tagged_sentences(sentences, UPOS_TAGS, files[0])


def load_wikiann(data: Path, language: str, split: str) -> TaggedSentences:
    """Read the words and entities of WikiANN in a language and a split: "train" or "test"."""
    file = _find(data, f"wikiann/{language}/{split}", f"panx/{split}-{language}.tsv", f"panx/{language}-{split}")
    return tagged_sentences(_table_sentences(file, prefix=f"{language}:"), WIKIANN_TAGS, file)


def tagged_sentences(
    sentences: Iterable[list[tuple[str, str]]], known: Sequence[str], where: Path | str
) -> TaggedSentences:
    """Check the tags of sentences of words and tags.

    Args:
        sentences: word and tag of each word.
        known: the tags that there are.
        where: the file of the sentences, for messages.

    Raises:
        InputError: there is no sentence, or an unknown tag.
    """
    words, tags = [], []
    for sentence in sentences:
        if odd := sorted({tag for _, tag in sentence} - set(known)):
            raise InputError(f"{where}: unknown tags {', '.join(map(repr, odd[:5]))}; expected {', '.join(known)}")
        words.append([word for word, _ in sentence])
        tags.append([tag for _, tag in sentence])
    if not words:
        raise InputError(f"{where} holds no sentence")
    return TaggedSentences(words, tags)


def _table_sentences(file: Path, *, prefix: str = "") -> Iterator[list[tuple[str, str]]]:
    sentence: list[tuple[str, str]] = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            word, _, tag = line.rstrip("\r\n").partition("\t")
            if word.strip() or tag:
                sentence.append((word.removeprefix(prefix), tag.rpartition("\t")[2].strip()))
            elif sentence:
                yield sentence
                sentence = []
    if sentence:
        yield sentence


def _conllu_sentences(file: Path, language: str) -> Iterator[list[tuple[str, str]]]:
    """Read words as they are written: one of several parts is one word, with the tag of the first part in the order."""
    order = _FUSED.get(language, _FUSED_DEFAULT)
    rows: list[list[str]] = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in (*lines, "\n"):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) == 10:
                rows.append(fields)
            elif rows and not line.strip():
                if sentence := _written_words(rows, order):
                    yield sentence
                rows = []


def _written_words(rows: Sequence[Sequence[str]], order: Sequence[str]) -> list[tuple[str, str]]:
    tags = {int(row[0]): row[3] for row in rows if row[0].isdecimal()}
    words, skip_to = [], 0
    for number, form, *rest in rows:
        if "-" in number:
            first, last = map(int, number.split("-"))
            parts = [tags[part] for part in range(first, last + 1)]
            words.append((form, min(parts, key=lambda tag: order.index(tag) if tag in order else len(order))))
            skip_to = last
        elif number.isdecimal() and int(number) > skip_to:  # 1.1 is an empty node
            words.append((form, rest[1]))
    # XTREME removes spaces and zero-width non-joiners from words; sentences without words are not published.
    words = [("".join(form.replace("\u200c", "").split(" ")), tag) for form, tag in words]
    return [(form, tag) for form, tag in words if form] if any(form != "_" for form, _ in words) else []


# --- answers ----------------------------------------------------------------------------------------------------------


def load_squad(data: Path) -> list[ContextQuestion]:
    """Read the training set of SQuAD 1.1."""
    return _squad_questions(_find(data, "squad/train-v1.1.json", "train-v1.1.json"))


def load_xquad(data: Path, language: str) -> list[ContextQuestion]:
    """Read XQuAD in a language."""
    return _squad_questions(_find(data, f"xquad/xquad.{language}.json"))


def load_mlqa(data: Path, language: str) -> list[ContextQuestion]:
    """Read the test set of MLQA with questions and texts of one language."""
    name = f"test-context-{language}-question-{language}.json"
    return _squad_questions(_find(data, f"MLQA_V1/test/{name}", f"mlqa/MLQA_V1/test/{name}", f"mlqa/{name}"))


def load_tydiqa_train(data: Path) -> list[ContextQuestion]:
    """Read the English part of the training set of TyDiQA-GoldP."""
    folder = "tydiqa/tydiqa-goldp-v1.1-train"
    file = _find(data, f"{folder}.json", f"{folder}/tydiqa.en.train.json", f"{folder}/tydiqa-goldp-v1.1-train.json")
    return _squad_questions(file, id_prefix="english-" if "goldp-v1.1-train" in file.name else "")


def load_tydiqa(data: Path, language: str) -> list[ContextQuestion]:
    """Read the development set of TyDiQA-GoldP in a language, on which XTREME-R tests."""
    folder = "tydiqa/tydiqa-goldp-v1.1-dev"
    names = (f"tydiqa-goldp-dev-{TYDIQA_NAMES[language]}.json", f"tydiqa.{language}.dev.json")
    return _squad_questions(_find(data, *(f"{folder}/{name}" for name in names)))


def _squad_questions(file: Path, *, id_prefix: str = "") -> list[ContextQuestion]:
    questions = []
    for paragraph, question in _squad_rows(file):
        if not str(question.get("id", "")).startswith(id_prefix):
            continue
        answers = question.get("answers") or []
        if not answers:
            raise InputError(f"{file}: question {question.get('id')!r} has no answer; take the files with labels")
        questions.append(
            ContextQuestion(
                question=str(question["question"]).lstrip(),
                context=str(paragraph["context"]),
                answers=tuple(str(answer["text"]) for answer in answers),
                start=int(answers[0]["answer_start"]),
            )
        )
    if not questions:
        raise InputError(f"{file} holds no question")
    return questions


def _squad_rows(file: Path) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    try:
        articles = json.loads(file.read_text("utf-8"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield paragraph, question
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not in the form of SQuAD: data, paragraphs, qas ({error!r})") from error


# --- retrieval --------------------------------------------------------------------------------------------------------


def pairs_of_questions(questions: Sequence[ContextQuestion]) -> TextPairs:
    """Pair each question with its whole text."""
    return TextPairs([item.question for item in questions], [item.context for item in questions])


def search_of_pairs(pairs: Mapping[str, TextPairs]) -> RetrievalData:
    """Let the queries of every language search the passages of all; a passage that stands twice is one."""
    places: dict[str, int] = {}
    relevant = {
        language: [{places.setdefault(passage, len(places))} for passage in both.passages]
        for language, both in pairs.items()
    }
    return RetrievalData({language: both.queries for language, both in pairs.items()}, list(places), relevant)


def load_squad_pairs(data: Path) -> TextPairs:
    """Read the questions of SQuAD 1.1's training set, each with its whole text."""
    return pairs_of_questions(load_squad(data))


def load_lareqa(data: Path, languages: Sequence[str]) -> RetrievalData:
    """Read LAReQA's XQuAD-R: questions of each language, which search the texts of all of the languages.

    Only a question's own text is relevant, as in the published table. LAReQA itself asks for sentences, and counts
    those of every language.
    """
    files = {code: _find(data, f"lareqa/xquad-r/{code}.json", f"xquad-r/{code}.json") for code in languages}
    return search_of_pairs({code: pairs_of_questions(_squad_questions(file)) for code, file in files.items()})


def load_tatoeba(data: Path, language: str) -> RetrievalData:
    """Read Tatoeba: sentences of a language, each of which searches its English translation."""
    code = ISO_639_3[language]
    names = [f"tatoeba.{code}-eng.{end}" for end in (code, "eng")]
    theirs, english = (_find(data, f"tatoeba/{n}", f"tatoeba/v1/{n}").read_text("utf-8").splitlines() for n in names)
    if len(theirs) != len(english) or not theirs:
        raise InputError(f"tatoeba.{code}-eng has {len(theirs)} sentences and {len(english)} translations")
    return search_of_pairs({language: TextPairs(theirs, english)})


def load_mewslix_train(data: Path) -> TextPairs:
    """Read the English pairs of Mewsli-X: a mention in its sentence, and the description of its entity."""
    file = _find(data, "mewslix/wikipedia_pairs-train.jsonl")
    rows = list(read_json_lines(file))
    mentions = [_mention_text(row["contextual_mention"], file) for row in rows]
    return TextPairs([text for text, _ in mentions], [_description(row["entity"]) for row in rows])


def load_mewslix(data: Path, languages: Sequence[str]) -> RetrievalData:
    """Read Mewsli-X: mentions of each language, which search the descriptions of all entities."""
    file = _find(data, "mewslix/candidate_set_entities.jsonl")
    entities = list(read_json_lines(file))
    places = {str(_field(entity, "entity_id", file)): place for place, entity in enumerate(entities)}
    file = _find(data, "mewslix/wikinews_mentions-test.jsonl")
    queries: dict[str, list[str]] = {language: [] for language in languages}
    relevant: dict[str, list[set[int]]] = {language: [] for language in languages}
    for row in read_json_lines(file):
        context = _field(row, "context", file)
        if context["language"] not in queries:
            continue
        for mention in row.get("mentions") or [_field(row, "mention", file)]:
            text, entity = _mention_text({"context": context, "mention": mention}, file)
            if entity not in places:
                raise InputError(f"{file}: no candidate is the entity {entity!r}")
            queries[context["language"]].append(text)
            relevant[context["language"]].append({places[entity]})
    if empty := [language for language, texts in queries.items() if not texts]:
        raise InputError(f"{file} has no mention in the languages {', '.join(empty)}")
    return RetrievalData(queries, [_description(entity) for entity in entities], relevant)


# A mention is marked by braces, after the mention itself; braces of the text become parentheses. As in XTREME's script.
_BRACES = re.compile(r"\{(.*?)\}")


def _mention_text(row: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """Return a mention with its sentence, and the id of its entity."""
    try:
        text, mention = row["context"]["text"], row["mention"]
        start, end = mention["mention_span"]["start"], mention["mention_span"]["end"]
        spans = [(span["start"], span["end"]) for span in row["context"]["sentence_spans"]]
        entity = str(mention["entity_id"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: a mention is not in the form of Mewsli-X ({error!r})") from error
    sentence = next(((a, b) for a, b in spans if a <= start and end <= b), None)
    if sentence is None:
        raise InputError(f"{file}: a mention of {entity} lies in no sentence; restore the texts with Mewsli-X's script")
    left, right = (_BRACES.sub(r"(\1)", part) for part in (text[sentence[0] : start], text[end : sentence[1]]))
    marked = f"{text[start:end]}: {left} {{ {text[start:end]} }} {right}"
    return _one_line(marked), entity


def _description(entity: Mapping[str, Any]) -> str:
    text = str(entity["description"])
    spans = entity.get("sentence_spans") or [{"start": 0, "end": len(text)}]
    return _one_line(" ".join(text[span["start"] : span["end"]] for span in spans))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).replace("  ", " ").strip()


# --- files ------------------------------------------------------------------------------------------------------------


def _find(data: Path, *names: str) -> Path:
    for name in names:
        if (data / name).is_file():
            return data / name
    raise InputError(f"{data} has no {' or '.join(names)}")


def _columns(header: Sequence[str], names: Sequence[str], file: Path) -> list[int]:
    if missing := [name for name in names if name not in header]:
        raise InputError(f"{file} has no column {', '.join(missing)}; it has {', '.join(header)}")
    return [header.index(name) for name in names]


def _field(row: Mapping[str, Any], name: str, file: Path | str) -> Any:
    if name not in row:
        raise InputError(f"{file}: an example has no {name!r}; it has {', '.join(row)}")
    return row[name]

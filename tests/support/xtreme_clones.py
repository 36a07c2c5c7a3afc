"""Clones of the hub's datasets with the examples of a folder of the authors' files, in the hub's columns and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from gte_deploy.training.evaluation.xtreme_data import (
    NLI_CLASSES,
    UPOS_TAGS,
    WIKIANN_TAGS,
    ChoiceExamples,
    ContextQuestion,
    TaggedSentences,
    readers_of_files,
)
from gte_deploy.training.evaluation.xtreme_hub import HUB_SOURCES

_TEXT = Value("string")
_ANSWERS = {"text": List(_TEXT), "answer_start": List(Value("int32"))}


def write_clones(files: Path, folder: Path, *, languages: Sequence[str], xcopa: Sequence[str]) -> Path:
    """Write what `readers_of_files(files)` reads as clones of the hub's datasets.

    Those that are scripts on the hub (Social IQa, COPA, MLQA) are written as in the hub's branch of Parquet files,
    without a card; the others have their configurations in the card.
    """
    read = readers_of_files(files)
    configs: dict[str, dict[tuple[str, str], Dataset]] = {key: {} for key in HUB_SOURCES}
    configs["mnli"]["mnli", "train"] = _nli(read.mnli().texts, read.mnli().labels.tolist())
    configs["siqa"]["default", "train"] = _siqa(read.siqa())
    configs["copa"]["copa", "train"] = _copa(read.copa())
    configs["squad"]["plain_text", "train"] = _questions(read.squad())
    others = [ContextQuestion("q", "another text", ("text",), 8)] * 2
    for split, questions in (("train", read.tydiqa_train()), ("validation", read.tydiqa("en"))):
        mixed = _questions(others, prefix="finnish-").to_list() + _questions(questions, prefix="english-").to_list()
        configs["tydiqa"]["secondary_task", split] = Dataset.from_list(mixed)
    for code in xcopa:
        configs["xcopa"][code, "test"] = _copa(read.xcopa(code))
    for code in languages:
        examples = read.xnli(code)
        configs["xnli"][code, "test"] = _nli(examples.texts, examples.labels.tolist())
        for split in ("train", "test"):
            configs["udpos"][code, split] = _tags(read.udpos(code, split), "pos_tags", UPOS_TAGS)
            configs["wikiann"][code, split] = _tags(read.wikiann(code, split), "ner_tags", WIKIANN_TAGS)
        configs["xquad"][f"xquad.{code}", "validation"] = _questions(read.xquad(code))
        configs["mlqa"][f"mlqa.{code}.{code}", "test"] = _questions(read.mlqa(code))
    _write_retrieval(configs, files, languages)
    for key, tables in configs.items():
        clone = folder / HUB_SOURCES[key].name
        if key in ("siqa", "copa", "mlqa"):
            for (config, split), table in tables.items():
                (clone / config / split).mkdir(parents=True, exist_ok=True)
                table.to_parquet(clone / config / split / "0000.parquet")
        else:
            write_clone(clone, tables)
    return folder


def write_clone(clone: Path, tables: Mapping[tuple[str, str], Dataset]) -> None:
    """Write a dataset with its configurations and splits in its card."""
    card = ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in tables):
        card += [f"- config_name: {config}", "  data_files:"]
        for split in (split for name, split in tables if name == config):
            card += [f"  - split: {split}", f"    path: {config}/{split}-*.parquet"]
            (clone / config).mkdir(parents=True, exist_ok=True)
            tables[config, split].to_parquet(clone / config / f"{split}-00000-of-00001.parquet")
    (clone / "README.md").write_text("\n".join([*card, "---", "# A dataset"]) + "\n")


def _nli(texts: Sequence[Sequence[str]], labels: Sequence[int]) -> Dataset:
    features = Features({"premise": _TEXT, "hypothesis": _TEXT, "label": ClassLabel(names=list(NLI_CLASSES))})
    columns = {"premise": [pair[0] for pair in texts], "hypothesis": [pair[1] for pair in texts], "label": labels}
    return Dataset.from_dict(columns, features=features)


def _siqa(examples: ChoiceExamples) -> Dataset:
    rows = []
    for number, label in enumerate(examples.labels):
        texts = examples.texts[3 * number : 3 * number + 3]
        context, _, question = texts[0][0].partition(" ")
        answers = dict(zip(("answerA", "answerB", "answerC"), (answer for _, answer in texts), strict=True))
        rows.append({"context": context, "question": question, **answers, "label": str(label + 1)})
    return Dataset.from_list(rows)


def _copa(examples: ChoiceExamples) -> Dataset:
    rows = []
    for number, label in enumerate(examples.labels):
        (premise, first), (_, second) = examples.texts[2 * number : 2 * number + 2]
        premise, _, question = premise.removesuffix("?").partition(" What was the ")
        rows.append(
            {"premise": premise, "choice1": first, "choice2": second, "question": question, "label": int(label)}
        )
    return Dataset.from_list(rows)


def _tags(sentences: TaggedSentences, column: str, names: Sequence[str]) -> Dataset:
    features = Features({"tokens": List(_TEXT), column: List(ClassLabel(names=list(names)))})
    tags = [[names.index(tag) for tag in sentence] for sentence in sentences.tags]
    return Dataset.from_dict({"tokens": sentences.words, column: tags}, features=features)


def _questions(items: Sequence[ContextQuestion], *, prefix: str = "") -> Dataset:
    features = Features({"id": _TEXT, "title": _TEXT, "context": _TEXT, "question": _TEXT, "answers": _ANSWERS})
    rows = [
        {
            "id": f"{prefix}{number}",
            "title": "t",
            "context": item.context,
            "question": item.question,
            "answers": {"text": list(item.answers), "answer_start": [item.start] * len(item.answers)},
        }
        for number, item in enumerate(items)
    ]
    return Dataset.from_list(rows, features=features)


def _write_retrieval(configs: dict[str, dict[tuple[str, str], Any]], files: Path, languages: Sequence[str]) -> None:
    read = readers_of_files(files)
    pairs = read.mewslix_train()
    columns = {"mention": pairs.queries, "entity": pairs.passages}
    configs["mewslix"]["wikipedia_pairs", "train"] = Dataset.from_dict(columns)
    search = read.mewslix(languages)
    entities = [f"Q{place}" for place in range(len(search.passages))]
    candidates = {"entity_id": entities, "description": search.passages}
    configs["mewslix"]["candidate_entities", "test"] = Dataset.from_dict(candidates)
    for code in languages:
        wanted = [entities[min(places)] for places in search.relevant[code]]
        configs["mewslix"][code, "test"] = Dataset.from_dict({"mention": search.queries[code], "entity_id": wanted})
        texts = read.lareqa([code])
        items = [
            ContextQuestion(question, texts.passages[min(places)], ("a",), 0)
            for question, places in zip(texts.queries[code], texts.relevant[code], strict=True)
        ]
        configs["lareqa"][code, "validation"] = _questions(items)
    found = read.tatoeba("zh")
    english = [found.passages[min(places)] for places in found.relevant["zh"]]
    columns = {"sentence1": found.queries["zh"], "sentence2": english}
    configs["tatoeba"]["cmn-eng", "test"] = Dataset.from_dict(columns)

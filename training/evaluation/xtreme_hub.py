"""The data of XTREME-R from datasets of the Hugging Face hub, or from clones of them in a folder.

They are the datasets that the scripts of the published table read (github.com/izhx/nlu-evals, tools/cache_data.py, at
b8193bae), except TyDiQA: the authors' own dataset has the same questions, and needs no code. No code of a dataset is
run: of a dataset that consists of a script, the Parquet files are read that the hub made of it, in its branch
refs/convert/parquet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from gte_deploy.core.errors import InputError, MissingDependencyError
from gte_deploy.core.hub import hub_errors
from gte_deploy.training.evaluation.glue_tasks import GLUE_TASKS, HUB_DATASET, Examples
from gte_deploy.training.evaluation.xtreme_data import (
    ISO_639_3,
    NLI_CLASSES,
    TYDIQA_NAMES,
    UPOS_TAGS,
    WIKIANN_TAGS,
    ChoiceExamples,
    ContextQuestion,
    RetrievalData,
    TaggedSentences,
    TextPairs,
    XtremeReaders,
    choice_examples,
    pairs_of_questions,
    search_of_pairs,
    tagged_sentences,
)

PARQUET_BRANCH = "refs/convert/parquet"


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub: its name, and what its configurations are called, with {} for a language."""

    name: str
    config: str = "default"


HUB_SOURCES: Mapping[str, HubSource] = {
    "mnli": HubSource(HUB_DATASET, "mnli"),
    "xnli": HubSource("facebook/xnli", "{}"),
    "siqa": HubSource("allenai/social_i_qa"),
    "copa": HubSource("aps/super_glue", "copa"),
    "xcopa": HubSource("cambridgeltl/xcopa", "{}"),
    "udpos": HubSource("izhx/xtreme-r-udpos", "{}"),
    "wikiann": HubSource("unimelb-nlp/wikiann", "{}"),
    "squad": HubSource("rajpurkar/squad", "plain_text"),
    "xquad": HubSource("google/xquad", "xquad.{}"),
    "mlqa": HubSource("facebook/mlqa", "mlqa.{0}.{0}"),
    "tydiqa": HubSource("google-research-datasets/tydiqa", "secondary_task"),
    "mewslix": HubSource("izhx/mewsli-x", "{}"),
    "lareqa": HubSource("google-research-datasets/xquad_r", "{}"),
    "tatoeba": HubSource("mteb/tatoeba-bitext-mining", "{}-eng"),
}
"""Data set -> its place on the hub, without revision: the results record the commits that were read."""


def has_clones(folder: Path) -> bool:
    """Whether a folder holds clones of datasets of the hub, each in OWNER/NAME."""
    return any((folder / source.name).is_dir() for source in HUB_SOURCES.values())


def readers_of_hub(clones: Path | None = None, *, commits: dict[str, str] | None = None) -> XtremeReaders:
    """Return readers of the hub's datasets.

    Args:
        clones: folder of clones, each in OWNER/NAME; None reads the hub.
        commits: receives the name and the commit of each dataset of the hub that is read.

    Raises:
        InputError: (from the readers) a dataset cannot be opened, or has other columns or labels.
        MissingDependencyError: (from the readers) `datasets` is not installed.
    """
    hub = _Hub(clones, {} if commits is None else commits)
    return XtremeReaders(
        mnli=lambda: _nli_pairs(hub, "mnli", "", "train"),
        xnli=lambda language: _nli_pairs(hub, "xnli", language, "test"),
        siqa=lambda: _siqa(hub),
        copa=lambda: _copa(hub, "copa", "", "train"),
        xcopa=lambda language: _copa(hub, "xcopa", language, "test"),
        udpos=lambda language, split: _tags(hub, "udpos", language, split),
        wikiann=lambda language, split: _tags(hub, "wikiann", language, split),
        squad=lambda: _answers(hub, "squad", "", "train"),
        xquad=lambda language: _answers(hub, "xquad", language, "validation"),
        mlqa=lambda language: _answers(hub, "mlqa", language, "test"),
        tydiqa_train=lambda: _tydiqa(hub, "en", "train"),
        tydiqa=lambda language: _tydiqa(hub, language, "validation"),
        squad_pairs=lambda: pairs_of_questions(_answers(hub, "squad", "", "train")),
        lareqa=lambda languages: search_of_pairs(
            {code: pairs_of_questions(_answers(hub, "lareqa", code, "validation")) for code in languages}
        ),
        tatoeba=lambda language: search_of_pairs({language: _sentence_pairs(hub, language)}),
        mewslix_train=lambda: _mewslix_train(hub),
        mewslix=lambda languages: _mewslix(hub, languages),
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of one split: `where` names them in messages, `names` has the classes of a column, if it tells them."""

    where: str
    rows: Sequence[Mapping[str, Any]]
    names: Callable[[str], Sequence[str] | None]

    def values(self, *columns: str) -> Iterable[tuple[Any, ...]]:
        """Yield the values of some columns, row by row."""
        for number, row in enumerate(self.rows, start=1):
            if missing := [name for name in columns if row.get(name) is None]:
                raise InputError(f"{self.where}, row {number}: no {', '.join(missing)}; it has {', '.join(row)}")
            yield tuple(row[name] for name in columns)


@dataclass(frozen=True)
class _Hub:
    clones: Path | None
    commits: dict[str, str]

    def read(self, key: str, language: str, split: str) -> _Rows:
        return self.read_config(key, HUB_SOURCES[key].config.format(language), split)

    def read_config(self, key: str, config: str, split: str) -> _Rows:
        name = HUB_SOURCES[key].name
        table = self._open(name, config, split)
        if not len(table):
            raise InputError(f"{name} {config} {split} holds no example")
        for url in table.info.download_checksums or ():
            at, _, _ = str(url).removeprefix("hf://datasets/").partition("/")[2].partition("/")
            if "@" in at:
                self.commits[name] = at.partition("@")[2]
        return _Rows(f"{name} {config} {split}", table, lambda column: _class_names(table.features.get(column)))

    def _open(self, name: str, config: str, split: str) -> Any:
        try:
            import datasets
            from datasets.exceptions import DatasetsError
        except ImportError as error:
            raise MissingDependencyError("datasets", "train") from error
        errors = (*hub_errors(), DatasetsError, RuntimeError)
        arguments: dict[str, Any] = {"split": split, "streaming": False}
        try:
            if self.clones is None:
                try:
                    return datasets.load_dataset(name, config, **arguments)
                except RuntimeError as error:
                    if "scripts are no longer supported" not in str(error):
                        raise
                    files = {split: f"{config}/{split}/*.parquet"}
                    return datasets.load_dataset(name, data_files=files, revision=PARQUET_BRANCH, **arguments)
            folder = self.clones / name
            # In its cache, which two folders of one name share, `datasets` may find what another clone had.
            with tempfile.TemporaryDirectory() as cache:
                arguments |= {"cache_dir": cache, "keep_in_memory": True}
                if (folder / config / split).is_dir():  # a clone of the branch of Parquet files
                    files = {split: str(folder / config / split / "*.parquet")}
                    return datasets.load_dataset("parquet", data_files=files, **arguments)
                return datasets.load_dataset(str(folder), config, **arguments)
        except errors as error:
            raise InputError(self._explained(name, config, split, error)) from error

    def _explained(self, name: str, config: str, split: str, error: Exception) -> str:
        if self.clones is None:
            advice = "Check the network and HF_HUB_OFFLINE, or give the authors' files with --data"
        else:
            advice = f"It is read from {self.clones / name}; clone it with `hf download --repo-type dataset {name}`"
        return f"{name} {config} {split} cannot be opened: {str(error).rstrip('.')}. {advice}"


def _class_names(feature: Any) -> Sequence[str] | None:
    """The names of the classes of a column, or of the items of its lists."""
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def _nli_pairs(hub: _Hub, key: str, language: str, split: str) -> Examples:
    found = hub.read(key, language, split)
    first, second, label = GLUE_TASKS["mnli"].columns[-1]  # the hub's
    names = found.names(label) or NLI_CLASSES
    texts, labels = [], []
    for number, (premise, hypothesis, value) in enumerate(found.values(first, second, label), start=1):
        if not isinstance(value, int) or not 0 <= value < len(names) or names[value] not in NLI_CLASSES:
            raise InputError(f"{found.where}, row {number}: the label is {value!r}; expected {', '.join(NLI_CLASSES)}")
        texts.append((str(premise), str(hypothesis)))
        labels.append(NLI_CLASSES.index(names[value]))
    return Examples(cast("list[tuple[str, ...]]", texts), np.array(labels, dtype=np.int64))


def _siqa(hub: _Hub) -> ChoiceExamples:
    found = hub.read("siqa", "", "train")
    names = ("answerA", "answerB", "answerC")
    labels = [_number(label, found.where) - 1 for (label,) in found.values("label")]
    return choice_examples(found.rows, labels, names, "{context} {question}", found.where)


def _copa(hub: _Hub, key: str, language: str, split: str) -> ChoiceExamples:
    found = hub.read(key, language, split)
    labels = [_number(label, found.where) for (label,) in found.values("label")]
    return choice_examples(
        found.rows, labels, ("choice1", "choice2"), "{premise} What was the {question}?", found.where
    )


def _number(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a label is {value!r}, no number") from error


def _tags(hub: _Hub, key: str, language: str, split: str) -> TaggedSentences:
    found = hub.read(key, language, split)
    column = "pos_tags" if key == "udpos" else "ner_tags"
    known: Sequence[str] = UPOS_TAGS if key == "udpos" else WIKIANN_TAGS
    names = found.names(column)
    sentences = []
    for words, tags in found.values("tokens", column):
        if len(words) != len(tags):
            raise InputError(f"{found.where}: a sentence has {len(words)} words and {len(tags)} tags")
        named = [names[tag] if names and isinstance(tag, int) else str(tag) for tag in tags]
        sentences.append([(str(word), tag) for word, tag in zip(words, named, strict=True)])
    return tagged_sentences(sentences, known, found.where)


def _answers(hub: _Hub, key: str, language: str, split: str, *, id_prefix: str = "") -> list[ContextQuestion]:
    found = hub.read(key, language, split)
    questions = []
    for name, question, context, answers in found.values("id", "question", "context", "answers"):
        if not str(name).startswith(id_prefix):
            continue
        texts, starts = answers.get("text") or [], answers.get("answer_start") or []
        if not texts or len(texts) != len(starts):
            raise InputError(f"{found.where}: question {name!r} has no answer, or an answer without its place")
        questions.append(
            ContextQuestion(
                question=str(question).lstrip(),
                context=str(context),
                answers=tuple(map(str, texts)),
                start=int(starts[0]),
            )
        )
    if not questions:
        raise InputError(f"{found.where} has no question whose id begins with {id_prefix!r}")
    return questions


def _tydiqa(hub: _Hub, language: str, split: str) -> list[ContextQuestion]:
    # One configuration has all languages.
    return _answers(hub, "tydiqa", "", split, id_prefix=f"{TYDIQA_NAMES[language]}-")


def _sentence_pairs(hub: _Hub, language: str) -> TextPairs:
    found = hub.read("tatoeba", ISO_639_3[language], "test")
    pairs = list(found.values("sentence1", "sentence2"))
    return TextPairs([str(theirs) for theirs, _ in pairs], [str(english) for _, english in pairs])


def _mewslix_train(hub: _Hub) -> TextPairs:
    # The hub's texts are made already: a mention marked in its sentence, and the description of its entity.
    pairs = list(hub.read_config("mewslix", "wikipedia_pairs", "train").values("mention", "entity"))
    return TextPairs([str(mention) for mention, _ in pairs], [str(entity) for _, entity in pairs])


def _mewslix(hub: _Hub, languages: Sequence[str]) -> RetrievalData:
    entities = hub.read_config("mewslix", "candidate_entities", "test")
    places: dict[str, int] = {}
    passages: list[str] = []
    for entity, description in entities.values("entity_id", "description"):
        places[str(entity)] = len(passages)
        passages.append(str(description))
    queries: dict[str, list[str]] = {}
    relevant: dict[str, list[set[int]]] = {}
    for language in languages:
        found = hub.read("mewslix", language, "test")
        queries[language], relevant[language] = [], []
        for mention, entity in found.values("mention", "entity_id"):
            if str(entity) not in places:
                raise InputError(f"{found.where}: no candidate is the entity {entity!r}")
            queries[language].append(str(mention))
            relevant[language].append({places[str(entity)]})
    return RetrievalData(queries, passages, relevant)

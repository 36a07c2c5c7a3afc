"""Retrieval sets in the layouts in which they are published: BEIR, MLDR and LongEmbed, in a folder or on the hub.

- BEIR (arXiv 2104.08663): corpus.jsonl (_id, text, perhaps title), queries.jsonl (_id, text), qrels/SPLIT.tsv.
- MLDR (Shitao/MLDR, arXiv 2402.03216), a folder for each language: corpus.jsonl.gz (docid, text) and SPLIT.jsonl.gz
  (query_id, query, positive_passages with the docid of each).
- LongEmbed (dwzhu/LongEmbed, arXiv 2404.12096), a folder for each task: corpus.jsonl (doc_id, text), queries.jsonl
  (qid, text) and qrels.jsonl (qid, doc_id); in passkey and needle all three also have context_length, the length of the
  documents in tokens, and queries search only documents of their length.

Every file may end with .gz.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from gte_deploy.core.errors import InputError
from gte_deploy.core.hub import hub_errors
from gte_deploy.training.data.readers import DATASET_PREFIX

logger = logging.getLogger(__name__)

_MLDR_FOLDER = "mldr-v1.0-{}"
_CONTEXT = "context_length"


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, queries, and the relevance of documents for queries.

    Args:
        corpus: id -> text of a document.
        queries: id -> query.
        qrels: query id -> document id -> relevance, above 0 for a relevant document.
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, float]]

    @property
    def judged(self) -> list[str]:
        """Ids of the queries with a relevant document; the others cannot be evaluated."""
        return [i for i in self.queries if any(value > 0 for value in self.qrels.get(i, {}).values())]

    def drawn(self, count: int, *, seed: int) -> RetrievalSet:
        """Return the set with at most `count` judged queries, drawn by the seed, and all documents."""
        judged = self.judged
        chosen = np.random.default_rng(seed).permutation(len(judged))[:count]
        return RetrievalSet(self.corpus, {judged[i]: self.queries[judged[i]] for i in sorted(chosen)}, self.qrels)


def read_retrieval_set(corpus: Path, queries: Path, qrels: Path) -> RetrievalSet:
    """Read a retrieval set in the layout of BEIR (arXiv 2104.08663).

    Args:
        corpus: JSON lines with _id, text and perhaps title, which is put before the text.
        queries: JSON lines with _id and text.
        qrels: tab-separated query-id, corpus-id and score, with these names in the first line.

    Raises:
        InputError: a file cannot be read, has another form, or names ids that do not exist.
    """
    documents = {_id(record, "_id", where): _document(record, where) for record, where in _records(corpus)}
    texts = {_id(record, "_id", where): _text(record, "text", where) for record, where in _records(queries)}
    return _checked(documents, texts, _judgements(qrels), qrels)


def open_retrieval_set(source: str, *, split: str = "test") -> RetrievalSet:
    """Read a retrieval set in any of the layouts from a folder or from the hub.

    Args:
        source: folder of the set, or hf:NAME[@REVISION][:PART] for a dataset of the hub. PART is a folder in it: a task
            of LongEmbed, a language of MLDR.
        split: the queries to take, where the layout has several files of them.

    Raises:
        InputError: the layout is unknown, a file cannot be read, or the hub does not give it.
    """
    folder = retrieval_folder(source, split=split)
    if _file(folder, "qrels.jsonl"):
        sets = read_long_embed(folder)
        if set(sets) != {None}:
            raise InputError(
                f"{source} has documents of several lengths; `gte-train needles --longembed` measures each length"
            )
        return sets[None]
    corpus, queries = _file(folder, "corpus.jsonl"), _file(folder, f"{split}.jsonl")
    if corpus is None:
        raise InputError(
            f"{folder} has no corpus.jsonl. Expected the layout of BEIR, or a folder of MLDR "
            f"({_MLDR_FOLDER.format('en')}) or of LongEmbed (qmsum)"
        )
    if queries is not None:
        return _read_mldr(corpus, queries)
    return read_retrieval_set(corpus, _needed(folder, "queries.jsonl"), folder / "qrels" / f"{split}.tsv")


def read_long_embed(folder: Path) -> dict[int | None, RetrievalSet]:
    """Read a task of LongEmbed.

    Args:
        folder: with corpus.jsonl, queries.jsonl and qrels.jsonl.

    Returns:
        length of the documents in tokens -> their set, shortest first. None is the key of a task without lengths.

    Raises:
        InputError: a file cannot be read, has another form, or names ids that do not exist.
    """
    documents: dict[int | None, dict[str, str]] = {}
    texts: dict[int | None, dict[str, str]] = {}
    pairs: dict[int | None, list[tuple[str, str, float]]] = {}
    for record, where in _records(_needed(folder, "corpus.jsonl")):
        documents.setdefault(_context(record, where), {})[_id(record, "doc_id", where)] = _text(record, "text", where)
    for record, where in _records(_needed(folder, "queries.jsonl")):
        texts.setdefault(_context(record, where), {})[_id(record, "qid", where)] = _text(record, "text", where)
    for record, where in _records(_needed(folder, "qrels.jsonl")):
        pair = (_id(record, "qid", where), _id(record, "doc_id", where), 1.0)
        pairs.setdefault(_context(record, where), []).append(pair)
    if not documents or texts.keys() != documents.keys() or pairs.keys() != documents.keys():
        raise InputError(f"{folder}: corpus, queries and qrels are not of the same {_CONTEXT}s, or are empty")
    order = sorted(documents, key=lambda length: length or 0)
    return {length: _checked(documents[length], texts[length], pairs[length], folder) for length in order}


def retrieval_folder(source: str, *, split: str = "test") -> Path:
    """Return the folder of a retrieval set, downloaded if it is on the hub.

    Args:
        source: as for `open_retrieval_set`.
        split: the queries to download.

    Raises:
        InputError: there is no such folder, or the hub does not give one.
    """
    if not source.startswith(DATASET_PREFIX):
        if not Path(source).is_dir():
            raise InputError(f"{source} is no folder; expected one, or {DATASET_PREFIX}NAME[@REVISION][:PART]")
        return Path(source)
    name, _, part = source.removeprefix(DATASET_PREFIX).partition(":")
    places = [f"{part}/", f"{_MLDR_FOLDER.format(part)}/"] if part else [""]
    names = ("corpus.jsonl", "queries.jsonl", "qrels.jsonl", f"{split}.jsonl")
    folder = _download(
        name,
        [f"{place}{file}{end}" for place in places for file in names for end in ("", ".gz")]
        + [f"{place}qrels/{split}.tsv" for place in places],
    )
    found = next((folder / place for place in places if (folder / place).is_dir()), None)
    if found is None or not _file(found, "corpus.jsonl"):
        raise InputError(
            f"{source} has no {' or '.join(f'{place}corpus.jsonl' for place in places)}; the part after the name is a "
            "folder of the dataset, such as a task of LongEmbed or a language of MLDR"
        )
    return found


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    hub_id, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(hub_id, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns))
        )
    except hub_errors() as error:
        raise InputError(
            f"the hub did not give the dataset {name}: {type(error).__name__}: {str(error).rstrip('.')}. Check the "
            f"name, the network and HF_HUB_OFFLINE; or run `hf download --repo-type dataset {hub_id}` where there is a "
            "network, and give the folder that it prints"
        ) from error


# --- records ----------------------------------------------------------------------------------------------------------


def _read_mldr(corpus: Path, queries: Path) -> RetrievalSet:
    documents = {_id(record, "docid", where): _text(record, "text", where) for record, where in _records(corpus)}
    texts: dict[str, str] = {}
    pairs: list[tuple[str, str, float]] = []
    for record, where in _records(queries):
        query = _id(record, "query_id", where)
        texts[query] = _text(record, "query", where)
        passages = record.get("positive_passages")
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise InputError(f"{where}: expected positive_passages, a list of objects with docid")
        pairs += [(query, _id(passage, "docid", where), 1.0) for passage in passages]
    return _checked(documents, texts, pairs, queries)


def _checked(
    corpus: Mapping[str, str], queries: Mapping[str, str], judgements: Iterable[tuple[str, str, float]], where: Path
) -> RetrievalSet:
    qrels: dict[str, dict[str, float]] = {}
    unknown = 0
    for query, document, score in judgements:
        unknown += query not in queries or document not in corpus
        qrels.setdefault(query, {})[document] = score
    found = RetrievalSet(corpus, queries, qrels)
    if not found.judged:
        raise InputError(f"{where}: no query has a relevant document")
    if unknown:
        logger.warning("%s: %d judgements name a query or document that does not exist", where, unknown)
    return found


def _file(folder: Path, name: str) -> Path | None:
    """The file of this name, or with .gz, if there is one."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _needed(folder: Path, name: str) -> Path:
    return _file(folder, name) or folder / name  # reading what is missing says so


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise InputError(f"{path}:{number}: expected an object with an id and a text")
                    yield record, f"{path}:{number}"
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8", newline="\n"))
    return path.open(encoding="utf-8", newline="\n")


def _id(record: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(record.get(name), (str, int)):
        raise InputError(f"{where}: expected the field {name}; it has {', '.join(record)}")
    return str(record[name])


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(record.get(name), str):
        raise InputError(f"{where}: expected the field {name}; it has {', '.join(record)}")
    return record[name]


def _context(record: Mapping[str, Any], where: str) -> int | None:
    value = record.get(_CONTEXT)
    if value is not None and not isinstance(value, int):
        raise InputError(f"{where}: {_CONTEXT} is {value!r}; expected a number of tokens")
    return value


def _document(record: Mapping[str, Any], where: str) -> str:
    return f"{record.get('title') or ''} {_text(record, 'text', where)}".strip()


def _judgements(path: Path) -> Iterator[tuple[str, str, float]]:
    names = ("query-id", "corpus-id", "score")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if missing := [name for name in names if name not in (reader.fieldnames or ())]:
                raise InputError(
                    f"{path}: the first line has no {', '.join(missing)}; expected {', '.join(names)}, tab-separated"
                )
            for row in reader:
                try:
                    yield row["query-id"], row["corpus-id"], float(row["score"])
                except (TypeError, ValueError) as error:
                    raise InputError(f"{path}:{reader.line_num}: the score is {row['score']!r}, no number") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error

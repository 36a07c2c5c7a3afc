"""Pairs of texts for fine-tuning: read from files or the hub, checked, and brought into the columns of a loss.

Rows have the columns query, positive and any number of negatives, or query, document and score.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
from datasets.exceptions import DatasetsError

from gte_deploy.core.errors import ConfigError, InputError
from gte_deploy.training.data.readers import DATASET_PREFIX, load_dataset
from gte_deploy.training.finetune.options import pairs_suffix
from gte_deploy.training.finetune.recipe import FineTuneRecipe, HardNegatives

logger = logging.getLogger(__name__)

_compute: Any = pyarrow.compute  # it makes its functions when it is imported, so type checkers do not see them

# The keys are PAIR_SUFFIXES.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
# Columns that public datasets use for the same; the recipe's `columns` takes precedence.
_OTHER_NAMES = {
    "query": ("anchor", "question", "sentence1"),
    "positive": ("pos", "answer"),
    "negative": ("neg", "negatives"),
    "document": ("sentence2", "passage", "text"),
    "score": ("label", "similarity_score"),
}
_SHOWN = 3


def read_pairs(inputs: Sequence[str], recipe: FineTuneRecipe) -> datasets.Dataset:
    """Read and check the rows of all inputs.

    Args:
        inputs: files (.jsonl, .json, .csv, .tsv or .parquet, also with .gz), or hf:NAME[@REVISION][:CONFIG[:SPLIT]].
        recipe: its `columns` count, and its loss, which says whether scores are needed.

    Returns:
        rows with the columns query, positive, negative_1, negative_2, …; or query, document, score (float).

    Raises:
        InputError: an input cannot be read, a column is missing, or a row has no text.
    """
    tables = [_named(_open(each), recipe, each) for each in inputs]
    columns = tables[0].column_names
    for each, table in zip(inputs, tables, strict=True):
        if table.column_names != columns:
            raise InputError(f"{each} has {', '.join(table.column_names)}, and {inputs[0]} has {', '.join(columns)}")
    rows = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    if not len(rows):
        raise InputError(f"{', '.join(inputs)}: no rows")
    return rows


def has_scores(rows: datasets.Dataset) -> bool:
    """Whether the rows are pairs with a score."""
    return "score" in rows.column_names


def training_rows(rows: datasets.Dataset, recipe: FineTuneRecipe) -> datasets.Dataset:
    """Bring the rows into the columns that the loss of the recipe reads: the negatives mined, or as pairs with labels.

    Raises:
        InputError: the loss needs scores or positives that the data lacks, or a reranker has no negatives.
    """
    wants_scores = recipe.loss.name == "cosent"
    if wants_scores and not has_scores(rows):
        raise InputError("the loss cosent needs a column score; the data has positives. Take the loss contrastive")
    if recipe.loss.name == "contrastive" and has_scores(rows):
        raise InputError("the loss contrastive needs a column positive; the data has scores. Take the loss cosent")
    if has_scores(rows):
        return rows
    if recipe.hard_negatives is not None:
        rows = mine_negatives(rows, recipe.hard_negatives, prompts=recipe.prompts)
    if recipe.loss.name == "binary_cross_entropy":
        return _labelled(rows)
    return rows


def mine_negatives(
    rows: datasets.Dataset, options: HardNegatives, *, prompts: Mapping[str, str] | None = None
) -> datasets.Dataset:
    """Replace the negatives of the rows by mined ones: documents of the rows that rank high for a query.

    Documents that are a positive of the same query are never its negatives. A row for which too few are found is left
    out, and a log line counts these.

    Args:
        rows: rows with the columns query and positive.
        options: the settings of the mining.
        prompts: prompts of the embedding model: "query" and "document".

    Raises:
        InputError: no row has enough negatives.
    """
    pairs = rows.select_columns(["query", "positive"])
    mined = _mined_by_bm25(pairs, options) if options.model is None else _mined_by_model(pairs, options, prompts or {})
    if not len(mined):
        raise InputError(
            f"{len(pairs):,} rows: no query has {options.count} negatives between ranks {options.skip} and "
            f"{options.depth}. Lower hard_negatives.count, or raise its depth"
        )
    if len(mined) < len(pairs):
        logger.info(
            "hard negatives: %d of %d rows are left out, which have too few", len(pairs) - len(mined), len(pairs)
        )
    return mined


def rows_fingerprint(rows: datasets.Dataset) -> str:
    """Return the sha256 of the rows, in their order."""
    digest = hashlib.sha256(repr(rows.column_names).encode())
    batches: Any = rows.with_format("arrow").iter(batch_size=1000)
    for batch in batches:
        digest.update(repr(batch.to_pydict()).encode())
    return digest.hexdigest()


def relevance_of(rows: datasets.Dataset) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, float]]]:
    """Make a retrieval set of rows with positives: their distinct documents, queries and the positives as relevant.

    Returns:
        id -> document, id -> query, and query id -> document id -> relevance.
    """
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, float]] = {}
    negatives = [name for name in rows.column_names if name.startswith("negative")]
    each: Any = rows
    for row in each:
        query = queries.setdefault(row["query"], f"q{len(queries)}")
        positive = documents.setdefault(row["positive"], f"d{len(documents)}")
        qrels.setdefault(query, {})[positive] = 1.0
        for name in negatives:
            documents.setdefault(row[name], f"d{len(documents)}")
    return {i: text for text, i in documents.items()}, {i: text for text, i in queries.items()}, qrels


def _open(name: str) -> datasets.Dataset:
    suffix = pairs_suffix(name)
    if suffix is None:
        return load_dataset(name.removeprefix(DATASET_PREFIX), streaming=False)
    kind, options = _READERS[suffix]
    try:
        return datasets.load_dataset(kind, data_files=name, split="train", **options)
    except (OSError, ValueError, DatasetsError) as error:
        reason = error.__cause__ or error
        raise InputError(f"{name} cannot be read: {reason}") from error


def _named(table: datasets.Dataset, recipe: FineTuneRecipe, where: str) -> datasets.Dataset:
    """Rename the columns, drop the others, and split lists of negatives."""
    found = {name: column for name in _OTHER_NAMES if (column := _column(name, table.column_names, recipe.columns))}
    is_scored = "score" in found and "positive" not in found
    wanted = ["query", "document", "score"] if is_scored else ["query", "positive"]
    # Numbered negatives keep their numbers.
    numbered = [] if is_scored else sorted(name for name in table.column_names if name.startswith("negative_"))
    more = ["negative"] if not is_scored and "negative" in found else []
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{where} has the columns {', '.join(table.column_names)}; {', '.join(missing)} is missing. Expected query "
            "and positive, or query, document and score; --set columns.NAME=COLUMN says which column it is"
        )
    table = table.select_columns([*(found[name] for name in [*wanted, *more]), *numbered])
    table = table.rename_columns({found[name]: name for name in [*wanted, *more] if found[name] != name})
    for name in [name for name in table.column_names if name != "score"]:
        table = _texts(table, name, where)
    return _scores(table, where) if is_scored else table


def _column(name: str, columns: Sequence[str], given: Mapping[str, str]) -> str | None:
    if name in given:
        return given[name] if given[name] in columns else None
    return next((each for each in (name, *_OTHER_NAMES[name]) if each in columns), None)


def _texts(table: datasets.Dataset, name: str, where: str) -> datasets.Dataset:
    """Check that a column holds texts, and split a column of lists into numbered columns."""
    values = table.data.column(name)
    kind = values.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _split(table, name, where)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise InputError(f"{where}: column {name} holds {kind}; expected texts")
    if not pyarrow.types.is_string(kind):  # pandas makes large strings of a CSV file
        table = table.cast_column(name, datasets.Value("string"))
    blank = _compute.equal(_compute.utf8_trim_whitespace(values), "")
    bad = _compute.indices_nonzero(_compute.fill_null(blank, True))
    if len(bad):
        rows = ", ".join(str(row.as_py() + 1) for row in bad[:_SHOWN])
        raise InputError(f"{where}: column {name} is empty in {len(bad)} rows, the first being {rows}")
    return table


def _split(table: datasets.Dataset, name: str, where: str) -> datasets.Dataset:
    """Replace a column of lists by as many columns as the shortest list has items."""
    lengths = _compute.fill_null(_compute.list_value_length(table.data.column(name)), 0)
    count = _compute.min(lengths).as_py() or 0
    if count < 1:
        raise InputError(f"{where}: column {name} has rows with an empty list; expected at least one text in each")
    taken = [f"{name}_{i + 1}" for i in range(count)]
    table = table.map(
        lambda row: {column: row[name][i] for i, column in enumerate(taken)}, remove_columns=[name], desc=None
    )
    for column in taken:
        table = _texts(table, column, where)
    return table


def _scores(table: datasets.Dataset, where: str) -> datasets.Dataset:
    try:
        table = table.cast_column("score", datasets.Value("float32"))
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{where}: column score is no number: {error}") from error
    values = table.data.column("score")
    if not _compute.all(_compute.fill_null(_compute.is_finite(values), False)).as_py():
        raise InputError(f"{where}: column score has values that are no finite numbers")
    return table


def _labelled(rows: datasets.Dataset) -> datasets.Dataset:
    """Turn rows with positives and negatives into pairs with the label 1 or 0."""
    negatives = [name for name in rows.column_names if name.startswith("negative")]
    if not negatives:
        raise InputError("the data has no negatives; --set hard_negatives={count: 4} mines them")

    def pairs(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"query": [], "document": [], "label": []}
        for i, query in enumerate(batch["query"]):
            documents = [batch["positive"][i], *(batch[name][i] for name in negatives)]
            found["query"] += [query] * len(documents)
            found["document"] += documents
            found["label"] += [1.0] + [0.0] * len(negatives)
        return found

    return rows.map(pairs, batched=True, remove_columns=rows.column_names)


def _mined_by_bm25(pairs: datasets.Dataset, options: HardNegatives) -> datasets.Dataset:
    from gte_deploy.training.evaluation.bm25 import BM25

    queries, positives = list(pairs["query"]), list(pairs["positive"])
    documents = list(dict.fromkeys(positives))
    answers: dict[str, set[str]] = {}
    for query, positive in zip(queries, positives, strict=True):
        answers.setdefault(query, set()).add(positive)
    index = BM25(documents)
    mined: dict[str, list[str]] = {}
    found: list[dict[str, str]] = []
    for query, positive in zip(queries, positives, strict=True):
        if query not in mined:
            ranked = [documents[i] for i, _ in index.search(query, options.depth + len(answers[query]))]
            ranked = [text for text in ranked if text not in answers[query]]
            mined[query] = ranked[options.skip : options.depth][: options.count]
        if len(mined[query]) == options.count:
            negatives = {f"negative_{i + 1}": text for i, text in enumerate(mined[query])}
            found.append({"query": query, "positive": positive, **negatives})
    return datasets.Dataset.from_list(found) if found else pairs.select([])


def _mined_by_model(pairs: datasets.Dataset, options: HardNegatives, prompts: Mapping[str, str]) -> datasets.Dataset:
    from sentence_transformers.util import mine_hard_negatives

    from gte_deploy.training.finetune.opening import open_trained

    assert options.model is not None
    kind, model = open_trained(options.model)
    if kind != "embed":
        raise ConfigError(f"hard_negatives.model {options.model!r} is of kind {kind}; expected an embedding model")
    mined = mine_hard_negatives(
        pairs,
        model,
        anchor_column_name="query",
        positive_column_name="positive",
        range_min=options.skip,
        range_max=options.depth,
        relative_margin=options.relative_margin,
        num_negatives=options.count,
        output_format="n-tuple",
        query_prompt=prompts.get("query"),
        corpus_prompt=prompts.get("document"),
        verbose=False,
    )
    if options.count == 1 and "negative" in mined.column_names:
        mined = mined.rename_column("negative", "negative_1")
    return mined

"""The options of `gte-train embed`, `rerank`, `sparse` and `retrieval`; see `training/options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option, required
from gte_deploy.training.data.readers import DATASET_PREFIX
from gte_deploy.training.options import RankingModelOptions, shipped_recipes

FineTuneKind = Literal["embed", "rerank", "sparse"]
PAIR_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FINETUNE_RECIPES = "finetune"
"""The folder of the shipped recipes for fine-tuning, inside that of all recipes."""


def pairs_suffix(name: str) -> str | None:
    """Return the suffix of a file of pairs, without ".gz", or None for a Hugging Face dataset.

    Raises:
        InputError: it is neither.
    """
    if name.startswith(DATASET_PREFIX):
        return None
    path = Path(name)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if not path.is_file() or suffix not in PAIR_SUFFIXES:
        raise InputError(f"{name}: expected a file of {', '.join(PAIR_SUFFIXES)}, or hf:NAME")
    return suffix


@dataclass(frozen=True)
class FineTuneArguments:
    """The recipe, the data and the output folder of a fine-tuning; see `fine_tune_on_pairs`.

    Raises:
        InputError: a file of pairs is missing or of another kind.
    """

    recipe: str | None = option(
        None,
        "YAML file, or the name of a shipped recipe: "
        f"{', '.join(shipped_recipes(FINETUNE_RECIPES))} (default: the one that has the name of the command)",
        positional=True,
        nargs="?",
        metavar="RECIPE",
    )
    data: tuple[str, ...] = required(
        "files of pairs (.jsonl, .csv, .tsv or .parquet) with the columns query, positive and negative, or query, "
        "document and score; or hf:NAME[@REVISION][:CONFIG[:SPLIT]] for a Hugging Face dataset",
        nargs="+",
        metavar="INPUT",
    )
    output: Path = required(
        "folder of the run; if it holds checkpoints, the run continues",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )
    eval_data: tuple[str, ...] = option(
        (),
        "pairs that are not trained on, as --data: the loss and the retrieval (or the correlation with the scores) are "
        "measured on them before and after training",
        nargs="+",
        metavar="INPUT",
    )
    overrides: tuple[str, ...] = option(
        (),
        "change one value of the recipe, as in loss.temperature=0.02; may be repeated",
        flags=("--set",),
        metavar="KEY=VALUE",
        repeated=True,
    )

    def __post_init__(self) -> None:
        for name in (*self.data, *self.eval_data):
            pairs_suffix(name)


@dataclass(frozen=True)
class RetrievalArguments:
    """The models and the retrieval set of an evaluation.

    Args:
        models: checkpoint folders, hub ids, or folders of bundles.
        data: a retrieval set, as for `open_retrieval_set`.
        split: its queries, or their file of relevance judgements.
        corpus: file of documents in place of the folder's.
        queries: file of queries in place of the folder's.
        qrels: file of relevance judgements in place of the folder's.
        output: file for the result as JSON.

    Raises:
        InputError: a part of the retrieval set is missing.
    """

    models: tuple[str, ...] = option(
        (),
        "checkpoint folders, hub ids or bundles of embedding models, sparse models and rerankers (which order the "
        "best documents of BM25); BM25 itself is always the first row",
        positional=True,
        nargs="*",
        metavar="MODEL",
    )
    data: str | None = option(
        None,
        "folder of a retrieval set in the layout of BEIR (corpus.jsonl, queries.jsonl and qrels/test.tsv), of MLDR or "
        "of a task of LongEmbed; or hf:NAME[@REVISION][:PART], such as hf:Shitao/MLDR:en, for a dataset of the hub",
        metavar="FOLDER|hf:NAME",
    )
    split: str = option("test", "the queries: name of the file in qrels, or of MLDR's file", metavar="NAME")
    corpus: Path | None = option(None, "documents, in place of the folder's", metavar="FILE", parse=Path)
    queries: Path | None = option(None, "queries, in place of the folder's", metavar="FILE", parse=Path)
    qrels: Path | None = option(None, "relevance judgements, in place of the folder's", metavar="FILE", parse=Path)
    output: Path | None = option(
        None, "file for the result as JSON", flags=("-o", "--output"), metavar="FILE", parse=Path
    )

    def __post_init__(self) -> None:
        parts = {"--corpus": self.corpus, "--queries": self.queries, "--qrels": self.qrels}
        missing = [name for name, path in parts.items() if path is None]
        if self.data is None and missing:
            raise InputError(f"give --data FOLDER, or {', '.join(missing)} too")

    @property
    def files(self) -> tuple[Path, Path, Path] | None:
        """The files of the documents, the queries and the relevance judgements; None where none was named."""
        if not (self.corpus or self.queries or self.qrels):
            return None
        folder = Path(self.data or "")
        return (
            self.corpus or folder / "corpus.jsonl",
            self.queries or folder / "queries.jsonl",
            self.qrels or folder / "qrels" / f"{self.split}.tsv",
        )


@dataclass(frozen=True)
class RetrievalOptions(RankingModelOptions):
    """How models are evaluated on a retrieval set.

    Args:
        top_k: rank at which nDCG and MRR are cut.
        recall_at: ranks at which the recall is measured.
        rerank_depth: number of BM25's documents that a reranker orders.
        batch_size: texts that a model computes at once.
        max_queries: at most so many queries, drawn by the seed; None takes all.
        resamples: number of bootstrap samples of the queries for the intervals.
        seed: seed of the bootstrap and of the drawn queries.

    Raises:
        InputError: a number is out of its range.
    """

    top_k: int = option(10, "rank at which nDCG and MRR are cut", metavar="K", parse=int)
    recall_at: tuple[int, ...] = option((1, 10, 100), "ranks for the recall", nargs="+", metavar="K", parse=int)
    rerank_depth: int = option(100, "number of BM25's documents that a reranker orders", metavar="N", parse=int)
    batch_size: int = option(32, "texts that a model computes at once", metavar="N", parse=int)
    max_queries: int | None = option(
        None, "at most N queries, drawn by the seed, among all documents (default: all)", metavar="N", parse=int
    )
    resamples: int = option(1000, "bootstrap samples of the queries for the intervals", metavar="N", parse=int)
    seed: int = option(0, "seed of the bootstrap and of the drawn queries", metavar="SEED", parse=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.top_k, *self.recall_at, self.rerank_depth, self.batch_size, self.resamples)
        least = min(*counts, 1 if self.max_queries is None else self.max_queries)
        if least < 1:
            raise InputError(
                f"top_k {self.top_k}, recall_at {self.recall_at}, rerank_depth {self.rerank_depth}, batch_size "
                f"{self.batch_size}, resamples {self.resamples}, max_queries {self.max_queries}: expected at least 1"
            )

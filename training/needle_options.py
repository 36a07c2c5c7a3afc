"""The options of `gte-train needles`. Importing this loads neither numpy nor torch; see `training/options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option
from gte_deploy.training.options import RankingModelOptions

NeedleTest = Literal["passkey", "needle"]

NEEDLES_FILE = "needles.json"
NEEDLES_PLOT = "needles.png"
_SHORTEST = 64  # tokens: the longest sentence that is hidden, and some text around it


@dataclass(frozen=True)
class NeedleArguments:
    """The models and the texts of a test of long contexts.

    Args:
        models: checkpoint folders, hub ids, or folders of bundles.
        data: files, folders or datasets of text in which sentences are hidden, as for `gte-train prepare`.
        longembed: LongEmbed's own tests in place of `data`: its folder, or hf:NAME[@REVISION].
        needles: file of sentences to hide and questions about them, in place of generated English ones.
        output: folder of the results.

    Raises:
        InputError: not just one of `data` and `longembed` is given, or needles for LongEmbed.
    """

    models: tuple[str, ...] = option(
        (),
        "checkpoint folders, hub ids or bundles of embedding models, sparse models and rerankers; BM25 is always the "
        "first row",
        positional=True,
        nargs="*",
        metavar="MODEL",
    )
    data: tuple[str, ...] = option(
        (),
        "texts in which the sentences are hidden: files, folders or hf:NAME, as for prepare",
        nargs="+",
        metavar="INPUT",
    )
    longembed: str | None = option(
        None,
        "take the published tests instead: the folder of LongEmbed, or hf:dwzhu/LongEmbed[@REVISION]",
        metavar="FOLDER|hf:NAME",
    )
    needles: Path | None = option(
        None,
        "JSON lines with needle and question, sentences of your own to hide (default: generated ones, in English)",
        metavar="FILE",
        parse=Path,
    )
    output: Path | None = option(
        None,
        f"folder for {NEEDLES_FILE} and {NEEDLES_PLOT}",
        flags=("-o", "--output"),
        metavar="FOLDER",
        parse=Path,
    )

    def __post_init__(self) -> None:
        if bool(self.data) == (self.longembed is not None):
            raise InputError("give either --data INPUT, the texts to hide sentences in, or --longembed FOLDER")
        if self.longembed is not None and self.needles is not None:
            raise InputError("LongEmbed has needles of its own; give --needles with --data")


@dataclass(frozen=True)
class NeedleOptions(RankingModelOptions):
    """The size of a test of long contexts.

    Args:
        tests: "passkey" hides a number for each of many names, "needle" a fact about each of many places.
        lengths: lengths of the documents in tokens of the first model.
        queries: questions for each length.
        documents: documents that each question searches, all of the same length.
        batch_tokens: tokens that a model computes at once; at least one document.
        seed: seed of the sentences, their places and the texts around them.

    Raises:
        InputError: a number is out of its range.
    """

    tests: tuple[NeedleTest, ...] = option(
        get_args(NeedleTest),
        "passkey hides a number for each of many names, needle a fact about each of many places",
        choices=get_args(NeedleTest),
        nargs="+",
    )
    lengths: tuple[int, ...] = option(
        (256, 512, 1024, 2048, 4096, 8192),
        "lengths of the documents in tokens of the first model",
        nargs="+",
        metavar="TOKENS",
        parse=int,
    )
    queries: int = option(50, "questions for each length (LongEmbed's are all taken)", metavar="N", parse=int)
    documents: int = option(100, "documents that each question searches, all of one length", metavar="N", parse=int)
    batch_tokens: int = option(32_768, "tokens that a model computes at once", metavar="TOKENS", parse=int)
    seed: int = option(0, "seed of the sentences, their places and the texts around them", metavar="SEED", parse=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tests or not self.lengths or min(self.lengths) < _SHORTEST:
            raise InputError(f"tests {self.tests}, lengths {self.lengths}: expected one or more, of {_SHORTEST} tokens")
        if not 1 <= self.queries <= self.documents or self.documents < 2 or self.batch_tokens < 1:
            raise InputError(
                f"queries {self.queries}, documents {self.documents}, batch_tokens {self.batch_tokens}: expected at "
                "least 1, 2 and 1, and no more queries than documents"
            )

"""The systems whose GLUE averages the model cards of GTE compare, with their published scores and where these are from.

Nothing here was measured by this project. Scores are of the development sets, in percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gte_deploy.core.errors import InputError
from gte_deploy.models.published import PUBLISHED

AVERAGES_FROM = "the table of the model cards of Alibaba-NLP/gte-en-mlm-base, -large and gte-multilingual-mlm-base"
ALL_SYSTEMS = "all"

_MODERNBERT = "ModernBERT (arXiv 2412.13663), table 5, which takes them from"
_UNLINKED = "The model cards link no checkpoint."


@dataclass(frozen=True, kw_only=True)
class GlueSystem:
    """One row of the table.

    Args:
        name: as the table names it.
        checkpoint: hub id, with the revision that `models.published` pins; None if none is known.
        tokenizer: hub id of its tokenizer, for a checkpoint that has none.
        parameters_millions: the published count.
        max_length: longest text of the pretraining, in tokens.
        average: mean of the eight tasks, as `AVERAGES_FROM` prints it.
        scores: task -> score; None if no source with the eight scores of this average is known.
        scores_from: the source of `scores`.
        note: what a user has to know to run it.
    """

    name: str
    checkpoint: str | None
    tokenizer: str | None = None
    parameters_millions: int
    max_length: int
    average: float
    scores: Mapping[str, float] | None = None
    scores_from: str | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**dataclasses.asdict(self), "average_from": AVERAGES_FROM}


def _scores(*values: float) -> dict[str, float]:
    """Name the scores of a row of ModernBERT's table 5, whose columns are in this order."""
    return dict(zip(("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"), values, strict=True))


SYSTEMS = {
    system.name: system
    for system in (
        GlueSystem(
            name="gte-multilingual-mlm-base",
            checkpoint=PUBLISHED["Alibaba-NLP/gte-multilingual-mlm-base"].pinned,
            parameters_millions=306,
            max_length=8192,
            average=83.47,
        ),
        GlueSystem(
            name="gte-en-mlm-base",
            checkpoint=PUBLISHED["Alibaba-NLP/gte-en-mlm-base"].pinned,
            parameters_millions=137,
            max_length=8192,
            average=85.61,
            scores=_scores(57.0, 93.4, 92.1, 90.2, 88.8, 86.7, 91.9, 84.8),
            scores_from=f"{_MODERNBERT} mGTE (arXiv 2407.19669)",
        ),
        GlueSystem(
            name="gte-en-mlm-large",
            checkpoint=PUBLISHED["Alibaba-NLP/gte-en-mlm-large"].pinned,
            parameters_millions=435,
            max_length=8192,
            average=87.58,
            scores=_scores(60.4, 95.1, 93.5, 91.4, 89.2, 89.2, 93.9, 88.1),
            scores_from=f"{_MODERNBERT} mGTE (arXiv 2407.19669)",
        ),
        GlueSystem(
            name="MosaicBERT-base",
            checkpoint=PUBLISHED["mosaicml/mosaic-bert-base"].pinned,
            tokenizer="google-bert/bert-base-uncased",
            parameters_millions=137,
            max_length=128,
            average=85.4,
            scores=_scores(58.2, 93.5, 89.0, 90.3, 92.0, 85.6, 91.4, 83.0),
            scores_from=f"{_MODERNBERT} MosaicBERT (arXiv 2312.17482)",
        ),
        GlueSystem(
            name="MosaicBERT-base-2048",
            checkpoint=PUBLISHED["mosaicml/mosaic-bert-base-seqlen-2048"].pinned,
            tokenizer="google-bert/bert-base-uncased",
            parameters_millions=137,
            max_length=2048,
            average=85.0,
            note="If the hub has only its pickle, convert that once, and give NAME=FOLDER.",
        ),
        GlueSystem(
            name="JinaBERT-base",
            checkpoint=None,
            parameters_millions=137,
            max_length=512,
            average=85.0,
            note=f"{_UNLINKED} jina-embeddings-v2-base-en is an embedding model that was trained from it.",
        ),
        GlueSystem(
            name="nomic-bert-2048",
            checkpoint=PUBLISHED["nomic-ai/nomic-bert-2048"].pinned,
            parameters_millions=137,
            max_length=2048,
            average=84.0,
            scores=_scores(50.0, 93.0, 88.0, 90.0, 92.0, 86.0, 92.0, 82.0),
            scores_from=f"{_MODERNBERT} Nomic Embed (arXiv 2402.01613), and the model card of nomic-ai/nomic-bert-2048",
        ),
        GlueSystem(
            name="MosaicBERT-large",
            checkpoint=None,
            parameters_millions=434,
            max_length=128,
            average=86.1,
            note=_UNLINKED,
        ),
        GlueSystem(
            name="JinaBERT-large",
            checkpoint=None,
            parameters_millions=434,
            max_length=512,
            average=83.7,
            note=_UNLINKED,
        ),
        GlueSystem(
            name="XLM-R-base",
            checkpoint=PUBLISHED["FacebookAI/xlm-roberta-base"].pinned,
            parameters_millions=279,
            max_length=512,
            average=80.44,
        ),
        GlueSystem(
            name="RoBERTa-base",
            checkpoint=PUBLISHED["FacebookAI/roberta-base"].pinned,
            parameters_millions=125,
            max_length=512,
            average=86.4,
            scores=_scores(63.6, 94.8, 90.2, 91.2, 91.9, 87.6, 92.8, 78.7),
            scores_from=f"{_MODERNBERT} RoBERTa (arXiv 1907.11692), table 8",
        ),
        GlueSystem(
            name="RoBERTa-large",
            checkpoint=PUBLISHED["FacebookAI/roberta-large"].pinned,
            parameters_millions=355,
            max_length=512,
            average=88.9,
            scores=_scores(68.0, 96.4, 90.9, 92.4, 92.2, 90.2, 94.7, 86.6),
            scores_from=f"{_MODERNBERT} RoBERTa (arXiv 1907.11692), table 8",
        ),
    )
}
"""Name -> system, in the order of the table."""


def system_of(model: str) -> GlueSystem | None:
    """The system that a checkpoint is by its name or hub id, with or without a revision; None for another."""
    model_id = model.partition("@")[0]
    for system in SYSTEMS.values():
        if model_id == system.name or (system.checkpoint and model_id == system.checkpoint.partition("@")[0]):
            return system
    return None


def choose_systems(chosen: Iterable[str]) -> dict[str, str | None]:
    """Return the names of the chosen systems in the order of the table, each with the checkpoint to run.

    Args:
        chosen: names of systems, or NAME=CHECKPOINT with a folder or hub id of the user; "all" for every system, of
            which those without a checkpoint have None.

    Raises:
        InputError: a name is unknown, stands twice, or has no checkpoint.
    """
    given: dict[str, str | None] = {}
    chosen = list(chosen)
    for text in chosen:
        name, equals, checkpoint = text.partition("=")
        if text == ALL_SYSTEMS:
            continue
        if name not in SYSTEMS:
            raise InputError(f"unknown system {name!r}; expected {ALL_SYSTEMS}, or of {', '.join(SYSTEMS)}")
        if name in given or (equals and not checkpoint):
            raise InputError(f"{text!r}: expected each system once, as {name} or {name}=CHECKPOINT")
        given[name] = checkpoint or SYSTEMS[name].checkpoint
        if given[name] is None:
            raise InputError(f"{name} has no known checkpoint. {SYSTEMS[name].note} Give {name}=FOLDER.")
    if ALL_SYSTEMS in chosen:
        given = {name: system.checkpoint for name, system in SYSTEMS.items()} | given
    return {name: given[name] for name in SYSTEMS if name in given}


def list_systems() -> str:
    """Format the table of the systems for a person."""
    lines = [f"{'system':<26} {'millions':>8} {'tokens':>6} {'GLUE':>6}  checkpoint"]
    for system in SYSTEMS.values():
        sizes = f"{system.parameters_millions:>8} {system.max_length:>6} {system.average:>6.2f}"
        lines.append(f"{system.name:<26} {sizes}  {system.checkpoint or 'none known: give NAME=FOLDER'}")
        lines += [f"{'':<26} {system.note}"] if system.note else []
    lines += ["", f"published averages: {AVERAGES_FROM}"]
    lines += ["published scores of the tasks:"]
    for system in SYSTEMS.values():
        lines.append(f"  {system.name}: {system.scores_from or 'not known'}")
    return "\n".join(lines)

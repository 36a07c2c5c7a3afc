"""The published XTREME-R scores of the systems that the model card of gte-multilingual-mlm-base compares.

Nothing here was measured by this project. Scores are in percent, each the mean over the languages of the task.
"""

from __future__ import annotations

from typing import Any

from gte_deploy.training.evaluation.published_glue import SYSTEMS

SCORES_FROM = (
    "mGTE (arXiv 2407.19669), table 1; the averages of gte-multilingual-mlm-base and XLM-R-base are also those of the "
    "model card of Alibaba-NLP/gte-multilingual-mlm-base"
)
_TASKS = ("xnli", "xcopa", "udpos", "wikiann", "xquad", "mlqa", "tydiqa", "mewslix", "lareqa", "tatoeba")
# Name -> average, scores in the order of _TASKS, exact matches of the three tasks of answers (not in the average).
_ROWS: dict[str, tuple[float, tuple[float, ...], tuple[float, ...]]] = {
    "mBERT-base": (
        59.43,
        (66.63, 55.49, 71.80, 62.34, 66.23, 57.37, 55.01, 44.65, 75.26, 39.49),
        (51.03, 42.44, 38.05),
    ),
    "XLM-R-base": (
        62.02,
        (74.50, 50.45, 73.84, 61.23, 72.83, 61.54, 53.09, 42.09, 63.43, 67.20),
        (58.01, 46.45, 37.11),
    ),
    "mGTE-MLM-2048": (
        65.24,
        (73.17, 63.62, 73.25, 60.87, 75.33, 64.02, 53.58, 44.41, 72.13, 72.02),
        (60.00, 48.57, 36.68),
    ),
    "gte-multilingual-mlm-base": (
        64.44,
        (73.37, 61.98, 73.14, 59.83, 74.81, 64.24, 49.85, 44.52, 71.54, 71.10),
        (59.37, 48.80, 33.27),
    ),
}

XTREME_SYSTEMS: dict[str, dict[str, Any]] = {
    name: {
        "name": name,
        "checkpoint": SYSTEMS[name].checkpoint if name in SYSTEMS else None,
        "average": average,
        "scores": dict(zip(_TASKS, scores, strict=True)),
        "exact_match": dict(zip(("xquad", "mlqa", "tydiqa"), matches, strict=True)),
        "scores_from": SCORES_FROM,
    }
    for name, (average, scores, matches) in _ROWS.items()
}
"""Name -> the row of the published table. The paper calls gte-multilingual-mlm-base mGTE-MLM-8192; mGTE-MLM-2048 is the
checkpoint of its first stage, which was not published, and no checkpoint is known for mBERT-base's row."""


def xtreme_system_of(model: str) -> dict[str, Any] | None:
    """The row of a checkpoint by its name or hub id, with or without a revision; None for another."""
    model_id = model.partition("@")[0]
    for name, row in XTREME_SYSTEMS.items():
        if model_id == name or (row["checkpoint"] and model_id == row["checkpoint"].partition("@")[0]):
            return row
    return None


def list_xtreme_systems() -> str:
    """Format the published table for a person."""
    lines = [f"{'system':<26}{''.join(f'{task:>9}' for task in _TASKS)}{'average':>9}"]
    for name, row in XTREME_SYSTEMS.items():
        scores = "".join(f"{score:>9.2f}" for score in row["scores"].values())
        lines.append(f"{name:<26}{scores}{row['average']:>9.2f}")
    return "\n".join([*lines, "", f"published: {SCORES_FROM}"])

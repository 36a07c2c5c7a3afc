"""Pairs of texts that a tiny model learns in a few steps, and a float16 checkpoint in the original layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factories import SPELLING, make_checkpoint

THINGS = ("river", "city", "king", "dog", "house", "tree", "car", "book")
FACTS = ("green", "tall", "quick", "cold")
WORDS = (*SPELLING, *(word for word in (*THINGS, *FACTS, "what", "near") if word not in SPELLING))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows with query and positive."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"query": f"what is {f} {t}", "positive": f"the {t} is {f} and old"} for t in THINGS for f in FACTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def half_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked-LM checkpoint in the original layout, whose weights are float16."""
    folder = tmp_path_factory.mktemp("half")
    return make_checkpoint(folder, vocab=WORDS, dtype="float16", layout="original", max_positions=64)


@pytest.fixture(scope="session")
def make_finetune(half_checkpoint: Path) -> Callable[..., Any]:
    """`make_finetune(kind, **fields)`: a recipe of a few steps."""
    from gte_deploy.training.finetune.recipe import FineTuneRecipe, Loss

    def make(kind: str = "embed", *, loss: dict[str, Any] | None = None, **fields: Any) -> FineTuneRecipe:
        defaults: dict[str, Any] = {
            "name": "test",
            "kind": kind,
            "model": str(half_checkpoint),
            "loss": Loss(**(loss or {"name": "binary_cross_entropy" if kind == "rerank" else "contrastive"})),
            "max_length": 32,
            "batch_size": 8,
            "steps": 8,
            "learning_rate": 2e-3,
            "dtype": "float32",
            "log_every": 1,
            "checkpoint_every": 4,
            "seed": 3,
        }
        return FineTuneRecipe(**{**defaults, **fields})

    return make

"""A GLUE of a few learnable examples, in the files of the published archives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from gte_deploy.training.evaluation.glue_tasks import GLUE_TASKS

NOISE = tuple(f"w{i}" for i in range(50, 256))
SIGNALS = ("w10", "w11", "w12")


def toy_rows(
    count: int,
    seed: int,
    *,
    classes: int = 2,
    signals: Sequence[str] = SIGNALS,
    noise: Sequence[str] = NOISE,
) -> list[tuple[str, int]]:
    """Texts with their class, which one word among noise tells."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.randrange(classes)
        words = [rng.choice(noise) for _ in range(rng.randint(2, 6))]
        words.insert(rng.randrange(len(words)), signals[label])
        rows.append((" ".join(words), label))
    return rows


def write_toy_glue(
    folder: Path,
    *,
    train: int = 160,
    dev: int = 40,
    signals: Sequence[str] = SIGNALS,
    noise: Sequence[str] = NOISE,
) -> Path:
    """Write all eight tasks, with `train` and `dev` examples each; the second text of a pair is always the same."""
    for number, task in enumerate(GLUE_TASKS.values()):
        (folder / task.folder).mkdir(parents=True)
        for split, count in (("train", train), (task.dev[0], dev)):
            seed, classes = number * 2 + (split != "train"), len(task.classes) or 2
            rows = toy_rows(count, seed, classes=classes, signals=signals, noise=noise)
            lines = [] if task.name == "cola" else ["\t".join(task.columns[0])]
            for text, label in rows:
                shown = f"{label}.000" if task.is_regression else task.classes[label]
                texts = [text, noise[0]][: len(task.columns[0]) - 1]
                lines.append("\t".join(["x", shown, "", text] if task.name == "cola" else [*texts, shown]))
            (folder / task.folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder

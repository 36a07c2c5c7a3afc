"""The part of a fine-tuned model's card that sentence-transformers does not write: dtype, recipe, data and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gte_deploy._version import __version__
from gte_deploy.core.files import write_text
from gte_deploy.training.finetune.recipe import FineTuneRecipe
from gte_deploy.training.recipe import dump_recipe

_BEFORE = "## Usage"


def complete_card(
    card: Path,
    recipe: FineTuneRecipe,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    data: Sequence[str],
    rows: int,
) -> None:
    """Add the section "Training with gte-train" to a card, before its section on usage.

    Args:
        card: the README.md that sentence-transformers wrote.
        recipe: the recipe of the run.
        before: figures on the evaluation data before training.
        after: the same after training.
        data: the inputs; of a path only the name is written.
        rows: number of their rows.
    """
    text = card.read_text("utf-8")
    where = text.find(f"\n{_BEFORE}\n")
    where = len(text) if where < 0 else where + 1
    write_text(card, text[:where] + _section(recipe, before, after, data, rows) + "\n" + text[where:])


def _section(
    recipe: FineTuneRecipe, before: Mapping[str, float], after: Mapping[str, float], data: Sequence[str], rows: int
) -> str:
    names = ", ".join(f"`{each if each.startswith('hf:') else Path(each).name}`" for each in data)
    computed = "bfloat16 autocast over float32 weights" if recipe.dtype == "bfloat16" else "float32"
    lines = [
        "## Training with gte-train",
        "",
        f"- **Weights:** float32, whatever the starting checkpoint stores; training computed in {computed}. Load them "
        'for further training as they are, or with `model_kwargs={"dtype": torch.float32}`.',
        f"- **Start:** `{Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model}`",
        f"- **Data:** {names}, {rows:,} rows",
        f"- **Length:** trained on texts of up to {recipe.max_length} tokens",
        f"- **Software:** gte-deploy {__version__}",
        "",
    ]
    if after:
        lines += ["| on held-out pairs | before | after |", "|---|---|---|"]
        for name, value in after.items():
            old = f"{before[name]:.4f}" if name in before else ""
            lines.append(f"| {name} | {old} | {value:.4f} |")
        lines.append("")
    shown = dump_recipe(recipe).strip()
    if Path(recipe.model).is_dir():
        shown = shown.replace(f"model: {recipe.model}", f"model: {Path(recipe.model).name}")
    return "\n".join([*lines, "The recipe:", "", "```yaml", shown, "```", ""])

"""Held-out evaluation inside a run: its scores, its records, and that it leaves the training as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gte_deploy.core.errors import ConfigError
from gte_deploy.models.checkpoint import copy_tokenizer
from gte_deploy.training import train as train_module
from gte_deploy.training.cli import main
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.prepare import prepare
from gte_deploy.training.evaluation.held_out import HeldOutText, scored, scores_of
from gte_deploy.training.evaluation.masked_lm import open_model
from gte_deploy.training.log import read_log
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.state import TOKENIZER_FOLDER
from gte_deploy.training.train import train

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def held_out(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents in two sources, which the corpus of the run does not have."""
    folder, rng = tmp_path_factory.mktemp("held-out"), random.Random(9)
    words = [f"w{i}" for i in range(5, 256)]
    for source in ("domain", "general"):
        texts = [" ".join(rng.choices(words, k=rng.choice([3, 30, 90]))) for _ in range(15)]
        (folder / f"{source}.txt").write_text("\n\n".join(texts))
    tokenizer = corpus_folder / TOKENIZER_FOLDER
    prepare([f"{s}={folder / s}.txt" for s in ("domain", "general")], folder / "data", tokenizer=tokenizer)
    copy_tokenizer(tokenizer, folder / "data" / TOKENIZER_FOLDER)
    return folder / "data"


def run(recipe: dict[str, Any], data: Path, output: Path) -> bytes:
    """The weights at the end of a run."""
    result = train(recipe_from_dict(recipe), data=data, output=output, tensorboard=False)
    assert result.model is not None
    return (result.model / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def evaluated(
    make_recipe: Callable[..., dict[str, Any]], corpus_folder: Path, held_out: Path, tmp_path_factory
) -> tuple[dict[str, Any], Path]:
    """A recipe with dropout and two stages, and the folder of its run with an evaluation every two steps."""
    recipe, output = make_recipe(steps=(3, 4), dropout=0.1, checkpoint_every=3), tmp_path_factory.mktemp("runs") / "run"
    run({**recipe, "eval_data": str(held_out), "evaluate_every": 2}, corpus_folder, output)
    return recipe, output


def test_evaluations_change_neither_the_weights_nor_the_losses(evaluated, corpus_folder: Path, tmp_path: Path):
    recipe, output = evaluated
    plain = run(recipe, corpus_folder, tmp_path / "plain")
    assert (output / "model" / "model.safetensors").read_bytes() == plain
    losses = [[r["loss"] for r in read_log(folder / "log.jsonl")] for folder in (output, tmp_path / "plain")]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_evaluations_are_logged_where_they_are_due(evaluated):
    events = read_log(evaluated[1] / "log.jsonl", kind="evaluation")
    found = [(event["total_step"], event["stage"], event["step"]) for event in events]
    assert found == [(0, "mlm-32", 0), (2, "mlm-32", 2), (3, "mlm-32", 3), (5, "mlm-64", 2), (7, "mlm-64", 4)]
    for event in events:
        assert [score["source"] for score in event["scores"]] == ["all", "domain", "general"]
        assert all(score["loss_error"] > 0 and 0 <= score["top1"] <= score["top5"] <= 1 for score in event["scores"])
    assert events[0]["scores"][0]["loss"] == pytest.approx(5.55, abs=0.1), "random weights: near ln 256"


def test_scores_are_those_of_the_exported_model_without_dropout(evaluated, held_out: Path):
    """masked_lm's way to them is judged by transformers in test_masked_lm.py; masks are those of the stage."""
    recipe, output = evaluated
    text = HeldOutText(TokenCorpus.open(held_out), 64, Masking(), 100_000, recipe["seed"])
    model = open_model(str(output / "model"))
    sums = scored(text, lambda batch: model.predict(batch, dtype="float32"), text.packed(512))
    last = read_log(output / "log.jsonl", kind="evaluation")[-1]["scores"]
    for mine, theirs in zip(scores_of(text, sums), last, strict=True):
        assert mine.masked_tokens == theirs["masked_tokens"]
        assert mine.loss == pytest.approx(theirs["loss"], abs=2e-6)
        assert mine.top5 == pytest.approx(theirs["top5"], abs=1.5 / mine.masked_tokens)


def test_a_resumed_run_has_each_evaluation_once(evaluated, corpus_folder: Path, held_out: Path, tmp_path, monkeypatch):
    recipe, output = evaluated
    given = {**recipe, "eval_data": str(held_out), "evaluate_every": 2}
    original, calls = train_module.gradient_norm, 0

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the second stage, after the evaluation of its second step and before a checkpoint
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(train_module, "gradient_norm", fail_once)
    with pytest.raises(KeyboardInterrupt):
        run(given, corpus_folder, tmp_path / "run")
    run(given, corpus_folder, tmp_path / "run")
    events = [read_log(folder / "log.jsonl", kind="evaluation") for folder in (output, tmp_path / "run")]
    assert events[0] == events[1]


def test_the_command_shows_them_in_progress_tensorboard_and_plot(
    make_recipe, corpus_folder: Path, held_out: Path, tmp_path: Path, capsys, monkeypatch
):
    from tensorboard.backend.event_processing import event_accumulator as event_file

    monkeypatch.undo()
    (tmp_path / "recipe.yaml").write_text(json.dumps(make_recipe(steps=(2,))))
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--data", str(corpus_folder), "-o", str(tmp_path / "run")]
    assert main([*arguments, "--eval-data", str(held_out), "--device", "cpu"]) == 0
    err = capsys.readouterr().err
    assert "mlm-32 0  held-out loss 5." in err and "mlm-32 2  held-out loss 5." in err and "(domain 5." in err
    shown = event_file.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [point.step for point in shown.Scalars("held_out_loss/general")] == [0, 2]
    assert json.loads(json.dumps(str(held_out))) in (tmp_path / "run" / "recipe.yaml").read_text()


def test_the_plot_has_a_line_for_each_source(evaluated, monkeypatch):
    from matplotlib import figure

    from gte_deploy.training.log import plot_run

    labels: list[str] = []
    original = figure.Figure.savefig

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels.extend(self.axes[0].get_legend_handles_labels()[1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", remember)
    assert plot_run(evaluated[1]).read_bytes().startswith(b"\x89PNG")
    assert labels == ["mlm-32", "mlm-64", "held out: all", "held out: domain", "held out: general"]


def test_text_of_the_training_and_other_tokenizers_are_refused(
    make_recipe, corpus_folder: Path, held_out: Path, tmp_path: Path
):
    recipe = make_recipe(steps=(2,))
    with pytest.raises(ConfigError, match="on which the run trains; hold documents out"):
        run({**recipe, "eval_data": str(corpus_folder)}, corpus_folder, tmp_path / "a")
    (tmp_path / "text.txt").write_text("some english words that the built-in tokenizer knows")
    from gte_deploy.models import builtin_path

    prepare([str(tmp_path / "text.txt")], tmp_path / "other", tokenizer=builtin_path())
    with pytest.raises(ConfigError, match="another tokenizer"):
        run({**recipe, "eval_data": str(tmp_path / "other")}, corpus_folder, tmp_path / "b")
    with pytest.raises(ConfigError, match="evaluate_every is 0"):
        recipe_from_dict({**recipe, "evaluate_every": 0})

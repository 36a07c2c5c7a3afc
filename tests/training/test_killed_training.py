"""kill -9 of training at each stage at which it touches a file: repeated, it ends in the same weights and losses.

tests/training/test_resume.py kills it at random moments.
"""

import json
import re
import signal

import pytest

from fork_server import ForkServer, spread, stages_of

pytestmark = pytest.mark.reliability

TRAINING = """
import json, sys
from pathlib import Path
from fork_server import die_at, serve
import safetensors.torch, torch
from gte_deploy.training import train as train_module
from gte_deploy.training.recipe import recipe_from_dict

torch.set_num_threads(1)
train_module.plot_run = lambda folder: None

def work(output, stage="", stages=""):
    die_at(output, stage, stages)
    recipe = recipe_from_dict(json.loads(Path(sys.argv[1]).read_text()))
    train_module.train(recipe, data=Path(sys.argv[2]), output=Path(output), tensorboard=False)

serve(work)
"""


@pytest.fixture(scope="module")
def training(make_recipe, corpus_folder, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.json"
    recipe.write_text(json.dumps(make_recipe(steps=(3, 2), dropout=0.1)))
    server = ForkServer(TRAINING, recipe, corpus_folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory):
    """The results of a run that nothing disturbs, and its stages."""
    folder = tmp_path_factory.mktemp("trained")
    assert training.run(output=folder / "out", stages=folder / "stages") == 0
    return results(folder / "out"), stages_of(folder / "stages")


def results(output):
    """The weights of the model and of the last checkpoint, and the losses of every step."""
    files = [output / "model" / "model.safetensors", *sorted((output / "checkpoints").glob("*/*.safetensors"))]
    losses = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    kept = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
    return kept, [(line["stage"], line["step"], line["loss"]) for line in losses if "loss" in line]


def kill_training_at_stages(training, trained, folder, attempts, most):
    expected, stages = trained
    text = "\n".join(stages)
    for named in (r"open \.recipe.yaml", r"open .*log", r"os.mkdir checkpoints/.*tmp", r"open .*COMPLETE.json",
                  r"os.rename checkpoints/.*tmp", r"shutil.rmtree checkpoints", r"open model"):  # fmt: skip
        assert re.search(named, text, re.MULTILINE), (named, text)
    chosen = spread(stages, most)
    attempts("training killed at a stage, and repeated", len(chosen))
    for number, stage in enumerate(chosen):
        output = folder / f"out-{number}"
        assert training.run(output=output, stage=stage) == -signal.SIGKILL, stage
        assert training.run(output=output) == 0, stage
        assert results(output) == expected, stage
        assert not list((output / "checkpoints").glob(".*")), stage


def test_training_killed_at_named_stages(training, trained, tmp_path, attempts):
    kill_training_at_stages(training, trained, tmp_path, attempts, most=6)


@pytest.mark.slow
def test_training_killed_at_every_stage(training, trained, tmp_path, attempts):
    kill_training_at_stages(training, trained, tmp_path, attempts, most=1000)
